"""The demo in a browser."""

from typing import Annotated

import typer

from .common import Head, Model, app, load


@app.command()
def demo(
    model: Model = None,
    head: Head = None,
    share: Annotated[bool, typer.Option("--share", help="Also make a public link, through Gradio's servers.")] = False,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
) -> None:
    """Watch the speed-up in a browser: a race, a chat, the inside of a round, and load."""
    from ..demo import app as page

    given = load(model, head, "auto") if model or head else ()
    page.launch(page.build(*given), share=share, server_port=port)
