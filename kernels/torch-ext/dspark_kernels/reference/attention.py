"""What the attention kernels compute, in torch."""

import torch

from . import wide


def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `dspark_kernels.ragged_attention`."""
    rows, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    key, value = (wide(x).repeat_interleave(groups, dim=1) for x in (key, value))
    slots = starts[:, None] + torch.arange(queries, device=query.device)
    at = torch.arange(key.shape[2], device=query.device)
    sees = at <= slots[..., None]
    if window is not None:
        sees &= at > slots[..., None] - window
    scores = wide(query) @ key.transpose(-1, -2) * scale
    scores = scores.masked_fill(~sees[:, None], -torch.inf)
    if sinks is not None:
        sink = wide(sinks).to(scores.dtype)[None, :, None, None].expand(rows, -1, queries, 1)
        scores = torch.cat([scores, sink], dim=-1)
    # What lies in slots that no query sees may be anything.
    unseen = at >= (starts + counts)[:, None]
    value = value.masked_fill(unseen[:, None, :, None], 0)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    there = torch.arange(queries, device=query.device) < counts[:, None]
    mixed = (weights.nan_to_num() @ value).transpose(1, 2)
    return mixed.masked_fill(~there[..., None, None], 0).to(query.dtype)
