"""Sequential temperature scaling, and how well survival tells what will survive (paper, section on calibration).

N drafted blocks of G positions; survived[n, k] says whether the first k + 1 drafts of block n were all accepted.
"""

import numpy as np

from ..scheduling.algorithm import survival

BINS = 10
# Steps of Newton's method; it converges in a handful.
STEPS = 30
HIGHEST_TEMPERATURE = 5.0


def survival_at(logits: np.ndarray, temperatures: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """[N, G] from confidence logits [N, G]: position k has sigmoid(logit / temperatures[k] + shifts[k])."""
    return survival(1 / (1 + np.exp(-(logits / temperatures + shifts))))


def fit(logits: np.ndarray, survived: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Temperatures [G] and shifts [G], one position after the other, each from the blocks that survived up to it.

    Confidence is trained on the overlap of two distributions. Greedy decoding accepts by another rule, and no
    temperature alone turns one into the other: hence the shift. Both are the most likely ones (logistic regression),
    which depends less on chance than minimising the error of bins.
    """
    temperatures, shifts = np.ones(logits.shape[1]), np.zeros(logits.shape[1])
    alive = np.ones(len(logits), dtype=bool)
    for k in range(logits.shape[1]):
        if 0 < survived[alive, k].sum() < alive.sum():
            slope, shifts[k] = _logistic_regression(logits[alive, k], survived[alive, k])
            temperatures[k] = 1 / max(slope, 1 / HIGHEST_TEMPERATURE)
        alive = survived[:, k]
    return temperatures, shifts


def _logistic_regression(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Slope and intercept of log odds over x, with a light pull towards 1 and 0 for when there is little data."""
    inputs, start = np.stack([x, np.ones_like(x)], axis=1), np.array([1.0, 0.0])
    found = start
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-inputs @ found))
        gradient = inputs.T @ (y - p) - (found - start)
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + np.eye(2)
        found = found + np.linalg.solve(curvature, gradient)
    return found


def calibration_error(predicted: np.ndarray, happened: np.ndarray) -> float:
    """Expected calibration error (ECE): the mean distance of predicted and observed rates over bins of equal width,
    weighted by their counts."""
    counts, promised, observed = bins(predicted, happened)
    return float(np.abs(promised - observed).sum() / counts.sum())


def bins(predicted: np.ndarray, happened: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[BINS] each: predictions in the bin, their sum, and how many came true."""
    index = np.minimum((predicted * BINS).astype(int), BINS - 1)
    weights = (None, predicted, happened)
    return tuple(np.bincount(index, weights=weight, minlength=BINS) for weight in weights)


def brier_score(predicted: np.ndarray, happened: np.ndarray) -> float:
    """Mean squared distance of probability and outcome."""
    return float(((predicted - happened) ** 2).mean())


def auc(predicted: np.ndarray, happened: np.ndarray) -> float:
    """Probability that something that happened was given a higher probability than something that did not; ties count
    half. NaN when only one of both occurs."""
    happened = happened.astype(bool)
    positives, negatives = int(happened.sum()), int((~happened).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return float((ranks[happened].sum() - positives * (positives + 1) / 2) / (positives * negatives))
