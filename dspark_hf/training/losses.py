"""The three losses of a DSpark head (paper, training).

Every loss is averaged over the supervised rows with weights that fall with the position in the block,
w_k = exp(-(k-1) / decay) for k = 1..G, since a late draft counts only when all before it were accepted.

Logits of all rows at once would be the largest tensors of a step by far: 512 anchors x 7 rows x 151,936 tokens are two
gigabytes in float32, and a dozen of that size would be needed. So logits are made, compared and differentiated some
rows at a time, and only the gradients of what they are made of are kept. (Liger-Kernel does so for an LM head with one
loss behind it; here logits are the sum of two products, with two losses of one softmax.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .blocks import NO_LABEL

CE_WEIGHT, L1_WEIGHT, CONFIDENCE_WEIGHT = 0.1, 0.9, 1.0
POSITION_DECAY = 4.0
# Logits at a time: 64 MiB in float32, of which about six are alive at once.
CHUNK = 2**24

# Logits [n, V] of n rows, from what they are made of, [n, ...] each.
MakeLogits = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Losses:
    """Scalars: cross entropy with the next token, L1 distance of draft and target distribution (0 to 2), binary
    cross entropy of the confidence (`None` without a confidence head), their weighted sum, which alone has a gradient,
    and the sum of weights that they were divided by."""

    ce: torch.Tensor
    l1: torch.Tensor
    confidence: torch.Tensor | None
    total: torch.Tensor
    weight: torch.Tensor


def dspark_losses(
    draft: Sequence[torch.Tensor],
    draft_logits: MakeLogits,
    target: torch.Tensor,
    target_logits: MakeLogits,
    confidence_logits: torch.Tensor | None,
    labels: torch.Tensor,
    supervised: torch.Tensor,
    ce_weight: float = CE_WEIGHT,
    draft_tokens: torch.Tensor | None = None,
    parameters: Sequence[torch.Tensor] = (),
    rows_at_once: int | None = None,
) -> Losses:
    """Total = 0.1 CE + 0.9 L1 + 1.0 BCE; target distribution and confidence target carry no gradient.

    Args:
        draft: what draft logits are made of, [b, N, G, ...] each. draft_logits: makes them of n rows.
        target, target_logits: the same of the target.
        confidence_logits: [b, N, G] or `None`. labels: [b, N, G], of the draft vocabulary or `NO_LABEL`.
        supervised: [b, N, G] bool. ce_weight: instead of 0.1; a head that is far from its target learns faster from
            the cross entropy, since the L1 distance hardly changes where the draft gives the right token no weight.
        draft_tokens: the target's ids of a reduced draft vocabulary. parameters: what else `draft_logits` goes by and
            is to learn. rows_at_once: rows whose logits are there at a time, by default all.
    """
    block_size = supervised.shape[-1]
    weights = torch.exp(-torch.arange(block_size, device=supervised.device) / POSITION_DECAY)
    weights = (weights * supervised)[supervised]
    weight = weights.sum()
    # Rows outside the mask are left out before the vocabulary-sized work, not multiplied by zero after it.
    states, labels = target[supervised], labels[supervised]

    def compared(rows: slice, logits: torch.Tensor) -> Compared:
        with torch.no_grad():
            theirs = target_logits(states[rows]).float().softmax(-1)
            return compare(logits, theirs, labels[rows], draft_tokens)

    own = [x[supervised] for x in draft]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (*own, *parameters))
    rows = rows_at_once or max(1, len(labels))
    by_row = draft_logits, compared, rows, weights, ce_weight
    ce, distance, total = _ByChunk.apply(*by_row, learns, len(own), *own, *parameters)
    norm = weight + 1e-6
    ce_loss, l1_loss, total = (ce * weights).sum() / norm, (distance * weights).sum() / norm, total / norm
    if confidence_logits is None:
        return Losses(ce_loss, l1_loss, None, total, weight)
    acceptance = 1 - 0.5 * distance
    bce = F.binary_cross_entropy_with_logits(confidence_logits[supervised].float(), acceptance, reduction="none")
    confidence_loss = (bce * weights).sum() / norm
    return Losses(ce_loss, l1_loss, confidence_loss.detach(), total + CONFIDENCE_WEIGHT * confidence_loss, weight)


@dataclass(frozen=True)
class Compared:
    """Draft and target distributions of n rows. ce: [n], cross entropy, 0 where there is no label. distance: [n], L1.
    draft: [n, draft vocabulary], the draft distribution. sign: the same, of what it exceeds the target's by.
    labels: [n]."""

    ce: torch.Tensor
    distance: torch.Tensor
    draft: torch.Tensor
    sign: torch.Tensor
    labels: torch.Tensor

    def gradient(self, of_ce: torch.Tensor, of_distance: torch.Tensor) -> torch.Tensor:
        """Of the logits, of the sum of `of_ce` [n] times the cross entropies and `of_distance` [n] times the distances:
        a (q - 1[label]) + b q (sign - <q, sign>). It takes the place of `sign`."""
        q, labelled = self.draft, self.labels != NO_LABEL
        of_ce = of_ce * labelled
        gradient = self.sign.sub_(torch.linalg.vecdot(q, self.sign)[:, None])
        gradient.mul_(of_distance[:, None]).add_(of_ce[:, None]).mul_(q)
        at_label = self.labels.where(labelled, 0)[:, None]
        return gradient.scatter_add_(1, at_label, -of_ce[:, None])


def compare(
    draft_logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, draft_tokens: torch.Tensor | None = None
) -> Compared:
    """Without a gradient: what the losses of n rows are, and what their gradients are made of.

    Args:
        draft_logits: [n, draft vocabulary]. target: [n, V], the target's distribution; it is overwritten.
    """
    outside = 0.0
    if draft_tokens is not None:
        target = target[:, draft_tokens]
        # What the target gives to other tokens is never drafted: all of that is distance.
        outside = 1 - target.sum(-1)
    log_q = draft_logits.float().log_softmax(-1)
    ce = F.nll_loss(log_q, labels, reduction="none", ignore_index=NO_LABEL)
    q = log_q.exp_()
    apart = target.neg_().add_(q)
    return Compared(ce, torch.linalg.vector_norm(apart, ord=1, dim=-1) + outside, q, apart.sign_(), labels)


class _ByChunk(torch.autograd.Function):
    """Row losses [n], [n] without a gradient, and their weighted sum, whose gradient is made beside it, a chunk of rows
    after the other, so that the logits of one chunk only are ever there."""

    @staticmethod
    def forward(ctx, draft_logits, compared, rows, weights, ce_weight, learns, count, *inputs):
        made_of, parameters = inputs[:count], inputs[count:]
        found, gradients = [], [torch.zeros_like(x) if learns else None for x in inputs]
        for start in range(0, len(weights), rows):
            chunk = slice(start, start + rows)
            with torch.set_grad_enabled(learns):
                own = [x[chunk].detach().requires_grad_(learns) for x in made_of]
                logits = draft_logits(*own)
            result = compared(chunk, logits.detach())
            found.append(torch.stack([result.ce, result.distance]))
            if not learns:
                continue
            of_logits = result.gradient(ce_weight * weights[chunk], L1_WEIGHT * weights[chunk]).to(logits.dtype)
            with torch.autocast(logits.device.type, enabled=False):
                of_chunk = torch.autograd.grad(logits, [*own, *parameters], of_logits)
            for whole, part in zip(gradients[:count], of_chunk, strict=False):
                whole[chunk] = part
            for whole, part in zip(gradients[count:], of_chunk[count:], strict=True):
                whole += part
            # Before the next chunk is made.
            del logits, result, of_logits, of_chunk
        ctx.gradients = gradients
        ce, distance = torch.cat(found, dim=1) if found else weights.new_zeros(2, 0)
        ctx.mark_non_differentiable(ce, distance)
        return ce, distance, ((ce_weight * ce + L1_WEIGHT * distance) * weights).sum()

    @staticmethod
    def backward(ctx, _ce, _distance, gradient):
        return *[None] * 7, *(gradient.to(x.dtype) * x for x in ctx.gradients)
