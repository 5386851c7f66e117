"""The `dspark-hf` command."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from . import DSparkConfig, DSparkHead
from .embedded import embedded_pair
from .evaluation.prompts import DOMAINS, domain_prompts, encode, read_prompts, sampling

app = typer.Typer(
    help="DSpark speculative decoding for transformers: faster generate, same tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console, errors = Console(), Console(stderr=True)

Model = Annotated[str | None, typer.Option(help="Target: a Hub id or a folder. Default: the embedded pair.")]
Head = Annotated[str | None, typer.Option(help="Draft head for --model: a Hub id or a folder.")]
Dtype = Annotated[str, typer.Option(help="dtype of target and head, such as float32 or bfloat16; auto: as stored.")]
Prompts = Annotated[Path | None, typer.Option(help="JSON lines with turns, prompt or question, or a prompt a line.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts only.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]


def main() -> None:
    """Run the command; errors that users can mend are shown without a stack trace."""
    try:
        app()
    except (ValueError, OSError) as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer or continue.")],
    model: Model = None,
    head: Head = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy decoding.")] = 0.0,
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Decode without the head, to compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    dtype: Dtype = "auto",
) -> None:
    """Generate text, streamed as it is committed, and say how fast that was."""
    target, draft_head, tokenizer = _load(model, head, dtype, needs_head=not no_draft)
    inputs = encode([prompt], tokenizer, target.device)
    kwargs = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True} | sampling(temperature)
    if not no_draft:
        kwargs["assistant_model"] = draft_head
    if not as_json:
        kwargs["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    output = target.generate(**inputs, **kwargs)
    seconds = time.perf_counter() - started
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    tau = None if no_draft else output.dspark.tau
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        record = {"text": text, "tokens": len(new), "seconds": seconds, "tokens_per_second": len(new) / seconds}
        typer.echo(json.dumps(record | {"tau": tau}))
        return
    summary = f"{len(new)} tokens in {seconds:.2f} s: {len(new) / seconds:.1f} tokens/s"
    rounds = "without a draft head" if no_draft else f"tau {tau:.2f} tokens a round, {output.dspark.rounds} rounds"
    console.print(f"[dim]{summary}, {rounds}[/dim]", highlight=False)


@app.command()
def bench(
    model: Model = None,
    head: Head = None,
    prompts: Prompts = None,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4",
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated: plain, stock, dspark (the head as it is set), load, fixed-1 and so on."),
    ] = "plain,stock,dspark",
    sweep_batch: Annotated[
        str | None,
        typer.Option(
            help="Batch sizes at which plain, every fixed length and load are compared, instead of the above."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the sweep, such as sweep.png.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    limit: Limit = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the records to this file.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure plain decoding, transformers' stock assisted loop and DSpark on the same prompts, alternately.

    A sweep without --prompts takes 64 problems of GSM8K and 64 beginnings of Python source.
    """
    from .evaluation import bench as speed
    from .evaluation import sweep
    from .evaluation.plots import import_pyplot

    if plot is not None:
        if sweep_batch is None:
            raise ValueError(f"--plot {plot} shows a sweep: give --sweep-batch too.")
        import_pyplot()
    sizes = _numbers(sweep_batch or batch_sizes)
    texts = read_prompts(prompts)[:limit]
    target, draft_head, tokenizer = _load(model, head, dtype)
    if sweep_batch is None:
        tables, names = speed, methods.split(",")
        measured = speed.bench(target, draft_head, tokenizer, texts, sizes, names, max_new_tokens)
        sets = f"{len(texts)} prompts"
    else:
        given = {prompts.stem: texts} if prompts else {name: domain_prompts(name)[:limit] for name in DOMAINS}
        tables, sets = sweep, ", ".join(given)
        measured = sweep.sweep(target, draft_head, tokenizer, given, sizes, max_new_tokens)
    records = []
    with console.status("measuring") as status:
        for record in measured:
            records.append(record)
            status.update(f"measured {record.domain or ''} {record.method} at batch {record.batch_size}")
    console.print(tables.as_table(records))
    device = torch.cuda.get_device_name() if target.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console.print(f"[dim]{sets}, {max_new_tokens} new tokens, {target.dtype}, {device}[/dim]", highlight=False)
    if plot is not None:
        sweep.plot(records, plot)
    if json_file is not None:
        _write_json(json_file, speed.as_json(records))


@app.command()
def verify(
    model: Model = None,
    head: Head = None,
    prompts: Prompts = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    max_new_tokens: MaxNewTokens = 128,
    limit: Limit = None,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Audit sampling at temperature 1 instead of greedy decoding.")
    ] = False,
    draws: Annotated[int, typer.Option(min=1, help="Continuations to sample with --sampling.")] = 2000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the findings to this file.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Audit losslessness: the tokens with the head against the target's own. Exit status 1 when it is BROKEN.

    Whole blocks are drafted and verified, whatever they cost. float32 is the sharper audit: what rounding can explain
    shrinks with the dtype.
    """
    from .evaluation.verify import BROKEN

    texts = read_prompts(prompts)[:limit]
    target, draft_head, tokenizer = _load(model, head, dtype)
    # A schedule that saw no gain in drafts would leave nothing to audit.
    draft_head.generation_config.num_assistant_tokens_schedule = "constant"
    if sampling:
        findings = _verify_sampling(target, draft_head, tokenizer, texts, batch_size, draws)
    else:
        findings = _verify_greedy(target, draft_head, tokenizer, texts, batch_size, max_new_tokens)
    if json_file is not None:
        findings |= {"batch_size": batch_size, "dtype": str(target.dtype)}
        _write_json(json_file, findings)
    broken = findings["verdict"] == BROKEN
    console.print(f"verdict: [{'red' if broken else 'green'}]{findings['verdict']}[/]", highlight=False)
    if broken:
        raise typer.Exit(1)


@app.command()
def profile(
    model: Model = None,
    head: Head = None,
    rows: Annotated[int, typer.Option(min=1, help="Largest batch to look at.")] = 32,
    again: Annotated[bool, typer.Option("--again", help="Measure anew instead of showing what is stored.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture of the step times, such as profile.png.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the times to this file.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Show what a step costs on this machine, which is what the load schedule goes by; measured if it is not stored."""
    from .evaluation import profile as shown
    from .evaluation.plots import import_pyplot
    from .generation.step_times import forget, step_times
    from .generation.target import Target

    if plot is not None:
        import_pyplot()
    target, draft_head, _ = _load(model, head, dtype)
    runner = Target(target, draft_head.config.target_layer_ids)
    if again:
        forget(runner, draft_head)
    with console.status("measuring what is not stored"):
        table = step_times(runner, draft_head, rows)
    for part in shown.as_tables(table):
        console.print(part)
    console.print(f"[dim]{table.identity['device']}, {target.dtype}, stored in {table.path}[/dim]", highlight=False)
    if plot is not None:
        shown.plot(table, plot)
    if json_file is not None:
        _write_json(json_file, shown.as_json(table))


@app.command()
def calibrate(
    model: Model = None,
    head: Head = None,
    prompts: Prompts = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the calibrated head. Default: --head itself, when it is a folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 16,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Of decoding; 0 is greedy.")] = 0.0,
    limit: Limit = None,
    plot: Annotated[Path | None, typer.Option(help="Reliability diagram, such as reliability.png.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Fit the temperatures and shifts of a head's confidence and write them into its config.

    Half of the prompts are for fitting, the other half for the report. Without --prompts the sets of the sweep are
    taken; a head should be calibrated on what it will be used for.
    """
    from .evaluation import calibrate as calibration
    from .evaluation.plots import import_pyplot

    if plot is not None:
        import_pyplot()
    if output is None and head is not None and not Path(head).is_dir():
        raise ValueError(f"--head {head} is not a folder to write into: give --output.")
    texts = read_prompts(prompts) if prompts else [p for name in DOMAINS for p in domain_prompts(name)]
    texts = texts[:limit]
    target, draft_head, tokenizer = _load(model, head, dtype)
    with console.status("drafting") as status:
        for found in calibration.calibrate(
            target, draft_head, tokenizer, texts, batch_size, max_new_tokens, temperature
        ):
            status.update(f"drafted for {found} of {len(texts)} prompts")
    console.print(calibration.as_table(found))
    draft_head.config.update({"confidence_temperatures": found.temperatures, "confidence_shifts": found.shifts})
    if output is not None:
        draft_head.save_pretrained(output)
        console.print(f"head written to {output}")
    elif head is not None:
        draft_head.config.save_pretrained(head)
        console.print(f"temperatures written to {Path(head) / 'config.json'}")
    else:
        console.print("the embedded head is left as it is: give --output to write a calibrated copy")
    if plot is not None:
        calibration.plot(found, plot)
    if json_file is not None:
        _write_json(json_file, calibration.as_json(found))


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Target: a Hub id or a folder. It stays frozen.")],
    data: Annotated[str, typer.Option(help="A .jsonl or .parquet file, or a Hub data set.")],
    output: Annotated[Path, typer.Option(help="Folder for the head, its log and its checkpoints.")],
    head: Annotated[str | None, typer.Option(help="Go on from this head instead of a fresh one.")] = None,
    block_size: Annotated[int, typer.Option(min=1)] = 7,
    layers: Annotated[int, typer.Option(min=1, help="Draft layers.")] = 5,
    markov_rank: Annotated[int, typer.Option(min=0, help="0: no sequential head.")] = 256,
    markov_head: Annotated[str, typer.Option(help="vanilla, gated or rnn.")] = "vanilla",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step and process.")] = 16,
    learning_rate: float = 6e-4,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the backbone's matrices.")] = "adamw",
    ce_weight: Annotated[float, typer.Option(help="Weight of the cross entropy; more helps short runs.")] = 0.1,
    anchors: Annotated[int, typer.Option(min=1, help="Blocks a sequence.")] = 512,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 4096,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --output.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "bf16",
    seed: int = 0,
) -> None:
    """Train a head. Best on text that the target itself wrote (see examples/embedded_pair)."""
    from accelerate import Accelerator

    from .training.data import load_rows
    from .training.trainer import TrainingArguments
    from .training.trainer import train as run
    from .training.warm_start import warm_start

    target = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(seed)
    if head is not None:
        draft_head = DSparkHead.from_pretrained(head, dtype=torch.float32)
    else:
        config = DSparkConfig.from_target(
            target.config,
            block_size=block_size,
            num_hidden_layers=layers,
            markov_rank=markov_rank,
            markov_head_type=markov_head,
            mask_token_id=_mask_token(tokenizer, target.config.get_text_config(decoder=True).vocab_size),
            dtype=torch.float32,
        )
        draft_head = DSparkHead(config)
        copied = warm_start(draft_head, target)
        if copied:
            console.print(f"draft layers start from the target's layers {copied}", highlight=False)
    rows = load_rows(data, tokenizer, max_length)
    args = TrainingArguments(
        output=output,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        ce_weight=ce_weight,
        anchors_per_sequence=anchors,
        save_every=save_every,
        seed=seed,
    )
    console.print(f"{len(rows)} sequences, {draft_head.num_parameters():,} parameters in the head", highlight=False)
    run(draft_head, target, rows, args, Accelerator(mixed_precision=mixed_precision), resume)
    console.print(f"head written to {output}")


def _verify_greedy(target, draft_head, tokenizer, texts: list[str], batch_size: int, max_new_tokens: int) -> dict:
    """The greedy audit, shown; its findings."""
    from .evaluation.verify import as_table, audit_greedy, greedy_as_json

    rows = []
    with console.status("verifying") as status:
        for row in audit_greedy(target, draft_head, tokenizer, texts, batch_size, max_new_tokens):
            rows.append(row)
            status.update(f"verified {len(rows)} of {len(texts)} prompts")
    findings = greedy_as_json(rows)
    differing = len(findings["differences"])
    if differing:
        console.print(as_table(rows, tokenizer))
    counts = f"{len(rows) - differing} of {len(rows)} prompts identical, {findings['tokens']} tokens"
    console.print(f"[dim]{counts}, batches of {batch_size}, {target.dtype}[/dim]", highlight=False)
    return findings


def _verify_sampling(target, draft_head, tokenizer, texts: list[str], batch_size: int, draws: int) -> dict:
    """The sampling audit, shown; its findings."""
    from .evaluation.verify import audit_sampling, draw, sampling_as_json

    drawn = []
    with console.status("drawing") as status:
        for batch in draw(target, draft_head, tokenizer, texts, batch_size, draws):
            drawn += batch
            status.update(f"drew {len(drawn)} of {draws} continuations")
        status.update("comparing with the target's distribution")
        audit = audit_sampling(target, tokenizer, texts, drawn, batch_size)
    test = f"chi-square {audit.statistic:.1f} at {audit.degrees_of_freedom} degrees of freedom"
    console.print(f"[dim]{audit.draws} draws, {target.dtype}: {test}, p = {audit.p_value:.2g}[/dim]", highlight=False)
    return sampling_as_json(audit)


def _load(model: str | None, head: str | None, dtype: str, needs_head: bool = True):
    """Target, head (`None` where it is not needed and not given) and tokenizer."""
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else None
    if model is None:
        if head is not None:
            raise ValueError(f"--head {head} needs --model: the embedded target has its own head.")
        return embedded_pair(dtype=dtype, device=device)
    if head is None and needs_head:
        raise ValueError(f"--model {model} needs --head, the draft head trained for it (or --no-draft).")
    target = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device).eval()
    loaded = DSparkHead.from_pretrained(head, dtype=dtype, device_map=device).eval() if head else None
    return target, loaded, AutoTokenizer.from_pretrained(model)


def _mask_token(tokenizer, vocab_size: int) -> int | None:
    """The tokenizer's mask token, or the first row of the target's embedding that no token uses."""
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    return len(tokenizer) if len(tokenizer) < vocab_size else None


def _write_json(path: Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected comma-separated numbers such as 1,4,16, got {text!r}.") from None
