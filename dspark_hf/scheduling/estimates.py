"""How likely drafts survive: the head's confidence, corrected by what verification has shown so far.

Everything here learns from rounds that are over, so that a schedule built on it leaks nothing about this round's drafts.
"""

from dataclasses import dataclass

import numpy as np

from .algorithm import survival

# Tokens of evidence that the confidence is right as it is, before verification is believed over it.
PRIOR = 4.0
# Evidence fades: half of it is forgotten after this many tested drafts of all rows, or rounds of one row.
POOL_HALF_LIFE, ROW_HALF_LIFE = 512.0, 8.0
# A head without a confidence head, before anything is known of it.
FIRST_GUESS = 0.7
LEAST_CERTAIN, MOST_CERTAIN = 0.001, 0.99
# Drafts, of so many rows and rounds together, that stand for what the next round may bring.
SAMPLE = 16


@dataclass
class Experience:
    """What is known of a head with one target, shared by all rows and calls.

    tested[k], accepted[k]: drafts at position k that were verified after all before them were accepted, and those of
    them that were accepted. expected: the sum of their confidences. curve[k]: mean survival of position k, from
    `evidence` drafts. patience: rounds to wait before drafting is tried again where it does not pay.
    """

    tested: np.ndarray
    accepted: np.ndarray
    curve: np.ndarray
    expected: float = 0.0
    evidence: float = 0.0
    patience: int = 1

    @classmethod
    def fresh(cls, block_size: int) -> "Experience":
        nothing = np.zeros(block_size)
        return cls(nothing, nothing.copy(), survival(np.full(block_size, FIRST_GUESS)))

    @property
    def confidence(self) -> np.ndarray:
        """[G] running acceptance by position, the estimate of a head without a confidence head."""
        return (self.accepted + PRIOR * FIRST_GUESS) / (self.tested + PRIOR)

    @property
    def correction(self) -> float:
        """Accepted drafts over those that the confidence promised."""
        return (self.accepted.sum() + PRIOR) / (self.expected + PRIOR)

    def learn(self, tested: np.ndarray, accepted: np.ndarray, expected: float, curves: np.ndarray) -> None:
        """Add a round: counts by position [G], the sum of tested confidences, and survival curves [R, G]."""
        fade = 0.5 ** (tested.sum() / POOL_HALF_LIFE)
        self.tested, self.accepted = fade * self.tested + tested, fade * self.accepted + accepted
        self.expected = fade * self.expected + expected
        self.evidence = fade * self.evidence + tested.sum()
        share = tested.sum() / (self.evidence + PRIOR)
        self.curve = (1 - share) * self.curve + share * curves.mean(axis=0)


class RowEstimates:
    """What is known of the rows of a call; see [`Experience`] for what they share.

    recent: [H, R, G], survival of the drafts of the last rounds that drafted, so many that they are a sample of what a
    round may bring. expected, accepted: [R], as in `Experience`, of each row.
    """

    def __init__(self, shared: Experience, rows: int):
        self.shared = shared
        self.recent = np.tile(shared.curve, (max(1, SAMPLE // rows), rows, 1))
        self.expected, self.accepted = np.zeros(rows), np.zeros(rows)

    def corrected(self, confidence: np.ndarray, rows: list[int]) -> np.ndarray:
        """Confidence [n, G] of the given rows, times what verification has shown it to be worth."""
        return (confidence * self.corrections(rows)[:, None]).clip(LEAST_CERTAIN, MOST_CERTAIN)

    def corrections(self, rows: list[int] | slice) -> np.ndarray:
        """[n] factors on the confidence of the given rows."""
        pool = self.shared.correction
        return pool * (self.accepted[rows] + PRIOR) / (pool * self.expected[rows] + PRIOR)

    def learn(self, rows: list[int], confidence: np.ndarray, lengths: np.ndarray, accepted: np.ndarray) -> None:
        """Add a round.

        Args:
            rows: n rows that drafted. confidence: [n, G], as the head gave it, of the G drafted positions.
            lengths, accepted: [n], drafts verified and drafts accepted.
        """
        tested = np.arange(confidence.shape[1]) < np.minimum(accepted + 1, lengths)[:, None]
        expected = (confidence * tested).sum(axis=1)
        fade = 0.5 ** (1 / ROW_HALF_LIFE)
        self.expected[rows] = fade * self.expected[rows] + expected
        self.accepted[rows] = fade * self.accepted[rows] + accepted
        curves = self._whole(survival(self.corrected(confidence, rows)))
        self.recent[:-1, rows] = self.recent[1:, rows]
        self.recent[-1, rows] = curves
        block = len(self.shared.curve)
        self.shared.learn(_at_least(tested.sum(axis=1), block), _at_least(accepted, block), expected.sum(), curves)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.recent = self.recent[:, rows]
        self.expected, self.accepted = self.expected[rows], self.accepted[rows]

    def _whole(self, curves: np.ndarray) -> np.ndarray:
        """Curves [n, G] of the drafted positions, continued to the whole block as the pool's curve goes on."""
        drafted, shared = curves.shape[1], self.shared.curve
        rest = shared[drafted:] / shared[drafted - 1]
        return np.concatenate([curves, curves[:, -1:] * rest], axis=1)


def _at_least(counts: np.ndarray, block: int) -> np.ndarray:
    """[block] how many of the counts are at least 1, 2, .."""
    return (counts[:, None] > np.arange(block)).sum(axis=0)
