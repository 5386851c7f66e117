"""Algorithm 1 of the paper: which drafts to verify, given how likely they survive and what a step costs.

Survival a_{r,j} is the probability that the first j drafts of row r are all accepted. Verifying l_r drafts of every row
commits tau = sum_r (1 + sum_{j<=l_r} a_{r,j}) tokens in expectation; the schedule maximises Theta = tau / seconds.
"""

from typing import TypeVar

import numpy as np
import torch

# On the host or, where that does not wait to see them, on the device.
Numbers = TypeVar("Numbers", np.ndarray, torch.Tensor)


def survival(confidence: Numbers) -> Numbers:
    """a_j = c_1 * .. * c_j: [..., G] from the confidence of every draft given that those before it survived."""
    return confidence.cumprod(-1)


def admit(survival: np.ndarray, base_tokens: float, seconds: np.ndarray, look_past_drops: bool) -> np.ndarray:
    """Lengths [R] to verify, by walking all (row, position) in the order of falling survival.

    Position j + 1 of a row never comes before j, as survival falls along a row (ties keep that order).

    Args:
        survival: [R, G], expected tokens that each draft adds. base_tokens: expected tokens when nothing is admitted.
        seconds: [R*G + 1], time of the round when n positions are admitted, n = 0 first.
        look_past_drops: take the best number of positions whatever lies before it. Lossless with greedy decoding only:
            survival behind a position depends on the token drafted there, so whether that token is verified would
            depend on what it is (paper, appendix A). Without, the walk ends at the first position that does not raise
            Theta; pass [`lower_hull`] seconds, so that this is not the edge of a mere step.
    """
    rows, positions = survival.shape
    flat = survival.ravel()
    order = np.argsort(-flat, kind="stable")
    theta = (base_tokens + np.concatenate(([0.0], np.cumsum(flat[order])))) / seconds
    if look_past_drops:
        count = int(theta.argmax())
    else:
        drops = np.flatnonzero(theta[1:] <= theta[:-1])
        count = int(drops[0]) if len(drops) else len(flat)
    return np.bincount(order[:count] // positions, minlength=rows)


def best_length(survival: np.ndarray, draft: np.ndarray, sizes: np.ndarray) -> tuple[float, int, int]:
    """How many positions to draft, before the draft: the highest Theta, its length, and how many drafts to verify then.

    Args:
        survival: [R, G], as far as it is known before; of each length the best drafts are taken, as `admit` would.
        draft: [G], seconds to draft 1, 2, .. positions. sizes: [G + 1], seconds to verify 1, 2, .. tokens a row.
    """
    rows, positions = survival.shape
    flat = survival.ravel()
    order = np.argsort(-flat, kind="stable")
    within = (order % positions) <= np.arange(positions)[:, None]
    tokens, counts = rows + (within * flat[order]).cumsum(axis=1), within.cumsum(axis=1)
    theta = tokens / (draft[:, None] + at_size(sizes, 1 + counts / rows))
    best = theta.argmax()
    return theta.flat[best], int(best // theta.shape[1]) + 1, int(counts.flat[best])


def at_size(sizes: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Seconds at sizes between those of a table, which are 1, 2, .."""
    return np.interp(size, np.arange(1, len(sizes) + 1), sizes)


def lower_hull(seconds: np.ndarray) -> np.ndarray:
    """The largest convex function below `seconds` [N].

    Real step times are staircases, and on those Theta has local peaks. Expected tokens grow ever more slowly along the
    walk; over a convex time their ratio has one peak, so that stopping at the first drop misses nothing.
    """
    corners = [0]
    for n in range(1, len(seconds)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (seconds[b] - seconds[a]) * (n - b) < (seconds[n] - seconds[b]) * (b - a):
                break
            corners.pop()
        corners.append(n)
    return np.interp(np.arange(len(seconds)), corners, seconds[corners])


def top_k_by_survival(survival: torch.Tensor, budget: int) -> torch.Tensor:
    """Lengths [R] when the `budget` drafts of highest survival [R, G] are verified.

    The production variant: the budget was chosen without this round's confidences, so that ranking by them leaks
    nothing, and it is known to the host, so that the host need not wait for the device.
    """
    flat = survival.flatten()
    order = torch.sort(flat, descending=True, stable=True).indices
    chosen = torch.zeros_like(flat, dtype=torch.long).index_fill_(0, order[:budget], 1)
    return chosen.view_as(survival).sum(dim=1)
