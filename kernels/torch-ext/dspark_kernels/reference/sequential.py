"""What the sequential kernels compute, in torch."""

import torch

from . import largest, wide
from .random import RACE, exponential
from .verify import INVALID


def sample_block(
    base_logits: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    anchors: torch.Tensor,
    seeds: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `dspark_kernels.sample_block`."""
    previous, found = anchors, []
    valid = torch.ones_like(anchors, dtype=torch.bool)
    for k in range(base_logits.shape[1]):
        embedded = w1[previous.clamp(min=0)]
        token, logits = _position(base_logits[:, k], embedded, w2, seeds, temperature, k)
        valid &= token >= 0
        previous = token
        found.append((token.where(valid, INVALID), logits))
    tokens, logits = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
    return tokens, None if seeds is None else logits


def sample_position(
    base_logits: torch.Tensor,
    embedded: torch.Tensor,
    w2: torch.Tensor,
    seeds: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `dspark_kernels.sample_position`."""
    token, logits = _position(base_logits, embedded, w2, seeds, temperature, 0)
    return token, None if seeds is None else logits


def _position(base_logits, embedded, w2, seeds, temperature, position) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (wide(base_logits) + wide(embedded) @ wide(w2).T) / temperature
    scores = logits
    if seeds is not None:
        scores = logits - exponential(seeds, logits.shape[-1], RACE + 2 + position).log()
    best, token = largest(scores)
    return token.where(~best.isnan() & (best > -torch.inf), INVALID), logits
