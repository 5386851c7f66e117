"""Published heads and the targets they were made for: `registry.json` and how to ask it.

Where each entry comes from, and which heads are not listed and why, is in `registry.md`. None of the heads ships with
this package. Heads of DeepSeek V4 lie in their targets' own checkpoints.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "registry.json"


@dataclass(frozen=True)
class PublishedHead:
    """A head on the Hub.

    head, target: Hub ids, the same for a head inside its target's checkpoint. dialect: name of the layout, a module of
    `checkpoints`. method: `"dspark"` or `"dflash"`. block_size: rows of a block. source: who trained it. taps: the
    target's layers that feed it, counted as its card does. licence: as the Hub calls it. seen: where all this was read,
    in a `"table"` of heads or on the head's own `"card"`; neither means that the head was loaded. Fields of which that
    says nothing are `None`.
    """

    head: str
    target: str
    dialect: str
    method: str
    block_size: int | None
    source: str
    taps: tuple[int, ...] | None = None
    licence: str | None = None
    seen: str = "table"


@cache
def published_heads() -> tuple[PublishedHead, ...]:
    """All of them, for each target the one to prefer first: DSpark before DFlash, DeepSeek's before others'."""
    return tuple(PublishedHead(**entry) for entry in json.loads(FILE.read_text()))


def search(target: str | None = None, trainer: str | None = None) -> list[PublishedHead]:
    """The heads for a target, in the order of the registry.

    Args:
        target: as in [`heads_for`], or a part of the id where that finds none. trainer: a part of who trained the head,
            or of its id's first half; in any case.
    """
    found = list(published_heads()) if target is None else heads_for(target)
    if not found:
        found = [head for head in published_heads() if target.lower() in head.target.lower()]
    if trainer is None:
        return found
    return [head for head in found if trainer.lower() in f"{head.source} {head.head.partition('/')[0]}".lower()]


def heads_for(target: str) -> list[PublishedHead]:
    """The heads made for a target, the one to prefer first.

    Args:
        target: a Hub id, in any case. A folder named like the model, such as `/models/Qwen3-4B`, finds it too.
    """
    wanted = target.rstrip("/").lower()
    heads = published_heads()
    exact = [head for head in heads if head.target.lower() == wanted]
    name = wanted.rpartition("/")[2]
    return exact or [head for head in heads if Path(target).is_dir() and head.target.lower().endswith("/" + name)]


def head_for(target: str) -> PublishedHead:
    """The head to prefer for a target; see [`heads_for`].

    Raises:
        ValueError: when none is known.
    """
    found = heads_for(target)
    if not found:
        raise ValueError(
            f"No published head is known for {target!r}. `dspark-hf heads` lists the targets that have one. A head "
            "from elsewhere can be given as --head, or to `DSparkHead.from_pretrained`; `dspark-hf train` makes one."
        )
    return found[0]
