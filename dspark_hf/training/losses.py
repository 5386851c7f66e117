"""The three losses of a DSpark head (paper, training).

Every loss is averaged over the supervised rows with weights that fall with the position in the block,
w_k = exp(-(k-1) / decay) for k = 1..B, since a late draft counts only when all before it were accepted.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

CE_WEIGHT, L1_WEIGHT, CONFIDENCE_WEIGHT = 0.1, 0.9, 1.0
POSITION_DECAY = 4.0


@dataclass(frozen=True)
class Losses:
    """Scalars: cross entropy with the next token, L1 distance of draft and target distribution (0 to 2), binary
    cross entropy of the confidence (`None` without a confidence head), their weighted sum, and the sum of weights that
    they were divided by."""

    ce: torch.Tensor
    l1: torch.Tensor
    confidence: torch.Tensor | None
    total: torch.Tensor
    weight: torch.Tensor


def dspark_losses(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    confidence_logits: torch.Tensor | None,
    labels: torch.Tensor,
    supervised: torch.Tensor,
    ce_weight: float = CE_WEIGHT,
) -> Losses:
    """Total = 0.1 CE + 0.9 L1 + 1.0 BCE; target distribution and confidence target carry no gradient.

    Args:
        draft_logits, target_logits: [b, N, B, V]. confidence_logits: [b, N, B] or `None`. labels: [b, N, B].
        supervised: [b, N, B] bool. ce_weight: instead of 0.1; a head that is far from its target learns faster from
            the cross entropy, since the L1 distance hardly changes where the draft gives the right token no weight.
    """
    block_size = supervised.shape[-1]
    weights = torch.exp(-torch.arange(block_size, device=supervised.device) / POSITION_DECAY)
    weights = (weights * supervised)[supervised]
    weight = weights.sum()
    norm = weight + 1e-6

    # Rows outside the mask are left out before the vocabulary-sized work, not multiplied by zero after it.
    draft_logits, target_logits = draft_logits[supervised].float(), target_logits[supervised].float()
    ce = F.cross_entropy(draft_logits, labels[supervised], reduction="none")
    distance = (draft_logits.softmax(-1) - target_logits.softmax(-1).detach()).abs().sum(-1)
    ce_loss, l1_loss = (ce * weights).sum() / norm, (distance * weights).sum() / norm
    total = ce_weight * ce_loss + L1_WEIGHT * l1_loss
    if confidence_logits is None:
        return Losses(ce_loss, l1_loss, None, total, weight)
    acceptance = 1 - 0.5 * distance.detach()
    bce = F.binary_cross_entropy_with_logits(confidence_logits[supervised].float(), acceptance, reduction="none")
    confidence_loss = (bce * weights).sum() / norm
    return Losses(ce_loss, l1_loss, confidence_loss, total + CONFIDENCE_WEIGHT * confidence_loss, weight)
