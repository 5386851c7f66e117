"""Step times of this machine."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Dtype, Head, Model, app, console, load, write_json


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
    from ..evaluation import profile as shown
    from ..evaluation.plots import import_pyplot
    from ..generation.step_times import forget, prepare
    from ..generation.target import Target

    if plot is not None:
        import_pyplot()
    target, draft_head, _ = load(model, head, dtype)
    if again:
        forget(Target(target, draft_head.config.target_layer_ids), draft_head)
    with console.status("measuring what is not stored"):
        table = prepare(target, draft_head, rows)
    for part in shown.as_tables(table):
        console.print(part)
    console.print(f"[dim]{table.identity['device']}, {target.dtype}, stored in {table.path}[/dim]", highlight=False)
    if plot is not None:
        shown.plot(table, plot)
    if json_file is not None:
        write_json(json_file, shown.as_json(table))
