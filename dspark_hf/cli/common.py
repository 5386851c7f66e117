"""What every command shares: the app, its options, loading and writing."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .. import DSparkHead
from ..embedded import embedded_pair
from ..registry import head_for

app = typer.Typer(
    help="DSpark speculative decoding for transformers: faster generate, same tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console, errors = Console(), Console(stderr=True)

Model = Annotated[str | None, typer.Option(help="Target: a Hub id or a folder. Default: the embedded pair.")]
Head = Annotated[str | None, typer.Option(help="Draft head for --model: a Hub id or a folder. Default: a known one.")]
Dtype = Annotated[str, typer.Option(help="dtype of target and head, such as float32 or bfloat16; auto: as stored.")]
Prompts = Annotated[Path | None, typer.Option(help="JSON lines with turns, prompt or question, or a prompt a line.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts only.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]


def load(model: str | None, head: str | None, dtype: str, needs_head: bool = True):
    """Target, head (`None` where it is not needed and not given) and tokenizer."""
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else None
    if model is None:
        if head is not None:
            raise ValueError(f"--head {head} needs --model: the embedded target has its own head.")
        return embedded_pair(dtype=dtype, device=device)
    if head is None and needs_head:
        head = head_for(model).head
        errors.print(f"[dim]head: {head}[/dim]", highlight=False)
    target = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device).eval()
    loaded = DSparkHead.from_pretrained(head, dtype=dtype, device_map=device).eval() if head else None
    return target, loaded, AutoTokenizer.from_pretrained(model)


def write_json(path: Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"Expected comma-separated numbers such as 1,4,16, got {text!r}.") from None
