"""What a schedule and the decoding loop tell each other: what a round shall do, and what it was."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Seconds of this round's possible steps.

    verify, packed: [gamma + 1] for 1, 2, .. tokens a row, evenly and unevenly spread. draft: [gamma] for 1, 2, ..
    positions, by all rows.
    """

    verify: np.ndarray
    packed: np.ndarray
    draft: np.ndarray


@dataclass(frozen=True)
class Plan:
    """What to draft, decided before the draft.

    rows: those that draft.
    length: positions to draft.
    packed: whether rows may verify different lengths.
    budget: drafts of all rows that are worth verifying, by what earlier rounds were like.
    theta: tokens a second then.
    probe: whether this is only to see how drafts fare.
    costs: what the plan was made with.
    """

    rows: list[int]
    length: int
    packed: bool = False
    budget: int = 0
    theta: float = 0.0
    probe: bool = False
    costs: Costs | None = None

    def index(self, rows: int) -> list[int] | slice:
        """The rows that draft, of so many, as an index; that of everybody copies nothing."""
        return slice(None) if len(self.rows) == rows else self.rows


NO_DRAFT = Plan([], 0)


@dataclass(frozen=True)
class Step:
    """The shape of a round.

    drafting: rows that drafted.
    drafted: positions that they did.
    pending: tokens of each that the head had to read first; 0 for those of a round or two.
    rows: those of the pass that verified.
    tokens: those of the pass.
    packed: as in [`Plan`].
    context: tokens of the longest row.
    """

    drafting: int
    drafted: int
    pending: int
    rows: int
    tokens: int
    packed: bool
    context: int
