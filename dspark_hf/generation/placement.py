"""Where a pass writes in the slots of its rows, and what it sees of them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """Where the next forward pass writes its n new tokens a row, and how far it looks.

    slot_mapping: [R, n] int64, index in the row's slot of every new token; in a packed pass [1, B].
    uniform_start: the common first index when every row writes n consecutive tokens from the same place, else `None`;
        lets the write be one slice.
    kv_len: slots 0..kv_len-1 are handed to the attention.
    continues: whether any row has tokens already.
    positions: [R, n], of the tokens; `None` where those are their slots.
    rows: [n] int64, the rows that take part when these are not all. row_index: [n, 1], all that take part; in a packed
        pass [1, B], of every token.
    """

    slot_mapping: torch.Tensor
    uniform_start: int | None
    kv_len: int
    continues: bool = True
    positions: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    row_index: torch.Tensor | None = None


def causal_mask(placement: Placement, window: int | None = None) -> torch.Tensor:
    """[R, 1, n, view] bool: a new token sees the slots up to its own, of those the last `window` if given."""
    keys = torch.arange(placement.kv_len, device=placement.slot_mapping.device)
    queries = placement.slot_mapping[:, None, :, None]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)
