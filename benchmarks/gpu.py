"""What the kernels and a decoding round cost on a GPU. One command, under 8 minutes on one card:

    python benchmarks/gpu.py [--json gpu.json]

First every kernel is checked against its torch reference in float64 on fresh random inputs. Then each is timed against
that reference, eager and under torch.compile, with the bytes that its docstring counts as a share of what a plain copy
moves in the same run. Last a decoding round at the shapes of Qwen3-4B and 8B and their released heads, at batch 1, 8
and 32, eager and captured, beside plain `generate`, eager and with a static cache, and at batch 1 transformers' own
loop with one: weights are random, so acceptance is forced to a given tau, and labelled so. Without a GPU only the
checks run, at small shapes in Triton's interpreter.
"""

import argparse
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
if not GPU:
    # Read when triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from dspark_kernels import attention, sequential, verify  # noqa: E402
from dspark_kernels.reference import attention as attention_reference  # noqa: E402
from dspark_kernels.reference import sequential as sequential_reference  # noqa: E402
from dspark_kernels.reference import verify as verify_reference  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
# Qwen3's vocabulary, the released heads' block and rank.
VOCABULARY, BLOCK, RANK = (151_936, 7, 256) if GPU else (1_000, 3, 16)
TAU = 4.0
TARGETS = {
    "Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
}


# -- Kernels ----------------------------------------------------------------------------------------------------


def verify_inputs(rows: int, dtype: torch.dtype):
    """Target and draft logits, drafts from them, whole lengths, seeds."""
    target = torch.randn(rows, BLOCK + 1, VOCABULARY, device=DEVICE, dtype=dtype) * 3
    draft = target[:, :-1] + torch.randn_like(target[:, :-1])
    tokens = draft.float().argmax(dim=-1)
    lengths = torch.full((rows,), BLOCK, device=DEVICE)
    return target, draft, tokens, lengths, torch.randint(2**62, (rows,), device=DEVICE)


def sequential_inputs(rows: int, dtype: torch.dtype):
    """Base logits, W1, W2, anchors, seeds."""
    base = torch.randn(rows, BLOCK, VOCABULARY, device=DEVICE, dtype=dtype)
    w1, w2 = (torch.randn(VOCABULARY, RANK, device=DEVICE, dtype=dtype) for _ in range(2))
    anchors = torch.randint(VOCABULARY, (rows,), device=DEVICE)
    return base, w1, w2, anchors, torch.randint(2**62, (rows,), device=DEVICE)


def attention_inputs(rows: int, dtype: torch.dtype, context: int):
    """Query, key and value of 32 heads over 8 heads of keys; contexts from an eighth of the longest to the longest."""
    queries, view = BLOCK + 1, context + BLOCK + 1
    query = torch.randn(rows, 32, queries, 128, device=DEVICE, dtype=dtype)
    key, value = (torch.randn(rows, 8, view, 128, device=DEVICE, dtype=dtype) for _ in range(2))
    starts = torch.linspace(context // 8, context, rows, device=DEVICE).long()
    return query, key, value, starts, torch.full((rows,), queries, device=DEVICE), 128**-0.5


def sdpa_with_mask(query, key, value, starts, counts, scale):
    """What a target does without the kernel."""
    slots = starts[:, None] + torch.arange(query.shape[2], device=query.device)
    mask = torch.arange(key.shape[2], device=query.device) <= slots[..., None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(query, key, value, attn_mask=mask[:, None], scale=scale, enable_gqa=True)


def kernel_cases(rows: int, dtype: torch.dtype):
    """Of every kernel its name, the call, what it is measured against, arguments, and the bytes it moves."""
    size = torch.finfo(dtype).bits // 8
    target, draft, tokens, lengths, seeds = verify_inputs(rows, dtype)
    row = VOCABULARY * size
    yield (
        "verify greedy",
        verify.verify_greedy,
        verify_reference.verify_greedy,
        (target, tokens, lengths),
        rows * (BLOCK + 1) * row,
    )
    yield (
        "verify sampled",
        verify.verify_sampled,
        verify_reference.verify_sampled,
        (target, draft, tokens, lengths, seeds),
        rows * (2 * BLOCK + 1 + 2) * row,
    )
    del target, draft
    base, w1, w2, anchors, seeds = sequential_inputs(rows, dtype)
    moved = BLOCK * (VOCABULARY * RANK * size * -(-rows // sequential.MOST_ROWS) + rows * row)
    for name, given, written in (("greedy", None, 0), ("sampled", seeds, 4 * rows * BLOCK * VOCABULARY)):
        yield (
            f"sequential {name}",
            sequential.sample_block,
            sequential_reference.sample_block,
            (base, w1, w2, anchors, given),
            moved + written,
        )
    del base, w1, w2
    for context in (512, 8192) if GPU else (40,):
        inputs = attention_inputs(rows, dtype, context)
        moved = 2 * 128 * size * 8 * int((inputs[3] + inputs[4]).sum()) + 2 * inputs[0].numel() * size
        yield f"attention, {context}", attention.ragged_attention, sdpa_with_mask, inputs, moved


def check(console: Console) -> list[dict]:
    """Every kernel against its reference, on inputs that nobody chose."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 5):
            for name, kernel, reference, args, _ in kernel_cases(rows, dtype):
                if name.startswith("attention"):
                    reference = attention_reference.ragged_attention
                exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
                ours, theirs = kernel(*args), reference(*exact)
                if torch.is_tensor(ours):
                    worst = ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()
                    good, what = worst < 4 * torch.finfo(dtype).eps + 1e-4, f"largest error {worst:.1e}"
                else:
                    tokens = (0, 1) if name.startswith("verify") else (0,)
                    agree = torch.stack([(ours[i] == theirs[i]).view(rows, -1).all(dim=1) for i in tokens]).all(dim=0)
                    # Of drafts two scores that are equal up to the order of a sum may change places.
                    allowed = rows // 5 if name.startswith("sequential") else 0
                    good, what = rows - agree.sum() <= allowed, f"{int(agree.sum())} of {rows} rows equal"
                found.append({"check": name, "dtype": str(dtype), "rows": rows, "found": what, "good": bool(good)})
                console.print(f"{name}, {dtype}, {rows} rows: {what}", "" if good else "[red]WRONG[/]")
    return found


def seconds_of(call, *args) -> float:
    from triton.testing import do_bench

    return do_bench(lambda: call(*args), warmup=30, rep=120, return_mode="median") / 1000


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds_of(y.copy_, x)


def time_kernels(console: Console) -> list[dict]:
    copy, found = copy_bandwidth(), []
    for rows in (1, 8, 32):
        for name, kernel, reference, args, moved in kernel_cases(rows, torch.bfloat16):
            ours, eager = seconds_of(kernel, *args), seconds_of(reference, *args)
            compiled = seconds_of(torch.compile(reference, dynamic=False), *args)
            torch.compiler.reset()
            record = {"kernel": name, "rows": rows, "microseconds": 1e6 * ours, "bytes": moved}
            record |= {"reference_microseconds": 1e6 * eager, "compiled_microseconds": 1e6 * compiled}
            record |= {"gigabytes_per_second": moved / ours / 1e9, "of_copy": moved / ours / copy}
            console.print(f"{name}, {rows} rows: {1e6 * ours:.1f} us, {moved / ours / copy:.0%} of a copy")
            found.append(record)
    return found


# -- A decoding round -------------------------------------------------------------------------------------------


def pair_of(name: str):
    """Target and head of the released shapes, with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import dspark_hf

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        num_hidden_layers=36,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        attn_implementation="dspark",
        **TARGETS[name],
    )
    with torch.device(DEVICE):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        target = Qwen3ForCausalLM(config).eval()
        head_config = dspark_hf.DSparkConfig.from_target(
            config, block_size=BLOCK, num_hidden_layers=5, markov_rank=RANK, mask_token_id=VOCABULARY - 1
        )
        head = dspark_hf.DSparkHead(head_config).eval()
        torch.set_default_dtype(before)
    head.generation_config.num_assistant_tokens_schedule = "constant"
    return target, head


@contextmanager
def forced(tau: float, parts: dict[str, list] | None):
    """Acceptance of `tau` tokens a round on average, whatever was drafted; and events around the parts of a round,
    which no captured one has (`None`)."""
    from dspark_hf.generation import drafting
    from dspark_hf.generation import round as steps
    from dspark_hf.modeling_dspark import DSparkHead

    def timed(name, call):
        def run(*args, **kwargs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call(*args, **kwargs)
            end.record()
            parts.setdefault(name, []).append((begin, end))
            return result

        return run

    real = timed("acceptance", steps.accept_greedy) if parts is not None else steps.accept_greedy

    def accept(logits, drafts, lengths):
        verdict = real(logits, drafts, lengths)
        # A rule that a compiler can capture, the same for eager and captured rounds.
        wanted = (tau - 1 + torch.rand(len(lengths), device=lengths.device)).floor().long()
        return steps.Verdict(torch.minimum(lengths, wanted), verdict.next_tokens)

    before = steps.accept_greedy, drafting.Drafter._hidden, DSparkHead.sample_block, steps.verify
    steps.accept_greedy = accept
    if parts is not None:
        drafting.Drafter._hidden = timed("draft backbone", before[1])
        DSparkHead.sample_block = timed("sequential head", before[2])
        steps.verify = timed("verify", before[3])
    try:
        yield
    finally:
        steps.accept_greedy, drafting.Drafter._hidden, DSparkHead.sample_block, steps.verify = before


def time_rounds(console: Console, tokens: int = 96) -> list[dict]:
    found = []
    for name in TARGETS:
        target, head = pair_of(name)
        for rows in (1, 8, 32):
            inputs = {"input_ids": torch.randint(VOCABULARY, (rows, 256), device=DEVICE)}
            record = {"target": name, "rows": rows, "forced_tau": TAU}
            parts: dict[str, list] = {}
            ours = {"assistant_model": head, "do_sample": False, "eos_token_id": None}
            with forced(TAU, parts):
                for _ in range(2):
                    parts.clear()
                    seconds, output = timed_call(target, inputs, max_new_tokens=tokens, **ours)
            rounds, seconds = output.dspark.rounds, seconds - output.dspark.prefill_seconds
            for part, events in parts.items():
                record[f"{part} ms"] = sum(begin.elapsed_time(end) for begin, end in events) / rounds
            record["round ms"] = 1000 * seconds / rounds
            record["everything else ms"] = record["round ms"] - sum(record[f"{part} ms"] for part in parts)
            record["captured round ms"] = captured_round_ms(target, inputs, tokens, ours)
            if rows == 1:
                record["stock static round ms"] = stock_round_ms(target, inputs, tokens, ours)
            plain, static = plain_seconds(target, inputs, tokens), plain_seconds(target, inputs, tokens, "static")
            record |= {"plain ms a token": 1000 * plain / tokens, "static compiled ms a token": 1000 * static / tokens}
            record |= {"speed of plain": plain / seconds, "speed of static compiled": static / seconds}
            times = f"{record['round ms']:.2f} ms a round, {record['captured round ms']:.2f} captured"
            console.print(f"{name}, {rows} rows: {times}, at a forced tau of {TAU}")
            found.append(record)
            torch.compiler.reset()
        del target, head
        torch.cuda.empty_cache()
    return found


def captured_round_ms(target, inputs, tokens: int, ours: dict) -> float:
    """Of whole blocks, once all passes are captured."""
    with forced(TAU, None):
        for _ in range(3):
            kwargs = ours | {"max_new_tokens": tokens, "cache_implementation": "static"}
            seconds, output = timed_call(target, inputs, **kwargs)
    return 1000 * (seconds - output.dspark.prefill_seconds) / output.dspark.rounds


def stock_round_ms(target, inputs, tokens: int, ours: dict) -> float:
    """Of transformers' own loop with the same head and compiled passes. With random weights it accepts next to nothing,
    which changes how many rounds there are and not what one takes."""
    from dspark_hf.generation.candidate_generator import DSparkCandidateGenerator as Generator
    from dspark_hf.generation.hook import stock_loop

    rounds, propose = [], Generator.get_candidates

    def counted(self, *args, **kwargs):
        rounds.append(1)
        return propose(self, *args, **kwargs)

    Generator.get_candidates = counted
    try:
        with stock_loop():
            for _ in range(3):
                rounds.clear()
                kwargs = ours | {"max_new_tokens": tokens, "cache_implementation": "static"}
                seconds, _ = timed_call(target, inputs, **kwargs)
    finally:
        Generator.get_candidates = propose
    return 1000 * seconds / len(rounds)


def plain_seconds(target, inputs, tokens: int, cache: str | None = None) -> float:
    """Of so many tokens, the prompt's pass not counted; with a static cache transformers compiles the passes."""
    kwargs = {"do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    first = min(timed_call(target, inputs, max_new_tokens=1, **kwargs)[0] for _ in range(3))
    return [timed_call(target, inputs, max_new_tokens=tokens + 1, **kwargs)[0] for _ in range(3)][-1] - first


def timed_call(target, inputs, **kwargs):
    """Seconds of a `generate` call, and its output."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    output = target.generate(**inputs, return_dict_in_generate=True, **kwargs)
    torch.cuda.synchronize()
    return time.perf_counter() - started, output


# -- Output -----------------------------------------------------------------------------------------------------


def as_table(results: dict) -> Table:
    """Kernels and rounds in one: microseconds, and those of what they are measured against."""
    title = "a round commits tau tokens by force; beside it is what plain generate takes for as many"
    table = Table(title=f"{results['device']}, bfloat16", caption=title, box=box.SIMPLE_HEAD)
    for column in ("what", "rows", "us", "eager us", "compiled us", "of a copy"):
        table.add_column(column, justify="right")
    for k in results["kernels"]:
        times = (k["microseconds"], k["reference_microseconds"], k["compiled_microseconds"])
        table.add_row(k["kernel"], str(k["rows"]), *(f"{time:.1f}" for time in times), f"{k['of_copy']:.0%}")
    for r in results["rounds"]:
        for part in ("draft backbone", "sequential head", "verify", "acceptance", "everything else"):
            table.add_row(f"{r['target']} {part}", str(r["rows"]), f"{1000 * r[f'{part} ms']:.1f}", "", "", "")
        beside = [f"{1000 * TAU * r[name]:.1f}" for name in ("plain ms a token", "static compiled ms a token")]
        for name in ("round ms", "captured round ms", "stock static round ms"):
            if name in r:
                own = f"{r['target']} {name.removesuffix(' ms')}, tau forced to {TAU}"
                table.add_row(own, str(r["rows"]), f"{1000 * r[name]:.1f}", *beside, "")
    return table


def checks_table(results: dict) -> Table:
    table = Table(title=results["device"], box=box.SIMPLE_HEAD)
    for column in results["checks"][0]:
        table.add_column(column, justify="right")
    for record in results["checks"]:
        table.add_row(*map(str, record.values()))
    return table


def main(args: argparse.Namespace) -> None:
    console = Console(width=200)
    card = torch.cuda.get_device_name() if GPU else "no GPU: small shapes in Triton's interpreter, not timed"
    console.print(f"{card}; torch {torch.__version__}")
    results = {"device": card, "torch": torch.__version__, "checks": check(console)}
    if GPU:
        results["kernels"] = time_kernels(console)
        results["rounds"] = time_rounds(console)
    console.print(as_table(results) if GPU else checks_table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if not all(record["good"] for record in results["checks"]):
        raise SystemExit("A kernel does not agree with its reference.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
