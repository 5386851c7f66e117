"""Calibration: temperatures and shifts that make survival tell what survives, and what says how well it does."""

import numpy as np
import pytest

from dspark_hf.evaluation.calibration import auc, brier_score, calibration_error, fit, survival_at

CHANCE = np.random.default_rng(0)


def blocks(count, temperatures, shifts):
    """Confidence logits [count, G], and outcomes of drafts whose true log odds are logits / temperature + shift."""
    logits = CHANCE.normal(0.5, 1.5, (count, len(temperatures)))
    odds = logits / temperatures + shifts
    return logits, np.logical_and.accumulate(CHANCE.random(odds.shape) < 1 / (1 + np.exp(-odds)), axis=1)


def test_the_true_temperatures_are_found():
    temperatures, shifts = np.array([0.5, 1.0, 2.0]), np.array([0.3, -0.2, 0.6])
    found = fit(*blocks(60_000, temperatures, shifts))
    assert found[0] == pytest.approx(temperatures, rel=0.1)
    assert found[1] == pytest.approx(shifts, abs=0.08)


def test_survival_is_calibrated_on_other_blocks():
    temperatures, shifts = np.array([0.4, 0.8, 1.5, 2.0]), np.array([-0.5, 0.4, 0.5, 0.0])
    fitted = fit(*blocks(20_000, temperatures, shifts))
    logits, survived = blocks(20_000, temperatures, shifts)
    before, after = survival_at(logits, np.ones(4), np.zeros(4)), survival_at(logits, *fitted)
    for k in range(4):
        assert calibration_error(after[:, k], survived[:, k]) < 0.012
    assert max(calibration_error(before[:, k], survived[:, k]) for k in range(4)) > 0.05


def test_positions_that_never_or_always_survive_are_left_alone():
    survived = np.zeros((50, 2), dtype=bool)
    survived[:, 0] = True
    temperatures, shifts = fit(np.ones((50, 2)), survived)
    assert temperatures.tolist() == [1, 1] and shifts.tolist() == [0, 0]


def test_scores_from_their_definitions():
    predicted, happened = CHANCE.random(300).round(2), CHANCE.random(300) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in predicted[happened] for n in predicted[~happened]]
    assert auc(predicted, happened) == pytest.approx(np.mean(pairs))
    squares = [(p - h) ** 2 for p, h in zip(predicted, happened, strict=True)]
    assert brier_score(predicted, happened) == pytest.approx(np.mean(squares))
    error = 0.0
    for b in range(10):
        inside = (predicted >= b / 10) & (predicted < (b + 1) / 10 if b < 9 else predicted <= 1)
        if inside.any():
            error += inside.mean() * abs(predicted[inside].mean() - happened[inside].mean())
    assert calibration_error(predicted, happened) == pytest.approx(error, abs=0.01)
    assert np.isnan(auc(predicted, np.zeros(300)))


def test_the_embedded_head_is_calibrated():
    import dspark_hf

    _, head, _ = dspark_hf.embedded_pair()
    assert len(head.config.confidence_temperatures) == len(head.config.confidence_shifts) == 7
