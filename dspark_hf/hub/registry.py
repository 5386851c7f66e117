"""Published heads and the targets they were made for: `registry.json` and how to ask it.

The ids come from the tables in the READMEs of deepseek-ai/DeepSpec and z-lab/dflash, and from the model cards of
RedHatAI, read in November 2026. z-lab and Red Hat also publish heads for targets with recurrent layers (Qwen3.5, 3.6
and 3.8, Qwen3-Coder-Next) and with latent attention (Kimi, GLM, DeepSeek); these targets cannot roll back a rejected
draft by length, so they are not listed. None of the listed heads ships with this package. Heads of DeepSeek V4 lie in
their targets' own checkpoints.
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
    `checkpoints`. method: `"dspark"` or `"dflash"`. block_size: rows of a block, `None` where the table that lists the
    head does not say. source: who trained it.
    """

    head: str
    target: str
    dialect: str
    method: str
    block_size: int | None
    source: str


@cache
def published_heads() -> tuple[PublishedHead, ...]:
    """All of them, for each target the one to prefer first: DSpark before DFlash, DeepSeek's before others'."""
    return tuple(PublishedHead(**entry) for entry in json.loads(FILE.read_text()))


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
