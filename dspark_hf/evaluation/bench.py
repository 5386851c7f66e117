"""Speed of decoding methods, measured alternately in one run on the same prompts."""

import copy
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
from rich import box
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.hook import stock_loop
from ..generation.stats import DSparkStats, synchronize
from ..modeling_dspark import DSparkHead
from .prompts import encode
from .report import cell

# Rounds of median polish; it mostly settles in three.
POLISHED = 10
# Of a median, over the median of absolute deviations and the root of the count, for normal deviations.
STANDARD_ERROR = 1.86
# The standard error of a speed, as a share of it, above which turns go on.
SURE = 0.01


@dataclass(frozen=True)
class Record:
    """One method at one batch size.

    domain: the set of prompts, where there are several. tokens_per_second: all tokens over all seconds, as in
        [`beside_each_other`], all rows together. noise: its standard error beside the other methods, a share of it.
    speedup: of tokens_per_second over plain's. tau: tokens a round of a row. verify_length: drafts verified a round of
    a row. draft_ms, schedule_ms, verify_ms: mean a round. ceiling: tau * T(1) / (T_verify + T_draft), the speed-up if
    everything but the two model passes were free, with T(1) plain's time a step. identical: whether all outputs
    equalled plain's. Fields that do not apply to a method are `None`.
    """

    method: str
    batch_size: int
    tokens_per_second: float
    noise: float
    domain: str | None = None
    speedup: float | None = None
    tau: float | None = None
    verify_length: float | None = None
    draft_ms: float | None = None
    schedule_ms: float | None = None
    verify_ms: float | None = None
    ceiling: float | None = None
    identical: bool | None = None


@dataclass(frozen=True)
class Run:
    """One method over one batch of prompts. tokens: of all rows, steps: of the longest. outputs: new tokens of every
    row. stats: where the method drafts with our loop."""

    seconds: float
    outputs: list[list[int]]
    stats: DSparkStats | None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def steps(self) -> int:
        return max(map(len, self.outputs))


# The runs of one method, by batch of prompts and turn.
Runs = list[list[Run]]


def bench(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_sizes: list[int],
    methods: list[str],
    max_new_tokens: int = 128,
    domain: str | None = None,
    runs: int = 3,
) -> Iterator[Record]:
    """Records of every batch size, as soon as it is measured. Decoding is greedy.

    A turn is one run of every method over a batch of prompts, in random order. After one that is not measured there are
    `runs` turns of every batch, and up to twice as many where a method's speed is not yet known within 1 %.

    Args:
        methods: `plain`; `stock`, transformers' own loop with the same head, at batch 1 only; `dspark`, the head as it
            is set; `load` and `fixed-1`, `fixed-2`, .., the head with that schedule.
    """
    known = ["plain", "stock", "dspark", "load", *fixed_methods(head)]
    unknown = set(methods) - set(known)
    if unknown:
        raise ValueError(f"Unknown methods {sorted(unknown)}; choose from {', '.join(known)}.")
    for size in batch_sizes:
        if not 1 <= size <= len(prompts):
            raise ValueError(f"Batch size {size} needs between 1 and {len(prompts)} prompts, the number given.")
        chosen = [method for method in methods if method != "stock" or size == 1]
        measured = _measure(model, head, tokenizer, prompts, size, chosen, max_new_tokens, runs)
        yield from _records(measured, size, domain)


def fixed_methods(head: DSparkHead) -> list[str]:
    """The methods that draft and verify the same number of positions every round."""
    return [f"fixed-{k}" for k in range(1, head.config.gamma + 1)]


def _measure(model, head, tokenizer, prompts, size, methods, max_new_tokens, turns) -> dict[str, Runs]:
    batches = [prompts[i : i + size] for i in range(0, len(prompts) - size + 1, size)]
    runs: dict[str, Runs] = {method: [] for method in methods}
    draw = random.Random(0)

    def run_all(inputs) -> dict[str, Run]:
        # What a run leaves in caches and memory helps or hinders the next, which must not always be the same one.
        order = draw.sample(methods, len(methods))
        return {method: _run(method, model, head, inputs, max_new_tokens) for method in order}

    for index, batch in enumerate(batches):
        inputs = encode(batch, tokenizer, model.device)
        if index == 0:
            # To warm up: step times are measured, and what a head is worth is learned.
            run_all(inputs)
        for of_method in runs.values():
            of_method.append([])
        present = [of_method[-1] for of_method in runs.values()]
        while not _is_settled(present, turns, len(batches)):
            for method, run in run_all(inputs).items():
                runs[method][-1].append(run)
    return runs


def _is_settled(runs: Runs, fewest: int, batches: int) -> bool:
    """Whether the runs [methods, turns] over one of so many batches say well enough how fast every method is, or are
    twice as many as the fewest."""
    count = len(runs[0])
    if count < fewest:
        return False
    if count == 2 * fewest:
        return True
    _, errors = _compared(runs)
    return errors.max() < SURE * batches**0.5


def _run(method: str, model, head, inputs, max_new_tokens: int) -> Run:
    kwargs = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    synchronize(model.device)
    started = time.perf_counter()
    if method == "plain":
        output = model.generate(**inputs, **kwargs)
    else:
        with stock_loop() if method == "stock" else schedule_of(head, method):
            output = model.generate(**inputs, assistant_model=head, **kwargs)
    synchronize(model.device)
    seconds = time.perf_counter() - started
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    outputs = [until_eos(row, model.generation_config.eos_token_id) for row in new]
    return Run(seconds, outputs, getattr(output, "dspark", None))


@contextmanager
def schedule_of(head: DSparkHead, method: str) -> Iterator[None]:
    """The head with the schedule of a method, or with `whole` blocks drafted and verified; as it was afterwards."""
    before = head.generation_config
    head.generation_config = copy.deepcopy(before)
    if method == "load":
        head.generation_config.update(num_assistant_tokens_schedule="load", num_assistant_tokens=None)
    elif method.startswith("fixed-"):
        length = int(method.removeprefix("fixed-"))
        head.generation_config.update(num_assistant_tokens_schedule="constant", num_assistant_tokens=length)
    elif method == "whole":
        names = ("num_assistant_tokens", "assistant_confidence_threshold")
        head.generation_config.update(num_assistant_tokens_schedule="constant", **dict.fromkeys(names))
    try:
        yield
    finally:
        head.generation_config = before


def _records(measured: dict[str, Runs], size: int, domain: str | None) -> Iterator[Record]:
    compared = [_compared(runs) for runs in zip(*measured.values(), strict=True)]
    # [batches, methods]
    seconds, errors = (np.array(of_batches) for of_batches in zip(*compared, strict=True))
    noise = ((seconds * errors) ** 2).sum(axis=0) ** 0.5 / seconds.sum(axis=0)
    tokens = [sum(np.mean([run.tokens for run in own]) for own in runs) for runs in measured.values()]
    speeds = dict(zip(measured, tokens / seconds.sum(axis=0), strict=True))
    plain = measured.get("plain")
    of_plain = sum(plain or [], [])
    for index, (method, runs) in enumerate(measured.items()):
        fields, every = {}, sum(runs, [])
        if plain:
            same = all(run.outputs == right[0].outputs for own, right in zip(runs, plain, strict=True) for run in own)
            fields = {"speedup": float(speeds[method] / speeds["plain"]), "identical": same}
        if every[0].stats is not None:
            fields |= _round_times([run.stats for run in every])
            if plain:
                step_ms = 1000 * sum(run.seconds for run in of_plain) / sum(run.steps for run in of_plain)
                fields["ceiling"] = fields["tau"] * step_ms / (fields["draft_ms"] + fields["verify_ms"])
        yield Record(method, size, float(speeds[method]), float(noise[index]), domain, **fields)


def beside_each_other(seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each method takes beside the others, from the seconds [turns, methods] of its runs.

    Other work on a machine slows a single run or, for minutes, all of them. Tukey's median polish takes out both: the
    logarithm of a run's seconds is that of its turn, plus that of its method, plus a rest whose medians over turns and
    over methods are zero.

    Returns:
        [methods] seconds, at the pace of the median turn; [methods] standard errors of their logarithms, by the median
        of the rests' absolute values.
    """
    times, method = np.log(seconds), np.zeros(seconds.shape[1])
    for _ in range(POLISHED):
        turn = np.median(times - method, axis=1, keepdims=True)
        method = np.median(times - turn, axis=0)
    errors = STANDARD_ERROR * np.median(np.abs(times - turn - method), axis=0) / len(seconds) ** 0.5
    return np.exp(np.median(turn) + method), errors


def _compared(runs: Iterable[list[Run]]) -> tuple[np.ndarray, np.ndarray]:
    """The runs [methods, turns] over one batch beside each other."""
    return beside_each_other(np.array([[run.seconds for run in own] for own in runs]).T)


def _round_times(stats: list[DSparkStats]) -> dict[str, float]:
    rounds = sum(s.rounds for s in stats)
    lengths = [length for s in stats for row in s.accepted_lengths for length in row]
    return {
        "tau": sum(lengths) / len(lengths),
        "verify_length": sum(sum(s.verified) for s in stats) / len(lengths),
        "draft_ms": 1000 * sum(s.draft_seconds for s in stats) / rounds,
        "schedule_ms": 1000 * sum(s.schedule_seconds for s in stats) / rounds,
        "verify_ms": 1000 * sum(s.verify_seconds for s in stats) / rounds,
    }


def until_eos(row: list[int], eos_token_id: int | list[int] | None) -> list[int]:
    """The tokens of a row up to its first end-of-sequence token, that token included."""
    ids = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    end = next((i + 1 for i, token in enumerate(row) if token in ids), len(row))
    return row[:end]


def as_table(records: list[Record]) -> Table:
    """The records as people read them."""
    table = Table(
        title="greedy decoding, methods measured alternately",
        caption="of it: share of the ceiling that was reached. same: whether all tokens equal plain's.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = ("batch", "tok/s", "speed up", "tau", "draft ms", "verify ms", "ceiling", "of it", "same")
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for r in records:
        share = r.speedup / r.ceiling if r.ceiling else None
        same = {None: "-", True: "yes", False: "NO"}[r.identical]
        table.add_row(
            r.method,
            str(r.batch_size),
            f"{r.tokens_per_second:.1f}",
            cell(r.speedup, "{:.2f}x"),
            cell(r.tau, "{:.2f}"),
            cell(r.draft_ms, "{:.1f}"),
            cell(r.verify_ms, "{:.1f}"),
            cell(r.ceiling, "{:.2f}x"),
            cell(share, "{:.0%}"),
            same,
        )
    return table


def as_json(records: list[Record]) -> list[dict]:
    """The records as machines read them."""
    return [asdict(record) for record in records]
