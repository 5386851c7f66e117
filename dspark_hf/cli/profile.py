"""Step times of this machine."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Dtype, Head, Model, app, console, load, output_file, say, show, write_json


@app.command()
def profile(
    model: Model = None,
    head: Head = None,
    rows: Annotated[int, typer.Option(min=1, help="Largest batch to look at.")] = 32,
    again: Annotated[bool, typer.Option("--again", help="Measure anew instead of showing what is stored.")] = False,
    plot: Annotated[Path | None, output_file("--plot", help="Picture of the step times, such as profile.png.")] = None,
    json_file: Annotated[Path | None, output_file("--json", help="Also write the times to this file.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Show what a step costs on this machine, which is what the load schedule goes by; measured if it is not stored."""
    from ..evaluation import profile as shown
    from ..evaluation.plots import check_picture
    from ..generation.step_times import forget, prepare
    from ..generation.target import Target

    if plot is not None:
        check_picture(plot)
    target, draft_head, _ = load(model, head, dtype)
    if again:
        forget(Target(target, draft_head.config.target_layer_ids), draft_head)
    with console.status("measuring what is not stored"):
        table = prepare(target, draft_head, rows)
    for part in shown.as_tables(table):
        show(part)
    say(f"{table.identity['device']}, {target.dtype}, stored in {table.path}", style="dim")
    if plot is not None:
        shown.plot(table, plot)
    if json_file is not None:
        write_json(json_file, shown.as_json(table))
