"""How likely drafts survive: the head's confidence, corrected by what verification has shown so far.

Everything here learns from rounds that are over, so a schedule built on it leaks nothing about this round's drafts.
"""

from dataclasses import dataclass

import numpy as np

from . import constants
from .algorithm import Numbers
from .algorithm import survival as survival_of


@dataclass
class AcceptanceStats:
    """What is known of a head with one target, shared by all rows and calls.

    tested: by position k, drafts that were verified after all before them were accepted.
    accepted: those of them that were accepted.
    expected: the sum of their confidences.
    probe_interval: rounds to wait before drafting is tried again where it does not pay.
    undrafted_rounds: how many have gone by.
    last_rate: accepted of the tested drafts of the last round that had any.
    """

    tested: np.ndarray
    accepted: np.ndarray
    expected: np.ndarray
    probe_interval: int = 1
    undrafted_rounds: int = 0
    last_rate: float = 0.0

    @classmethod
    def initial(cls, gamma: int) -> "AcceptanceStats":
        return cls(*np.zeros((3, gamma)))

    @property
    def confidence(self) -> np.ndarray:
        """[G] running acceptance by position, the estimate of a head without a confidence head."""
        return (self.accepted + constants.PRIOR * constants.PRIOR_ACCEPTANCE) / (self.tested + constants.PRIOR)

    @property
    def curve(self) -> np.ndarray:
        """[G] survival of a draft of which nothing else is known."""
        return survival_of(self.confidence)

    @property
    def correction(self) -> float:
        """Accepted drafts over those that the confidence promised."""
        return (self.accepted.sum() + constants.PRIOR) / (self.expected.sum() + constants.PRIOR)

    def learn(self, tested: np.ndarray, accepted: np.ndarray, expected: np.ndarray) -> None:
        """Add a round: counts of the drafted positions, and sums of their tested confidences.

        What is known of positions that were not drafted is kept: believed to be as good as a first guess again, they
        would be drafted again and again.
        """
        drafted, count = len(tested), int(tested.sum())
        self.last_rate = accepted.sum() / max(1, count)
        fade = 0.5 ** (count / constants.POOL_HALF_LIFE)
        for known, new in ((self.tested, tested), (self.accepted, accepted), (self.expected, expected)):
            known[:drafted] = fade * known[:drafted] + new


class RowEstimates:
    """What is known of the rows of a call; see [`AcceptanceStats`] for what they share.

    mean: [R, G], survival of the drafts of each row, averaged over its last rounds. expected, accepted: [R], as in
    `AcceptanceStats`, of each row. corrections: [R], factors on the confidence of its drafts.
    """

    def __init__(self, shared: AcceptanceStats, rows: int):
        self.shared = shared
        self.mean = np.tile(shared.curve, (rows, 1))
        self.expected, self.accepted = np.zeros(rows), np.zeros(rows)
        self.corrections = np.full(rows, shared.correction)

    def survival(self, confidence: np.ndarray, rows: list[int] | slice) -> np.ndarray:
        """[n, G] from the confidence [n, G] of the given rows, times what verification has shown it to be worth."""
        return corrected(confidence, self.corrections[rows])

    def learn(
        self,
        rows: list[int] | slice,
        confidence: np.ndarray,
        survival: np.ndarray,
        lengths: np.ndarray,
        accepted: np.ndarray,
    ) -> None:
        """Add a round.

        Args:
            rows: n rows that drafted. confidence: [n, G], as the head gave it, of the G drafted positions.
            survival: [n, G], of the corrected confidence.
            lengths, accepted: [n], drafts verified and drafts accepted.
        """
        tested = np.arange(confidence.shape[1]) < np.minimum(accepted + 1, lengths)[:, None]
        promised = confidence * tested
        self.expected[rows] = constants.ROW_DECAY * self.expected[rows] + promised.sum(axis=1)
        self.accepted[rows] = constants.ROW_DECAY * self.accepted[rows] + accepted
        curves = self._whole(survival)
        self.mean[rows] += constants.LAST_ROUND * (curves - self.mean[rows])
        counts = tested.sum(axis=0)
        passed = (accepted[:, None] > np.arange(confidence.shape[1])).sum(axis=0)
        self.shared.learn(counts, passed, promised.sum(axis=0))
        pool = self.shared.correction
        self.corrections = pool * (self.accepted + constants.PRIOR) / (pool * self.expected + constants.PRIOR)

    def add(self, rows: int) -> None:
        """Take in so many rows behind the others."""
        curves = np.tile(self.shared.curve, (rows, 1))
        self.mean = np.concatenate([self.mean, curves])
        self.expected, self.accepted = (np.append(x, np.zeros(rows)) for x in (self.expected, self.accepted))
        self.corrections = np.append(self.corrections, np.full(rows, self.shared.correction))

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.mean = self.mean[rows]
        self.expected, self.accepted = self.expected[rows], self.accepted[rows]
        self.corrections = self.corrections[rows]

    def _whole(self, curves: np.ndarray) -> np.ndarray:
        """Curves [n, G] of the drafted positions, continued to the whole block by running acceptance."""
        drafted = curves.shape[1]
        if drafted == self.mean.shape[1]:
            return curves
        rest = survival_of(self.shared.confidence[drafted:])
        return np.concatenate([curves, curves[:, -1:] * rest], axis=1)


def corrected(confidence: Numbers, corrections: Numbers) -> Numbers:
    """Survival [R, G] from confidence [R, G] and factors [R] on it."""
    return survival_of((confidence * corrections[:, None]).clip(max=1.0))
