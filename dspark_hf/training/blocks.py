"""Blocks at random anchors of a training sequence, and what each of them sees.

b sequences of T tokens, N blocks of B rows each. Row k of a block at anchor a is fed position a + k (the anchor, then
masks) and predicts the token at a + k + 1.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Blocks:
    """anchors: [b, N] int64, sorted; 0 in dummy blocks. keep: [b, N] bool, false for dummies."""

    anchors: torch.Tensor
    keep: torch.Tensor


def sample_blocks(
    loss_mask: torch.Tensor, count: int, generator: torch.Generator | torch.Tensor | None = None
) -> Blocks:
    """`count` anchors a sequence at random, without repetition, among supervised tokens followed by another one:
    in decoding too the first anchor is a token of the response.

    Args:
        loss_mask: [b, T], 1 = supervised token. generator: on the CPU; or random numbers [b, T] from 0 to 1, by which
            the tokens with the largest are chosen.
    """
    candidates = torch.zeros_like(loss_mask, dtype=torch.bool)
    candidates[:, :-1] = (loss_mask[:, :-1] > 0) & (loss_mask[:, 1:] > 0)
    draws = generator if torch.is_tensor(generator) else torch.rand(candidates.shape, generator=generator)
    order = draws.to(loss_mask.device).masked_fill(~candidates, -1.0)
    chosen, anchors = order.topk(min(count, order.shape[1]), dim=1)
    # Dummies sort behind every real anchor, then become position 0.
    length = loss_mask.shape[1]
    anchors = anchors.masked_fill(chosen < 0, length).sort(dim=1).values
    keep = anchors < length
    return Blocks(anchors * keep, keep)


def attention_mask(blocks: Blocks, length: int, block_size: int) -> torch.Tensor:
    """[b, 1, N*B, T + N*B] bool: a block row sees the context before its anchor and all rows of its own block."""
    batch, count = blocks.anchors.shape
    device = blocks.anchors.device
    context = torch.arange(length, device=device) < blocks.anchors[..., None]
    context = context.repeat_interleave(block_size, dim=1)
    owner = torch.arange(count, device=device).repeat_interleave(block_size)
    own = (owner[:, None] == owner).expand(batch, -1, -1)
    return torch.cat([context, own], dim=-1)[:, None]


def labels_and_weights(
    input_ids: torch.Tensor, loss_mask: torch.Tensor, blocks: Blocks, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [b, N, B] and which rows are supervised [b, N, B] bool: the label lies inside the sequence and is
    supervised, and so are those of all earlier rows of the block."""
    length = input_ids.shape[1]
    positions = blocks.anchors[..., None] + 1 + torch.arange(block_size, device=input_ids.device)
    inside = positions < length
    index = positions.clamp(max=length - 1).flatten(1)
    labels = input_ids.gather(1, index).view_as(positions)
    supervised = loss_mask.gather(1, index).view_as(positions) > 0
    ok = blocks.keep[..., None] & inside & supervised
    return labels, ok.cumprod(dim=-1).bool()
