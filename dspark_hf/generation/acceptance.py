"""Accept, correct, bonus: how a verified block becomes committed tokens (paper, round step 5).

R rows, a block of L drafted tokens of which row r had `lengths[r]` verified, V = vocabulary. The work is done by
`dspark_kernels`, with Triton on CUDA and in torch elsewhere.
"""

from dataclasses import dataclass

import dspark_kernels
import torch


@dataclass(frozen=True)
class Verdict:
    """accepted: [R] int64, drafts accepted of each row. next_tokens: [R] int64, the target's own token after them:
    the correction of the first rejected draft, or the bonus when none was rejected; `dspark_kernels.INVALID` for a row
    whose logits are no distribution (NaN, or nothing but -inf)."""

    accepted: torch.Tensor
    next_tokens: torch.Tensor


def accept_greedy(target_logits: torch.Tensor, draft_tokens: torch.Tensor, lengths: torch.Tensor) -> Verdict:
    """Accept drafts while they are the target's argmax.

    Args:
        target_logits: [R, L+1, V]. draft_tokens: [R, L]. lengths: [R].
    """
    return Verdict(*dspark_kernels.verify_greedy(target_logits, draft_tokens, lengths))


def accept_sampled(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    draft_logits: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor | None = None,
) -> Verdict:
    """Accept draft x with probability min(1, p(x)/q(x)); after a rejection sample from norm(max(p - q, 0)), after
    full acceptance from p. The committed tokens are distributed exactly as sampling from the target.

    Args:
        target_logits: [R, L+1, V], after processors. draft_logits: [R, L, V], what the drafts were sampled from.
        seeds: [R], of the random numbers of each row; from torch's generator by default.
    """
    seeds = dspark_kernels.random_seeds(len(lengths), lengths.device) if seeds is None else seeds
    return Verdict(*dspark_kernels.verify_sampled(target_logits, draft_logits, draft_tokens, lengths, seeds))
