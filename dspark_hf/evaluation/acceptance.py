"""What the rounds of a head came to on a data set: accepted length, verify rate, acceptance, how good confidence is.

Rounds are counted as in the paper and DeepSpec's evaluation. A round proposes drafts, keeps those that become text, and
commits them with one token of the target's own, the bonus. The prefill's token belongs to no round. A round begins
while fewer tokens than the limit have been committed, and the last one counts in full. Where a draft that is kept is
the end-of-sequence token, the round ends with it: drafts behind it count as not proposed, and there is no bonus.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate, chain

import numpy as np

from ..generation.stats import DSparkStats
from ..scheduling.algorithm import survival
from .calibration import auc, brier_score, calibration_error

# Confidence is kept to so many digits.
DIGITS = 6


@dataclass(frozen=True)
class EvalRecord:
    """The rounds of one prompt, all its turns together.

    data, prompt: name of the data set, index of the prompt in it. tokens: new tokens. accepted: tokens committed a
    round, bonus included. proposed, kept: drafts verified, and drafts that became text. confidence: of the drafts
    proposed, a list a round; empty without a confidence head.
    """

    data: str
    prompt: int
    tokens: int
    accepted: list[int]
    proposed: list[int]
    kept: list[int]
    confidence: list[list[float]]

    def __add__(self, later: "EvalRecord") -> "EvalRecord":
        """The rounds of this turn and of a later one."""
        sums = {name: getattr(self, name) + getattr(later, name) for name in asdict(self) if name not in KEYS}
        return EvalRecord(self.data, self.prompt, **sums)


KEYS = ("data", "prompt")


def record_of(
    data: str, prompt: int, tokens: int, stats: DSparkStats, row: int, limit: int, with_confidence: bool
) -> EvalRecord:
    """The rounds of a row of a generation that went on for a block beyond `limit` tokens, so that its last round was
    not cut."""
    accepted, kept = stats.committed_lengths[row], stats.accepted_lengths[row]
    before = [0, *accumulate(accepted)]
    count = sum(committed < limit for committed in before[:-1])
    accepted, kept = accepted[:count], kept[:count]
    verified = stats.verified_lengths[row][:count]
    proposed = [k if k == a else v for a, k, v in zip(accepted, kept, verified, strict=True)]
    confidence = []
    if with_confidence:
        rounds = zip(stats.confidence[row], proposed, strict=False)
        confidence = [[round(c, DIGITS) for c in drafts[:number]] for drafts, number in rounds]
    return EvalRecord(data, prompt, tokens, accepted, proposed, kept, confidence)


@dataclass(frozen=True)
class PositionStats:
    """A position of the block, 1 for the first.

    proposals: rounds that proposed a draft there. acceptance: share of those in which it was kept. Of the survival that
    the confidence head gave it, `None` without such a head: survival (its mean), ece, auc (`None` when all or none were
    kept), brier.
    """

    position: int
    proposals: int
    acceptance: float
    survival: float | None = None
    ece: float | None = None
    auc: float | None = None
    brier: float | None = None


@dataclass(frozen=True)
class Result:
    """A head on a data set.

    proposals: rounds. proposal_length: drafts a proposal. accepted_length: tokens a round, bonus included (tau).
    verify_rate: tokens committed over tokens that the target's passes verified, anchors included. ece, auc, brier:
    means over the positions, each weighted by its proposals; `None` without a confidence head.
    """

    name: str
    prompts: int
    tokens: int
    proposals: int
    proposal_length: float
    accepted_length: float
    verify_rate: float
    ece: float | None
    auc: float | None
    brier: float | None
    positions: list[PositionStats]


def summarise(name: str, records: list[EvalRecord]) -> Result:
    """The rounds of all prompts of a data set, every round with the same weight.

    Raises:
        ValueError: when there was no round at all.
    """
    accepted, proposed, kept = (np.array(list(chain.from_iterable(getattr(r, key) for r in records))) for key in ROUNDS)
    if not len(accepted):
        raise ValueError(f"No round was decoded for {name}: all answers ended with their first token.")
    given = [*chain.from_iterable(r.confidence for r in records)]
    positions = [_position(k, proposed, kept, given) for k in range(proposed.max(initial=0))]
    return Result(
        name=name,
        prompts=len(records),
        tokens=sum(r.tokens for r in records),
        proposals=len(accepted),
        proposal_length=float(proposed.mean()),
        accepted_length=float(accepted.mean()),
        verify_rate=float(accepted.sum() / (proposed.sum() + len(proposed))),
        **{key: _mean(positions, key) for key in ("ece", "auc", "brier")},
        positions=positions,
    )


ROUNDS = ("accepted", "proposed", "kept")


def survivals(position: int, confidence: list[list[float]], kept: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of the rounds that proposed a draft at a position (0 for the first): its survival [N]; whether it was kept."""
    rounds = [(c, k) for c, k in zip(confidence, kept, strict=True) if len(c) > position]
    given = np.array([c[: position + 1] for c, _ in rounds])
    return survival(given)[:, -1], np.array([k > position for _, k in rounds])


def _position(k: int, proposed: np.ndarray, kept: np.ndarray, confidence: list[list[float]]) -> PositionStats:
    there = proposed > k
    base = (k + 1, int(there.sum()), float((kept[there] > k).mean()))
    if not confidence:
        return PositionStats(*base)
    given, happened = survivals(k, confidence, kept.tolist())
    scores: list[Callable] = [calibration_error, auc, brier_score]
    found = [measure(given, happened) for measure in scores]
    return PositionStats(*base, float(given.mean()), *(None if np.isnan(score) else score for score in found))


def _mean(positions: list[PositionStats], key: str) -> float | None:
    """Over positions that have it, each weighted by its proposals."""
    values = [(getattr(p, key), p.proposals) for p in positions if getattr(p, key) is not None]
    return sum(value * count for value, count in values) / sum(count for _, count in values) if values else None
