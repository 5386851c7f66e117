"""What the verify kernels compute, in torch. R rows, L drafts of which row r has lengths[r], V tokens."""

import torch

from . import largest, wide
from .random import ACCEPT, exponential, philox, uniform

# The token of a row whose logits are no distribution.
INVALID = -1


def verify_greedy(
    target_logits: torch.Tensor, draft_tokens: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafts while they are the target's argmax; see `dspark_kernels.verify_greedy`."""
    best, choices = largest(target_logits)
    read = torch.arange(target_logits.shape[1], device=lengths.device) <= lengths[:, None]
    valid = ~((best.isnan() | (best == -torch.inf)) & read).any(dim=1)
    accepted = _leading(choices[:, :-1] == draft_tokens, lengths)
    return _checked(valid, accepted, _at(choices, accepted))


def verify_sampled(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept, residual and bonus; see `dspark_kernels.verify_sampled`."""
    positions = torch.arange(target_logits.shape[1], device=lengths.device)
    target, draft = wide(target_logits), wide(draft_logits)
    target_total, draft_total = target.logsumexp(dim=-1), draft.logsumexp(dim=-1)
    finite = target_total.isfinite() | (positions > lengths[:, None])
    finite[:, :-1] &= draft_total.isfinite() | (positions[:-1] >= lengths[:, None])

    drafted = draft_tokens[..., None]
    p = (target[:, :-1].gather(-1, drafted).squeeze(-1) - target_total[:, :-1]).exp()
    q = (draft.gather(-1, drafted).squeeze(-1) - draft_total).exp()
    chance = uniform(philox(seeds, positions[:-1], ACCEPT)[0])
    accepted = _leading(chance * q < p, lengths)

    weights = (_at(target, accepted) - _at(target_total, accepted)[:, None]).exp()
    race = exponential(seeds, target.shape[-1])
    _, choice = largest(weights / race)
    if draft.shape[1]:
        last = accepted.clamp(max=draft.shape[1] - 1)
        residual = weights - (_at(draft, last) - _at(draft_total, last)[:, None]).exp()
        best, corrected = largest(residual.clamp(min=0) / race)
        # A residual of nothing: p equals q up to rounding, and the rejection was rounding too.
        choice = torch.where((accepted < lengths) & (best > 0), corrected, choice)
    return _checked(finite.all(dim=1), accepted, choice)


def _checked(valid: torch.Tensor, accepted: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return accepted * valid, torch.where(valid, tokens, INVALID)


def _leading(ok: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[R] number of leading true values among the first lengths[r] of each row."""
    within = torch.arange(ok.shape[1], device=ok.device) < lengths[:, None]
    return (ok & within).cumprod(dim=1).sum(dim=1)


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values[r, index[r]] for every row."""
    return values[torch.arange(len(index), device=index.device), index]
