"""What a step costs: its seconds as a few coefficients, learnt from the rounds that generation runs anyway.

Nothing is measured for its own sake. A model begins with a guess that is right in tendency, in units of a plain step
(one token of one row), takes the length of that step from the first round, and learns the rest from what follows. How
unsure it is of a step that was not taken for long is known, so that a schedule can try it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import constants

# Tokens of context that are a unit of one.
CONTEXT = 256


@dataclass
class Line:
    """Seconds as a linear function of features, none of which makes a step cheaper.

    mean: [k], what a unit of each feature costs. information: [k, k], the inverse of its covariance.
    """

    mean: np.ndarray
    information: np.ndarray

    @classmethod
    def guess(cls, mean: list[float], spread: list[float]) -> "Line":
        return cls(np.array(mean), np.diag(1 / np.square(spread)))

    def seconds(self, features: np.ndarray) -> np.ndarray:
        """[...] of features [..., k]."""
        return features @ self.mean

    def variance(self, features: np.ndarray) -> np.ndarray:
        """[...], of what `seconds` gives."""
        return (features * np.linalg.solve(self.information, features.T).T).sum(axis=-1)

    def learn(self, features: np.ndarray, seconds: float) -> None:
        """Take in one step: recursive least squares that forgets only in the direction of the features [k], so that
        what is known of other steps stays known (Cao and Schwartz 2000)."""
        expected = features @ self.mean
        noise = (constants.NOISE * expected) ** 2
        most = constants.MOST_SURPRISED * math.sqrt(noise + self.variance(features))
        surprise = min(max(seconds - expected, -most), most)
        known = self.information @ features
        faded = 1 - 0.5 ** (1 / constants.HALF_LIFE)
        self.information -= faded * np.outer(known, known) / (features @ known)
        self.information += np.outer(features, features) / noise
        self.mean = self.mean + np.linalg.solve(self.information, features) * (surprise / noise)
        if (self.mean < 0).any():
            self._raise()

    def _raise(self) -> None:
        """Move to the likeliest mean that has no negative entry, one entry after the other."""
        covariance = np.linalg.inv(self.information)
        for _ in self.mean:
            lowest = self.mean.argmin()
            if self.mean[lowest] >= 0:
                break
            self.mean = self.mean - covariance[:, lowest] * (self.mean[lowest] / covariance[lowest, lowest])
        self.mean = self.mean.clip(min=0)


class CostModel:
    """Seconds of the steps of a pair on its device.

    Args:
        gamma: of the head. share: layers of the head over those of the target. device: its type; all but a CPU
            compute many tokens in about the time of one. window: tokens of context that a draft sees at most, `None`
            for all.

    Attributes:
        pace: seconds of a plain step; `None` before the first round.
    """

    def __init__(self, gamma: int, share: float, device: str, window: int | None = None):
        self.gamma, self.window = gamma, math.inf if window is None else window
        self.pace: float | None = None
        # Whether the pace is that of this process.
        self.is_begun = False
        token, context = (0.03, 0.03) if device == "cpu" else (0.004, 0.003)
        verify = [1 - 2 * token, token, token, context, 0.05, 0.05]
        draft = [share, share * token, 0.03, share * token, share * context, 0.3 * share * CONTEXT * token]
        self.lines = {
            "verify": Line.guess(verify, [0.3, token, token, context, 0.1, 0.1]),
            "draft": Line.guess(draft, [0.5 * share + 0.1, *draft[1:]]),
        }

    # -- What steps cost ----------------------------------------------------------------------------------------

    def verify(self, rows: float, context: float, packed: bool = False) -> np.ndarray:
        """[gamma + 1] seconds of a pass over 1, 2, .. tokens of every row, or of as many that are packed unevenly."""
        return self._seconds("verify", self._verifies(rows, context, packed))

    def draft(self, rows: float, context: float, pending: float = 0) -> np.ndarray:
        """[gamma] seconds of a draft of 1, 2, .. positions in every row.

        Args:
            context: tokens of the longest row. pending: of those the head has yet to read.
        """
        return self._seconds("draft", self._drafts(rows, context, pending))

    def unsure(self, rows: float, context: float) -> np.ndarray:
        """[gamma + 1] standard deviation of a round of 0, 1, .. drafts a row, as a share of its seconds."""
        verify, draft = self._verifies(rows, context, False), self._drafts(rows, context, 0)
        variance, seconds = (self.lines["verify"].variance(verify), self.lines["verify"].seconds(verify))
        variance[1:] += self.lines["draft"].variance(draft)
        seconds[1:] += self.lines["draft"].seconds(draft)
        return np.sqrt(variance) / np.maximum(seconds, LEAST)

    def _seconds(self, kind: str, features: np.ndarray) -> np.ndarray:
        return (self.pace or 1.0) * np.maximum(self.lines[kind].seconds(features), LEAST)

    def _verifies(self, rows: float, context: float, packed: bool) -> np.ndarray:
        return np.array([_verify(rows, n * rows, context, packed) for n in range(1, self.gamma + 2)])

    def _drafts(self, rows: float, context: float, pending: float) -> np.ndarray:
        seen = [min(tokens, self.window) for tokens in (context, pending)]
        return np.array([_draft(rows, n, *seen) for n in range(1, self.gamma + 1)])

    # -- Learning -----------------------------------------------------------------------------------------------

    def learn_verify(self, rows: int, tokens: int, context: int, packed: bool, seconds: float) -> None:
        """Take in a pass over `tokens` tokens of `rows` rows."""
        self._learn("verify", np.array(_verify(rows, tokens, context, packed)), seconds)

    def learn_draft(self, rows: int, positions: int, context: int, pending: int, seconds: float) -> None:
        """Take in a draft of so many positions in `rows` rows."""
        seen = [min(tokens, self.window) for tokens in (context, pending)]
        self._learn("draft", np.array(_draft(rows, positions, *seen)), seconds)

    def _learn(self, kind: str, features: np.ndarray, seconds: float) -> None:
        line = self.lines[kind]
        expected = max(features @ line.mean, LEAST)
        if self.pace is None or not self.is_begun:
            self.pace, self.is_begun = seconds / expected, True
        most = math.log1p(constants.MOST_SURPRISED * constants.NOISE)
        surprise = min(max(math.log(seconds / (self.pace * expected)), -most), most)
        self.pace *= math.exp(constants.PACE_SHARE * surprise)
        line.learn(features, seconds / self.pace)

    # -- Files --------------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        lines = {
            kind: {"mean": line.mean.tolist(), "information": line.information.tolist()}
            for kind, line in self.lines.items()
        }
        return {"pace": self.pace, "lines": lines}

    def take_over(self, content: dict[str, Any]) -> None:
        """Begin with what another process has learnt: the first round says how much faster or slower all is now.

        Raises:
            KeyError, TypeError, ValueError: when that means nothing.
        """
        pace, lines = float(content["pace"]), {}
        for kind, own in self.lines.items():
            line = Line(*(np.array(content["lines"][kind][part], dtype=float) for part in ("mean", "information")))
            if line.mean.shape != own.mean.shape or line.information.shape != own.information.shape:
                raise ValueError(f"{kind} has {len(line.mean)} coefficients, expected {len(own.mean)}")
            if not np.isfinite(line.mean).all() or (line.mean < 0).any() or not _is_positive(line.information):
                raise ValueError(f"{kind} holds what no step can cost")
            lines[kind] = line
        if not 0 < pace < math.inf:
            raise ValueError(f"a plain step takes {pace} seconds")
        self.pace, self.lines, self.is_begun = pace, lines, False


# No step is cheaper, in plain steps.
LEAST = 1e-3


def _is_positive(information: np.ndarray) -> bool:
    return bool(np.isfinite(information).all() and (np.linalg.eigvalsh(information) > 0).all())


def _verify(rows: float, tokens: float, context: float, packed: bool) -> list[float]:
    """Features of a pass: itself, a row, a token, context of the rows, verifying drafts, packing them."""
    return [1.0, rows, tokens, rows * context / CONTEXT, float(tokens > rows), float(packed)]


def _draft(rows: float, positions: float, context: float, pending: float) -> list[float]:
    """Features of a draft: itself, a row, a position, a position of a row, context of the rows, context still to be
    read."""
    contexts = [rows * context / CONTEXT, rows * pending / CONTEXT]
    return [1.0, rows, positions, rows * positions, *contexts]
