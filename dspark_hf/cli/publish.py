"""Publishing a head, and its card."""

from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

from .. import DSparkHead
from ..hub.licenses import License
from .common import app, output_file, say

Target = Annotated[
    str | None, typer.Option("--model", help="Hub id of the target, no folder. Default: the one in the results.")
]
Results = Annotated[Path | None, typer.Option(help="What dspark-hf eval --results wrote.")]
LicenseId = Annotated[str | None, typer.Option(help="Licence of the head as the Hub spells it, such as mit, or other.")]
LicenseName = Annotated[str | None, typer.Option(help="Name of the licence, with --license other.")]
LicenseLink = Annotated[
    str | None, typer.Option(help="Address of the licence, or LICENSE in the head's folder, with --license other.")
]


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of the head.")],
    repo: Annotated[str, typer.Option(help="Hub repository: USER/NAME.")],
    model: Target = None,
    results: Results = None,
    license: LicenseId = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    private: Annotated[bool, typer.Option("--private", help="A private repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the repository to --output, upload nothing.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for --dry-run.")] = None,
) -> None:
    """Upload a head with its card and what `custom_generate` needs, in one commit; may be repeated.

    The token is that of `hf auth login`.
    """
    from ..hub.publishing import build
    from ..hub.publishing import publish as upload

    logging.disable_progress_bar()
    if dry_run != (output is not None):
        raise ValueError("--dry-run and --output DIR go together: the one writes the repository into the other.")
    licensed = _license(license, license_name, license_link)
    if dry_run:
        say(build(folder, repo, output, model, results, licensed))
        say(f"repository written to {output}; nothing was uploaded")
        return
    checked, address = upload(folder, repo, model, results, licensed, private)
    say(checked)
    say(f"published: {address}")


@app.command()
def card(
    head: Annotated[str, typer.Argument(help="Head: a Hub id or a folder.")],
    results: Results = None,
    model: Target = None,
    repo: Annotated[str | None, typer.Option(help="Hub id that the card names, where HEAD is a folder.")] = None,
    license: LicenseId = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    output: Annotated[Path | None, output_file("--output", help="File for the card. Default: print it.")] = None,
) -> None:
    """Write the model card of a head from its config and the results of an evaluation."""
    from ..evaluation.results import check_results, read_results
    from ..hub.cards import card_of, render

    logging.disable_progress_bar()
    licensed = _license(license, license_name, license_link)
    found = read_results(results) if results is not None else None
    loaded = DSparkHead.from_pretrained(head, dtype="auto")
    if found is not None:
        check_results(found, loaded, head)
        model = model or found["target"]
    if repo is None and Path(head).is_dir():
        raise ValueError(f"{head} is a folder: give --repo USER/NAME, the Hub id that the card should name.")
    if model is None:
        raise ValueError("Give --model, the Hub id of the target, or --results, which name it.")
    text = str(render(card_of(loaded, repo or head, model, own=repo is not None, results=found, license=licensed)))
    if output is None:
        typer.echo(text)
    else:
        output.write_text(text, encoding="utf-8")
        say(f"card written to {output}")


def _license(identifier: str | None, name: str | None, link: str | None) -> License | None:
    if identifier is None and (name or link):
        raise ValueError("--license-name and --license-link go with --license other.")
    return None if identifier is None else License(identifier, name, link)
