"""What a head is."""

import json
from typing import Annotated

import typer

from .common import app, show, target_option


@app.command()
def inspect(
    head: Annotated[str, typer.Argument(help="A Hub id or a folder.")],
    model: Annotated[str | None, target_option("It is looked at beside the head.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Say what a head is: who trained it, for what, its parts and its memory. Weights are not loaded."""
    from ..hub import inspection

    found = inspection.inspect_head(head, model)
    if as_json:
        typer.echo(json.dumps(inspection.as_json(found), indent=2))
    else:
        show(inspection.as_table(found))
