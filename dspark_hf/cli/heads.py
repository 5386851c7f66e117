"""Published heads."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ..hub.registry import heads_for, published_heads
from .common import app, say


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
        say(f"No published head is known for {model}.")
        raise typer.Exit(1)
    for target in dict.fromkeys(head.target for head in listed):
        say(target, style="bold")
        for head in (head for head in listed if head.target == target):
            size = f"block size {head.block_size}, " if head.block_size else ""
            say(f"  {head.head}  ({head.method}, {size}layout {head.dialect}, by {head.source})")
