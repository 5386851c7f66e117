"""What every command shares: the app, its options, loading, printing and writing."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .. import DSparkHead, __version__
from ..checkpoints.files import check_source
from ..embedded import FOLDER, embedded_pair
from ..evaluation.baselines import Others
from ..heads import head_of

app = typer.Typer(
    help="DSpark speculative decoding for transformers: faster generate, same tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# What is printed holds names, paths and errors, in which brackets are brackets: styles are arguments, not markup.
console, errors = (Console(stderr=stderr, markup=False, highlight=False) for stderr in (False, True))

# Seconds from one line of progress to the next, where no terminal shows it in place.
PROGRESS_EVERY = 10.0

# The target that ships with the package.
EMBEDDED = FOLDER / "target"

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


def output_file(name: str, help: str):
    """An option for a file to write. Its folder is made at once: where that fails, no work has been done in vain."""
    return typer.Option(name, help=help, dir_okay=False, callback=_with_folder)


def _with_folder(path: Path | None) -> Path | None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _folder_of_embedded(model: str | None) -> str | None:
    return str(EMBEDDED) if model == "embedded" else model


def is_embedded(model: str | None) -> bool:
    """Whether --model means the target of the package: it was left out, or named."""
    return model in (None, str(EMBEDDED))


def target_option(help: str):
    """The option --model, where a Hub id or a folder is looked for."""
    text = f"Target: a Hub id, a folder, or `embedded` for the one in the package. {help}"
    return typer.Option(help=text.strip(), callback=_folder_of_embedded)


Model = Annotated[str | None, target_option("Default: the embedded pair.")]
Head = Annotated[str | None, typer.Option(help="Draft head for --model: a Hub id or a folder. Default: a known one.")]
Dtype = Annotated[str, typer.Option(help=f"dtype of target and head: {', '.join(DTYPES)}. auto: as stored.")]
Prompts = Annotated[Path | None, typer.Option(help="JSON lines with turns, prompt or question, or a prompt a line.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts only.")]
DraftWindow = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens of the context that the head sees and keeps. Default: as its generation_config says."
    ),
]
Assistant = Annotated[
    str | None, typer.Option(help="Baseline: a small model that drafts in transformers' assisted loop.")
]
BaselineHead = Annotated[
    str | None, typer.Option(help="Baseline: another draft head for --model, of DFlash for instance.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dspark-hf {__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


def load(model: str | None, head: str | None, dtype: str, needs_head: bool = True):
    """Target, head (`None` where it is not needed and not given) and tokenizer.

    Raises:
        ValueError, OSError: for a dtype, folder or id that there is not; before a model is loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if model is None and head is not None:
        raise ValueError(f"--head {head} needs --model; of a head for the embedded target, --model embedded.")
    if head is None and is_embedded(model):
        return embedded_pair(dtype=dtype, device=device)
    for source in (model, head):
        if source is not None:
            check_source(source)
    if head is None and needs_head:
        head = head_of(model)
        note(f"head: {head}")
    # Not by `device_map`, which needs accelerate.
    target = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)
    loaded = DSparkHead.from_pretrained(head, dtype=dtype).eval().to(device) if head else None
    return target, loaded, AutoTokenizer.from_pretrained(model)


def set_window(head: DSparkHead, window: int | None) -> None:
    """Let a head keep so many tokens of the context, or as many as it is set to where nothing is said."""
    if window is not None:
        head.generation_config.draft_window = window


def load_others(target: PreTrainedModel, assistant: str | None, baseline_head: str | None) -> Others:
    """What `--assistant` and `--baseline-head` name, where the target is and in its dtype."""
    for source in filter(None, (assistant, baseline_head)):
        check_source(source)
    model = AutoModelForCausalLM.from_pretrained(assistant, dtype=target.dtype) if assistant else None
    head = DSparkHead.from_pretrained(baseline_head, dtype=target.dtype) if baseline_head else None
    return Others(*(one and one.eval().to(target.device) for one in (model, head)))


def say(text: str, style: str | None = None) -> None:
    """Print a line that no narrow terminal breaks inside an id or a path."""
    console.print(text, style=style, soft_wrap=True)


def note(text: str) -> None:
    """`say` on standard error, for what is no result."""
    errors.print(text, style="dim", soft_wrap=True)


@contextmanager
def progress(doing: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[str], None]]:
    """Shows on standard error what is being done, and how far it is: what the function that it gives is called with.

    A terminal shows the last of it in place; elsewhere it becomes plain lines, one in ten seconds at most.
    """
    if errors.is_terminal and not errors.is_dumb_terminal:
        with errors.status(Text(doing)) as status:
            yield lambda text: status.update(Text(text))
        return
    note(doing)
    shown = clock()

    def report(text: str) -> None:
        nonlocal shown
        if clock() - shown >= PROGRESS_EVERY:
            note(text)
            shown = clock()

    yield report


def show(table: Table) -> None:
    """Print a table with every cell in one line: what a narrow terminal cuts or breaks cannot be copied."""
    table.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.print(table, crop=False)


def write_json(path: Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def entries(option: str, text: str) -> list[str]:
    """The entries of a comma-separated option.

    Raises:
        ValueError: for an empty one.
    """
    found = [entry.strip() for entry in text.split(",")]
    if not all(found):
        raise ValueError(f"{option} {text!r} has an empty entry: expected a comma-separated list.")
    return found


def counts(option: str, text: str) -> list[int]:
    """The numbers, from 1 up, of a comma-separated option.

    Raises:
        ValueError: for anything else.
    """
    found = entries(option, text)
    wrong = next((entry for entry in found if not (entry.isascii() and entry.isdigit() and int(entry))), None)
    if wrong is not None:
        raise ValueError(f"{option} {text}: {wrong!r} is no number from 1 up; expected some such as 1,4,16.")
    return [int(entry) for entry in found]
