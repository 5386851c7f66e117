"""Published heads."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ..hub.registry import PublishedHead, search
from .common import app, say


@app.command()
def heads(
    model: Annotated[str | None, typer.Argument(help="Only the heads of this target, an id or a part of it.")] = None,
    trainer: Annotated[str | None, typer.Option(help="Only the heads of this trainer, or a part of the name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the published heads that are known, for each target the one to prefer first."""
    listed = search(model, trainer)
    if as_json:
        typer.echo(json.dumps([asdict(head) for head in listed], indent=2))
        return
    if not listed:
        by = f" by {trainer}" if trainer else ""
        say(f"No published head{by} is known{f' for {model}' if model else ''}.")
        raise typer.Exit(1)
    for target in dict.fromkeys(head.target for head in listed):
        say(target, style="bold")
        for head in (head for head in listed if head.target == target):
            say(f"  {head.head}  ({', '.join(facts_of(head))})")


def facts_of(head: PublishedHead) -> list[str]:
    """What is known of a head, beside its target."""
    known = {
        "block size": head.block_size,
        "taps": head.taps and " ".join(map(str, head.taps)),
        "layout": head.dialect,
        "by": head.source,
        "licence": head.licence,
        "seen on its": head.seen if head.seen == "card" else None,
    }
    return [head.method, *(f"{name} {value}" for name, value in known.items() if value)]
