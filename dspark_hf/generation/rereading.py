"""At which length plain decoding reads what, for targets whose rotary embeddings go by it; see `rope`."""

from collections.abc import Sequence

import torch

from .cache import SlotCache, on_device
from .rows import Row
from .target import Target


def read_lengths(rows: Sequence[Row], count: int, target: Target) -> torch.Tensor | None:
    """[R, count] of the next tokens of every row the length of the longest row when plain decoding reads them; `None`
    where the target does not go by it."""
    if not target.growing:
        return None
    first = [len(row.columns) + row.lag for row in rows]
    return on_device(first, target.device)[:, None] + torch.arange(count, device=target.device)


def reread(rows: Sequence[Row], cache: SlotCache, target: Target) -> None:
    """Where plain decoding would read a text anew with other frequencies, see `rope.rereads_at`, so do we."""
    border = target.rereads_at
    if border is None:
        return
    crossing = [r for r, row in enumerate(rows) if row.anchor_column == border and row.width <= border]
    if not crossing:
        return
    texts = [rows[r].tokens[:-1] for r in crossing]
    longest, device = max(map(len, texts)), target.device
    tokens = on_device([text + [0] * (longest - len(text)) for text in texts], device)
    lengths = [len(text) + 1 + rows[r].lag for r, text in zip(crossing, texts, strict=True)]
    read_at = on_device(lengths, device)[:, None].expand_as(tokens)
    target.reread(tokens, cache, on_device(crossing, device), read_at)
