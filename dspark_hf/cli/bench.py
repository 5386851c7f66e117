"""Speed, measured side by side."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..evaluation.prompts import DOMAINS, domain_prompts, read_prompts
from .common import (
    Dtype,
    Head,
    Limit,
    MaxNewTokens,
    Model,
    Prompts,
    app,
    console,
    counts,
    entries,
    load,
    output_file,
    say,
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
        typer.Option(help="Comma-separated: plain, stock, dspark (the head as it is set), load, fixed-1 and so on."),
    ] = "plain,stock,dspark",
    sweep_batch: Annotated[
        str | None,
        typer.Option(
            help="Batch sizes at which plain, every fixed length and load are compared, instead of the above."
        ),
    ] = None,
    plot: Annotated[Path | None, output_file("--plot", help="Picture of the sweep, such as sweep.png.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    limit: Limit = None,
    json_file: Annotated[
        Path | None, output_file("--json", help="Also write the records to this file, as they come.")
    ] = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure plain decoding, transformers' stock assisted loop and DSpark on the same prompts, alternately.

    A sweep without --prompts takes 64 problems of GSM8K and 64 beginnings of Python source.
    """
    from ..evaluation import bench as speed
    from ..evaluation import sweep
    from ..evaluation.plots import check_picture
    from ..evaluation.report import device_name

    if plot is not None:
        if sweep_batch is None:
            raise ValueError(f"--plot {plot} shows a sweep: give --sweep-batch too.")
        check_picture(plot)
    names = entries("--methods", methods)
    sizes = counts("--batch-sizes", batch_sizes) if sweep_batch is None else counts("--sweep-batch", sweep_batch)
    texts = read_prompts(prompts)[:limit]
    target, draft_head, tokenizer = load(model, head, dtype)
    if sweep_batch is None:
        tables = speed
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
            if json_file is not None:
                # What is measured is kept, should the rest be cut off.
                write_json(json_file, speed.as_json(records))
            status.update(escape(f"measured {record.domain or ''} {record.method} at batch {record.batch_size}"))
    show(tables.as_table(records))
    say(f"{sets}, {max_new_tokens} new tokens, {target.dtype}, {device_name(target.device)}", style="dim")
    if plot is not None:
        sweep.plot(records, plot)
