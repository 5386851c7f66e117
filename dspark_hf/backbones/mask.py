"""What the rows of a block see."""

import torch


def draft_mask(
    positions: torch.Tensor,
    start: torch.Tensor,
    size: int,
    window: int | None = None,
    counted_from: str = "row",
    causal: bool = False,
) -> torch.Tensor:
    """[..., size, K] bool, or [..., 1, K] where all rows see the same: the keys that a draft layer may look at.

    Args:
        positions: [..., K], of keys; those before `start` are context, the others block rows.
        start: [..., 1], the anchor's position. Row k of the block is at start + k.
        size: rows of the block.
        window: of a sliding layer, in context tokens; `None` sees all of them. Trainers count it from the row (row k
            then sees the context from start + k - window + 1 on) or from the block (all rows from start - window on).
        causal: whether a row is kept from seeing the rows behind it.
    """
    positions, start = positions[..., None, :], start[..., None]
    row = torch.arange(size, device=positions.device)[:, None]
    seen = positions <= start + row if causal else positions < start + size
    if window is None:
        return seen
    first = start + row - window + 1 if counted_from == "row" else start - window
    return seen & ((positions >= start) | (positions >= first))
