"""Blocks at random anchors of a training sequence, and what each of them sees.

b sequences of T tokens, N blocks of B rows each. Row k of a block at anchor a is fed position a + k (the anchor, then
masks). G of the rows predict: all of them, or all but the anchor's; row j of these follows the token at a + j and
predicts the one at a + j + 1. A sequence may hold several documents, which do not see each other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# What rows of one type of layer see; see `DSparkHead.mask_rules`.
Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# In place of a label that cannot be drafted; what cross entropy leaves out.
NO_LABEL = -100


@dataclass(frozen=True)
class Blocks:
    """anchors: [b, N] int64, sorted; 0 in dummy blocks. keep: [b, N] bool, false for dummies."""

    anchors: torch.Tensor
    keep: torch.Tensor


def documents_of(positions: torch.Tensor) -> torch.Tensor:
    """[b, T] int64, the number of each token's document, from positions that begin at 0 in each, [b, T]."""
    return (positions == 0).cumsum(dim=1)


def sample_blocks(
    loss_mask: torch.Tensor,
    count: int,
    generator: torch.Generator | torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> Blocks:
    """`count` anchors a sequence at random, or as many as any sequence has, without repetition, among supervised tokens
    followed by another one of their document: in decoding too the first anchor is a token of the response.

    Args:
        loss_mask: [b, T], 1 = supervised token. generator: on the CPU; or random numbers [b, T] from 0 to 1, by which
            the tokens with the largest are chosen. documents: [b, T], by default one a sequence.
    """
    candidates = torch.zeros_like(loss_mask, dtype=torch.bool)
    candidates[:, :-1] = (loss_mask[:, :-1] > 0) & (loss_mask[:, 1:] > 0)
    if documents is not None:
        candidates[:, :-1] &= documents[:, :-1] == documents[:, 1:]
    draws = generator if torch.is_tensor(generator) else torch.rand(candidates.shape, generator=generator)
    order = draws.to(loss_mask.device).masked_fill(~candidates, -1.0)
    chosen, anchors = order.topk(min(count, max(1, int(candidates.sum(dim=1).max()))), dim=1)
    # Dummies sort behind every real anchor, then become position 0.
    length = loss_mask.shape[1]
    anchors = anchors.masked_fill(chosen < 0, length).sort(dim=1).values
    keep = anchors < length
    return Blocks(anchors * keep, keep)


def attention_masks(
    blocks: Blocks, length: int, rules: Mapping[str, Rule], block_size: int, documents: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """[b, 1, N*B, T + N*B] bool a type of layer: a block row sees of the context before its anchor, in the anchor's
    document, and of its own block what the rule of the type lets it see.

    Args:
        rules: see `DSparkHead.mask_rules`. documents: [b, T], by default one a sequence.
    """
    anchors = blocks.anchors
    batch, count = anchors.shape
    places = torch.arange(length, device=anchors.device)
    before = places < anchors[..., None]
    if documents is not None:
        before &= documents[:, None] == documents.gather(1, anchors)[..., None]
    rows = anchors[..., None] + torch.arange(block_size, device=anchors.device)
    each = torch.arange(count, device=anchors.device)
    masks = {}
    for kind, rule in rules.items():
        # Places instead of positions: within a document they differ as much.
        context = before[:, :, None] & rule(places, anchors[..., None])
        within = rule(rows, anchors[..., None]).expand(-1, -1, block_size, -1)
        own = within.new_zeros(batch, count, block_size, count, block_size)
        own[:, each, :, each] = within.transpose(0, 1)
        mask = torch.cat([context.expand(-1, -1, block_size, -1), own.flatten(3)], dim=-1)
        masks[kind] = mask.flatten(1, 2)[:, None]
    return masks


def labels_and_weights(
    input_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    blocks: Blocks,
    rows: int,
    documents: torch.Tensor | None = None,
    drafted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [b, N, G] and which of the G = `rows` that predict are supervised [b, N, G] bool: the label lies inside
    the document and is supervised, and so are those of all earlier rows of the block.

    Args:
        documents: [b, T], by default one a sequence.
        drafted: [V] int64, ids of tokens in a reduced draft vocabulary, `NO_LABEL` for those outside, which labels then
            are. A label outside is never drafted, so that rows behind it are not supervised.
    """
    length = input_ids.shape[1]
    positions = blocks.anchors[..., None] + 1 + torch.arange(rows, device=input_ids.device)
    index = positions.clamp(max=length - 1).flatten(1)

    def at_labels(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, index).view_as(positions)

    labels = at_labels(input_ids)
    ok = blocks.keep[..., None] & (positions < length) & (at_labels(loss_mask) > 0)
    if documents is not None:
        ok &= at_labels(documents) == documents.gather(1, blocks.anchors)[..., None]
    if drafted is not None:
        labels = drafted[labels]
        ok[..., 1:] &= labels[..., :-1] != NO_LABEL
    return labels, ok.cumprod(dim=-1).bool()
