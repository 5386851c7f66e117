"""A head in the layout of another trainer."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM

from .. import DSparkHead
from ..checkpoints.files import check_source
from .common import app, say, target_option


class Layout(StrEnum):
    deepspec = "deepspec"
    speculators = "speculators"
    specforge = "specforge"
    modelopt = "modelopt"
    deepseek_v4 = "deepseek_v4"


@app.command()
def export(
    head: Annotated[str, typer.Argument(help="A Hub id or a folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.", metavar="DIR")],
    to: Annotated[Layout, typer.Option(help="Layout to write.")],
    model: Annotated[str | None, target_option("For layouts that hold copies of its tables.")] = None,
) -> None:
    """Write a head for an engine that reads another trainer's layout."""
    from ..checkpoints.export import export as write

    if model is not None:
        check_source(model)
    loaded = DSparkHead.from_pretrained(head, dtype="auto")
    target = None if model is None else AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tables = write(loaded, to.value, output, target)
    say(f"head written to {output} in the layout of {to.value}")
    for name, place in tables.items():
        say(f"{name}: {place}", style="dim")
