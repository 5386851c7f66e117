"""Published heads."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from ..registry import heads_for, published_heads
from .common import app, console


@app.command()
def heads(
    model: Annotated[str | None, typer.Argument(help="Only the heads of this target.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the published heads that are known, for each target the one to prefer first."""
    listed = published_heads() if model is None else heads_for(model)
    if as_json:
        typer.echo(json.dumps([asdict(head) for head in listed], indent=2))
        return
    if not listed:
        console.print(f"No published head is known for {model}.", highlight=False)
        raise typer.Exit(1)
    table = Table(box=None)
    for name in ("target", "head", "method", "block size", "layout", "trained by"):
        table.add_column(name, overflow="fold")
    for head in listed:
        size = "" if head.block_size is None else str(head.block_size)
        table.add_row(head.target, head.head, head.method, size, head.dialect, head.source)
    console.print(table, highlight=False)
