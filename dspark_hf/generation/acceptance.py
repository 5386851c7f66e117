"""Accept, correct, bonus: how a verified block becomes committed tokens (paper, round step 5).

R rows, a block of L drafted tokens of which row r had `lengths[r]` verified, V = vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Verdict:
    """accepted: [R] int64, drafts accepted of each row. next_tokens: [R] int64, the target's own token after them:
    the correction of the first rejected draft, or the bonus when none was rejected."""

    accepted: torch.Tensor
    next_tokens: torch.Tensor


def accept_greedy(target_logits: torch.Tensor, draft_tokens: torch.Tensor, lengths: torch.Tensor) -> Verdict:
    """Accept drafts while they are the target's argmax.

    Args:
        target_logits: [R, L+1, V]. draft_tokens: [R, L]. lengths: [R].
    """
    choices = target_logits.argmax(dim=-1)
    accepted = _leading(choices[:, :-1] == draft_tokens, lengths)
    return Verdict(accepted, _at(choices, accepted))


def accept_sampled(
    target_logits: torch.Tensor, draft_tokens: torch.Tensor, draft_logits: torch.Tensor, lengths: torch.Tensor
) -> Verdict:
    """Accept draft x with probability min(1, p(x)/q(x)); after a rejection sample from norm(max(p - q, 0)), after
    full acceptance from p. The committed tokens are distributed exactly as sampling from the target.

    Args:
        target_logits: [R, L+1, V], after processors. draft_logits: [R, L, V], what the drafts were sampled from.
    """
    p, q = target_logits.softmax(dim=-1), draft_logits.softmax(dim=-1)
    drafted = draft_tokens[..., None]
    p_drafted, q_drafted = p[:, :-1].gather(-1, drafted).squeeze(-1), q.gather(-1, drafted).squeeze(-1)
    survives = torch.rand_like(p_drafted) * q_drafted < p_drafted
    accepted = _leading(survives, lengths)
    # Behind the last verified draft there is nothing to subtract: the bonus token comes from p itself.
    rejected = (accepted < lengths)[:, None]
    p_next = _at(p, accepted)
    q_next = _at(q, accepted.clamp(max=max(q.shape[1] - 1, 0))) if q.shape[1] else torch.zeros_like(p_next)
    residual = (p_next - q_next * rejected).clamp(min=0)
    # p equal to q up to rounding leaves nothing to sample from; the rejection itself was then rounding.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    return Verdict(accepted, torch.multinomial(residual, 1).squeeze(-1))


def _leading(ok: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[R] number of leading true values among the first lengths[r] of each row."""
    within = torch.arange(ok.shape[1], device=ok.device) < lengths[:, None]
    return (ok & within).cumprod(dim=1).sum(dim=1)


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values[r, index[r]] for every row."""
    return values[torch.arange(len(index), device=index.device), index]
