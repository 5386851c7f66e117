"""What a round costs: step times of verify and draft passes as a function of rows, tokens a row and context.

Measured once for a pair on a device, stored under the Hugging Face cache folder, and moved along by the step times
that generation itself observes.
"""

import hashlib
import itertools
import json
import math
import os
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from transformers.utils import logging

logger = logging.get_logger(__name__)

FORMAT = 2
# An observation moves all cells by a share of its (log) surprise, as a device that slows down is slower everywhere,
# and beyond that those of its kind and rows. It does not move its own size among them: what is chosen would become
# what looks quick.
COMMON_SHARE, OWN_SHARE = 0.1, 0.02
# A step that was interrupted says nothing about the next; this bounds what one observation can claim (log scale).
LARGEST_SURPRISE = 0.5

KINDS = ("verify", "packed", "draft", "start")


def sizes_of(block_size: int) -> dict[str, int]:
    """How many sizes of each kind of step a table has."""
    return {"verify": block_size + 1, "packed": block_size + 1, "draft": block_size, "start": 1}


@dataclass
class CostTable:
    """Step times in seconds, [contexts, rows, sizes] each, linear between and beyond what was measured.

    identity: what was measured, see [`identity_of`]. rows, contexts: where, increasing. verify: the target over 1 to
    block + 1 tokens in every row. packed: the same number of tokens, unevenly spread over the rows. draft: the head,
    1 to block positions drafted in every row. start: the head's first draft, of one position, when it has all the
    context yet to read.
    """

    identity: dict[str, Any]
    contexts: list[int]
    rows: list[int]
    verify: np.ndarray
    packed: np.ndarray
    draft: np.ndarray
    start: np.ndarray

    @classmethod
    def empty(cls, identity: dict[str, Any], contexts: list[int], block_size: int) -> "CostTable":
        sizes = sizes_of(block_size)
        return cls(identity, contexts, [], **{kind: np.empty((len(contexts), 0, sizes[kind])) for kind in KINDS})

    def seconds(self, kind: str, rows: float, context: float) -> np.ndarray:
        """[sizes] of a kind of step; a larger one takes no less."""
        at_context = _interpolated(getattr(self, kind), self.contexts, context)
        return np.minimum.accumulate(_interpolated(at_context, self.rows, rows)[::-1])[::-1]

    def catching_up(self, rows: float, waiting: int) -> float:
        """Seconds that a draft takes longer when so many tokens of every row wait to be read by the head."""
        longer = self.seconds("start", rows, waiting) - self.seconds("draft", rows, waiting)[:1]
        return max(0.0, longer.item()) * min(1.0, waiting / self.contexts[0])

    def extend(self, rows: int, measured: dict[str, np.ndarray]) -> None:
        """Add what was measured, [contexts, sizes] a kind, for a number of rows larger than those before."""
        for kind, new in measured.items():
            rising = np.stack([monotone(seconds) for seconds in new])
            setattr(self, kind, np.concatenate([getattr(self, kind), rising[:, None]], axis=1))
        self.rows = [*self.rows, rows]

    def bring_to(self, rows: int, measured: dict[str, np.ndarray]) -> None:
        """Move all cells by what they are off, in the median, from new times for a number of rows that is there."""
        at = self.rows.index(rows)
        off = np.concatenate([(measured[kind] / getattr(self, kind)[:, at]).ravel() for kind in KINDS])
        for kind in KINDS:
            setattr(self, kind, getattr(self, kind) * np.median(off))

    def observe(self, kind: str, rows: float, context: float, size: float, seconds: float) -> None:
        """Learn from a step of generation; `size` is 1 for the first of the table, and need not be whole."""
        table = getattr(self, kind)
        sizes = range(1, table.shape[2] + 1)
        expected = np.interp(size, sizes, self.seconds(kind, rows, context))
        surprise = min(max(math.log(seconds / expected), -LARGEST_SURPRISE), LARGEST_SURPRISE)
        for every in KINDS:
            times = getattr(self, every)
            times *= math.exp(COMMON_SHARE * surprise)
        # A pass of one token a row is what rounds without drafts do, and has nothing in common with the others.
        alone = 1 if kind in ("verify", "packed") else 0
        alike = slice(0, 1) if size <= alone else slice(alone, None)
        corners = itertools.product(_corners(self.contexts, context), _corners(self.rows, rows))
        for (i, i_weight), (r, r_weight) in corners:
            table[i, r, alike] *= math.exp(OWN_SHARE * i_weight * r_weight * surprise)

    # -- Files --------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        return path_of(self.identity)

    def save(self) -> None:
        """Write the file, as a whole or not at all; a cache folder that cannot be written is only warned about."""
        content = {"format": FORMAT, "identity": self.identity, "contexts": self.contexts, "rows": self.rows}
        content |= {kind: getattr(self, kind).tolist() for kind in KINDS}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump(content, file)
            os.replace(file.name, self.path)
        except OSError as error:
            logger.warning_once(f"The step times could not be stored and will be measured again ({error}).")


def load(identity: dict[str, Any], block_size: int) -> CostTable | None:
    """The stored table of this pair; `None` without one. A file that is damaged or of another pair is not used."""
    path = path_of(identity)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return _rebuild(path, str(error))
    try:
        return _checked(content, identity, block_size)
    except (KeyError, TypeError, ValueError) as error:
        return _rebuild(path, f"{type(error).__name__}: {error}")


def _checked(content: dict[str, Any], identity: dict[str, Any], block_size: int) -> CostTable:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, expected {FORMAT}")
    if content["identity"] != identity:
        raise ValueError("measured for another pair or device")
    tables = {kind: np.array(content[kind], dtype=float) for kind in KINDS}
    contexts, rows = content["contexts"], content["rows"]
    for values in (contexts, rows):
        if not values or any(type(n) is not int or n < 1 for n in values) or sorted(set(values)) != values:
            raise ValueError(f"expected increasing positive numbers, got {values}")
    for kind, sizes in sizes_of(block_size).items():
        if tables[kind].shape != (len(contexts), len(rows), sizes):
            raise ValueError(f"{kind} has shape {tables[kind].shape}")
        if not np.isfinite(tables[kind]).all() or (tables[kind] <= 0).any():
            raise ValueError(f"{kind} holds times that are not positive")
    return CostTable(identity, contexts, rows, **tables)


def _rebuild(path: Path, why: str) -> None:
    logger.warning(f"The step times in {str(path)!r} cannot be used ({why}); they are measured again.")


def path_of(identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Path(HF_HOME) / "dspark_hf" / "step_times" / f"{identity['target']}-{digest}.json"


def identity_of(target, head, device: torch.device) -> dict[str, Any]:
    """What step times depend on: the two models, their dtypes, the device and the attention implementation."""
    return {
        "target": type(target).__name__,
        "target_config": _digest(target.config),
        "target_bytes": target.get_memory_footprint(),
        "head_config": _digest(head.config),
        "torch": torch.__version__,
    } | settings_of(target, head, device)


def settings_of(target, head, device: torch.device) -> dict[str, Any]:
    """The part of an identity that may change while a process runs."""
    cuda = device.type == "cuda"
    return {
        "target_dtype": str(target.dtype),
        "head_dtype": str(head.dtype),
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type}, {torch.get_num_threads()} threads",
        "attention": target.config.get_text_config(decoder=True)._attn_implementation,
        "compiled": target._compiled_call_impl is not None,
        "processes": target.tp_size or 1,
    }


# What a config says of itself that changes nothing about its speed.
UNTIMED = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "confidence_temperatures",
    "confidence_shifts",
    "dtype",
)


def _digest(config) -> str:
    content = {key: value for key, value in config.to_dict().items() if key not in UNTIMED}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def monotone(seconds: np.ndarray) -> np.ndarray:
    """The rising values nearest to `seconds` [N] (least squares): what falls with the size was disturbed.

    Isotonic regression in closed form: value i is the largest, over all beginnings up to i, of the smallest mean, over
    all ends from i on.
    """
    count = len(seconds)
    sums = np.concatenate(([0.0], np.cumsum(seconds)))
    first, last = np.indices((count, count))
    means = np.where(first <= last, (sums[1:][last] - sums[first]) / np.maximum(last - first + 1, 1), np.inf)
    smallest = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
    return np.where(first <= last, smallest, -np.inf).max(axis=0)


def _corners(points: Sequence[int], at: float) -> list[tuple[int, float]]:
    """The measured neighbours of `at` and their weights, which sum to one; beyond the ends, the end."""
    high = bisect_left(points, at)
    if high == 0 or high == len(points):
        return [(min(high, len(points) - 1), 1.0)]
    share = (at - points[high - 1]) / (points[high] - points[high - 1])
    return [(high - 1, 1.0 - share), (high, share)]


def _interpolated(values: np.ndarray, points: Sequence[int], at: float) -> np.ndarray:
    """values [.., at, ..] of its first axis, which lies at `points`: linear, and never falling beyond the last."""
    if at <= points[0] or len(points) == 1:
        return values[0]
    high = min(bisect_left(points, at), len(points) - 1)
    rise = (values[high] - values[high - 1]) / (points[high] - points[high - 1])
    beyond = at - points[high]
    return values[high] + beyond * (rise if beyond < 0 else np.maximum(rise, 0))
