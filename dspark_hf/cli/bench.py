"""Speed, measured side by side."""

from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.prompts import DOMAINS, domain_prompts, read_prompts
from .common import (
    Assistant,
    BaselineHead,
    DraftWindow,
    Dtype,
    Head,
    Limit,
    MaxNewTokens,
    Model,
    Prompts,
    app,
    counts,
    entries,
    load,
    load_others,
    note,
    output_file,
    progress,
    say,
    set_window,
    show,
    write_json,
)


@app.command()
def bench(
    model: Model = None,
    head: Head = None,
    prompts: Prompts = None,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4",
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: plain, stock, dspark (the head as it is set), load, fixed-1 and so on; mtp (the "
            "target's own layers for it), lookup (n-grams of the text)."
        ),
    ] = "plain,stock,dspark",
    assistant: Assistant = None,
    baseline_head: BaselineHead = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Also measure plain, stock and dspark with static caches and compiled passes. Compiling comes before "
            "the time limit.",
        ),
    ] = False,
    sweep_batch: Annotated[
        str | None,
        typer.Option(
            help="Batch sizes at which plain, every fixed length and load are compared, instead of the above."
        ),
    ] = None,
    plot: Annotated[Path | None, output_file("--plot", help="Picture of the sweep, such as sweep.png.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    draft_window: DraftWindow = None,
    limit: Limit = 32,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Time limit: the turn under way is finished and what is measured is shown. "
            "Default: 120, with --sweep-batch 1800.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, output_file("--json", help="Also write the records to this file, as they come.")
    ] = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure plain decoding, transformers' stock assisted loop and DSpark on the same prompts, alternately; and other
    ways to draft, where they are named.

    A sweep without --prompts takes problems of GSM8K and beginnings of Python source, 64 of each with --limit 64.
    """
    from ..evaluation import bench as speed
    from ..evaluation import sweep
    from ..evaluation.plots import check_picture
    from ..evaluation.report import device_name

    if plot is not None:
        if sweep_batch is None:
            raise ValueError(f"--plot {plot} shows a sweep: give --sweep-batch too.")
        check_picture(plot)
    if compiled and sweep_batch is not None:
        raise ValueError("--compile adds methods to those of --batch-sizes: a --sweep-batch has its own.")
    names = entries("--methods", methods) + (speed.static_methods() if compiled else [])
    sizes = counts("--batch-sizes", batch_sizes) if sweep_batch is None else counts("--sweep-batch", sweep_batch)
    tables = speed if sweep_batch is None else sweep
    seconds = seconds or tables.SECONDS
    if sweep_batch is not None and prompts is None:
        sets = {name: domain_prompts(name) for name in DOMAINS}
    else:
        sets = {prompts.stem if prompts else "built in": read_prompts(prompts)}
    given = {name: texts[:limit] for name, texts in sets.items()}
    target, draft_head, tokenizer = load(model, head, dtype)
    if compiled:
        speed.check_compiler(target.device)
    set_window(draft_head, draft_window)
    others = load_others(target, assistant, baseline_head)
    if sweep_batch is None:
        [texts] = given.values()
        names += others.methods
        others.check(target, names)
        cells = speed.cells_of(draft_head, texts, sizes, names)
    else:
        cells = sweep.sweep_cells(draft_head, given, sizes)
    with progress("estimating how long it takes"):
        turn_seconds = speed.estimate(target, draft_head, tokenizer, cells, max_new_tokens)
    note(speed.expectation(cells, turn_seconds, seconds))
    records = []
    with progress("measuring") as report:
        limits = (turn_seconds, max_new_tokens, seconds, report)
        for record in speed.bench(target, draft_head, tokenizer, cells, *limits, others=others):
            records.append(record)
            if json_file is not None:
                # What is measured is kept, should the rest be cut off.
                write_json(json_file, speed.as_json(records))
    show(tables.as_table(records))
    used = ", ".join(f"{len(texts)} of {len(sets[name])} prompts ({name})" for name, texts in given.items())
    say(f"{used}, {max_new_tokens} new tokens, {target.dtype}, {device_name(target.device)}", style="dim")
    if plot is not None:
        sweep.plot(records, plot)
