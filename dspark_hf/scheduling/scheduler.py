"""Decides every round which rows draft, how many positions, and how many of the drafts are verified.

The head's `generation_config` says which of the two schedules runs: "load" weighs expected tokens against step times,
"constant" always drafts and verifies `num_assistant_tokens`.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import GenerationConfig

from .algorithm import admit, at_size, best_length, cut, smoothed, survival
from .cost import KINDS, CostTable
from .estimates import LEAST_CERTAIN, MOST_CERTAIN, Experience, RowEstimates
from .load import Load

SCHEDULES = ("load", "constant")
# Rounds without a draft before a call, or a row among others that draft, is tried again, at most.
MOST_PATIENCE, ROW_PATIENCE = 128, 16


@dataclass(frozen=True)
class Settings:
    """The switch, as a head's `generation_config` has it.

    most: positions to draft at most. schedule: "load" or "constant". threshold: drafts whose survival is lower are not
    verified; `None` for no such limit.
    """

    most: int
    schedule: str
    threshold: float | None

    @classmethod
    def read(cls, config: GenerationConfig, block_size: int) -> "Settings":
        """Raises ValueError for values that mean nothing to a DSpark head."""
        most = block_size if config.num_assistant_tokens is None else config.num_assistant_tokens
        schedule = config.num_assistant_tokens_schedule or "load"
        threshold = config.assistant_confidence_threshold
        if not isinstance(most, int) or most < 1:
            raise ValueError(
                f"`head.generation_config.num_assistant_tokens` must be 1 or more, got {most!r}. To decode without "
                "drafts leave out `assistant_model`."
            )
        if schedule not in SCHEDULES:
            raise ValueError(
                f"`head.generation_config.num_assistant_tokens_schedule` must be one of {', '.join(SCHEDULES)}, got "
                f"{schedule!r}."
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(
                f"`head.generation_config.assistant_confidence_threshold` must be between 0 and 1, got {threshold!r}."
            )
        return cls(min(most, block_size), schedule, threshold)


@dataclass(frozen=True)
class Costs:
    """Seconds of this round's possible steps. verify, packed: [block + 1] for 1, 2, .. tokens a row, evenly and
    unevenly spread. draft: [block] for 1, 2, .. positions, by all rows."""

    verify: np.ndarray
    packed: np.ndarray
    draft: np.ndarray


@dataclass(frozen=True)
class Plan:
    """What to draft, decided before the draft.

    rows: those that draft. length: positions to draft; where drafting may stop at any of them, how many are expected.
    most: the limit then, else the same. packed: whether rows may verify different lengths. budget: drafts of all rows
    that are worth verifying, by what earlier rounds were like; theta: tokens a second then. probe: whether
    this is only to see how drafts fare. costs: what the plan was made with.
    walk: [block + 1] smoothed seconds of a round that drafts and verifies 0, 1, .. positions, where it may stop early.
    """

    rows: list[int]
    length: int
    most: int
    packed: bool = False
    budget: int = 0
    theta: float = 0.0
    probe: bool = False
    costs: Costs | None = None
    walk: np.ndarray | None = None


NO_DRAFT = Plan([], 0, 0)


@dataclass(frozen=True)
class Step:
    """The shape of a round: `drafting` rows drafted `drafted` positions, and a pass verified `tokens` tokens of `rows`
    rows, which hold `context` tokens on average; `packed` as in [`Plan`]."""

    drafting: int
    drafted: int
    rows: int
    tokens: int
    packed: bool
    context: float


class ConstantSchedule:
    """Drafts and verifies the same number of positions every round, whatever the load.

    Args:
        settings: of the head. shared: what is known of the pair. rows: of the call.
    """

    def __init__(self, settings: Settings, shared: Experience, rows: int):
        self.settings = settings
        self.estimates = RowEstimates(shared, rows)

    def plan(self, rooms: np.ndarray, context: float, load: Load) -> Plan:
        """What to draft.

        Args:
            rooms: [R], drafts that each row could still commit. context: mean tokens of a row. load: of the device.
        """
        length = min(self.settings.most, int(rooms.max()))
        return Plan(list(range(len(rooms))), length, length) if length > 0 else NO_DRAFT

    def survival(self, rows: list[int], confidence: np.ndarray) -> np.ndarray:
        """[n, G] of the given rows, from the confidence of their head."""
        return survival(self.estimates.corrected(confidence, rows))

    def goes_on(self, plan: Plan, survival: np.ndarray) -> bool:
        """Whether to draft one more position, given the survival [k] of k positions, that one included. It must not
        depend on what is drafted there, and does not: confidence sees only the tokens before."""
        return True

    def choose(self, plan: Plan, survival: np.ndarray, rooms: np.ndarray) -> np.ndarray:
        """Lengths [R] to verify.

        Args:
            survival: [R, G] of the drafts, 0 where none was made. rooms: as in `plan`.
        """
        return np.minimum(self._confident(survival), rooms)

    def choose_ahead(self, plan: Plan, confidence: torch.Tensor, rooms: torch.Tensor) -> torch.Tensor:
        """The same where the host does not wait to see this round's confidence [R, G]: lengths [R] on the device."""
        if self.settings.threshold is None:
            return rooms.clamp(max=plan.length)
        alive = self._survival_ahead(confidence) >= self.settings.threshold
        return torch.minimum(alive.sum(dim=1), rooms)

    def _survival_ahead(self, confidence: torch.Tensor) -> torch.Tensor:
        corrections = torch.from_numpy(self.estimates.corrections(slice(None)))
        corrections = corrections.to(confidence.device, confidence.dtype, non_blocking=True)
        return (confidence * corrections[:, None]).clamp(LEAST_CERTAIN, MOST_CERTAIN).cumprod(dim=1)

    def observe(self, step: Step, draft_seconds: float, step_seconds: float) -> None:
        """Learn from the times of a round: its draft, and everything behind it."""

    def learn(self, plan: Plan, confidence: np.ndarray, lengths: np.ndarray, accepted: np.ndarray) -> None:
        """Remember a round; arguments as in `RowEstimates.learn`."""
        self.estimates.learn(plan.rows, confidence, lengths, accepted)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.estimates.keep(rows)

    def _confident(self, survival: np.ndarray) -> np.ndarray:
        """[R] drafts before the first whose survival is below the threshold."""
        if self.settings.threshold is None:
            return np.full(len(survival), survival.shape[1])
        return (survival >= self.settings.threshold).sum(axis=1)


class LoadSchedule(ConstantSchedule):
    """Weighs expected tokens against step times.

    Args:
        table: step times of the pair on this device. greedy: whether decoding is, so that any schedule is lossless.
        packs: whether rows of different lengths can be verified in one pass without padding. runs_ahead: whether the
            host queues work for the device without waiting, so that this round's confidences come too late.
    """

    def __init__(
        self,
        settings: Settings,
        shared: Experience,
        rows: int,
        table: CostTable,
        greedy: bool,
        packs: bool,
        runs_ahead: bool,
    ):
        super().__init__(settings, shared, rows)
        self.table, self.greedy, self.packs, self.runs_ahead = table, greedy, packs, runs_ahead
        self.idle = np.zeros(rows, dtype=int)
        self.rounds_without = 0
        self.hopeless: tuple[int, int] | None = None

    def plan(self, rooms: np.ndarray, context: float, load: Load) -> Plan:
        if rooms.max() <= 0:
            return NO_DRAFT
        shared, situation = self.estimates.shared, (load.rows, load.total)
        self.rounds_without += 1
        due = self.rounds_without > shared.patience
        if situation == self.hopeless and not due:
            return NO_DRAFT
        plan = self._best(rooms, context, load)
        self.hopeless = None if plan.rows else situation
        if plan.rows:
            shared.patience = 1
        elif due:
            shared.patience = min(2 * shared.patience, MOST_PATIENCE)
            plan = Plan(list(range(len(rooms))), 1, 1, probe=True)
        if plan.rows:
            self.rounds_without = 0
        self.idle += 1
        self.idle[plan.rows] = 0
        return plan

    def goes_on(self, plan, survival):
        if plan.walk is None:
            return True
        if self.settings.threshold is not None and survival[-1] < self.settings.threshold:
            return False
        tokens, k = 1 + survival.sum(), len(survival)
        return tokens / plan.walk[k] > (tokens - survival[-1]) / plan.walk[k - 1]

    def choose(self, plan, survival, rooms):
        most = super().choose(plan, survival, rooms)
        if plan.probe:
            return np.minimum(rooms, survival.any(axis=1))
        if plan.walk is not None and not self.greedy:
            # Every position was admitted before it was drafted; to drop one now would depend on what it is.
            return most
        rows, drafted = survival.shape
        admissible = survival * (np.arange(drafted) < most[:, None])
        sizes = plan.costs.packed if plan.packed else plan.costs.verify
        if not self.greedy:
            sizes = smoothed(sizes)
        if not plan.packed:
            seconds = plan.costs.draft[drafted - 1] + sizes[: drafted + 1]
            columns = admit(admissible.sum(axis=0)[None], rows, seconds, self.greedy)
            return np.minimum(columns, most)
        seconds = plan.costs.draft[drafted - 1] + at_size(sizes, 1 + np.arange(rows * drafted + 1) / rows)
        return admit(admissible, rows, seconds, self.greedy)

    def choose_ahead(self, plan, confidence, rooms):
        most = super().choose_ahead(plan, confidence, rooms)
        if plan.probe:
            return most
        if not plan.packed:
            return most.clamp(max=max(1, plan.budget // len(plan.rows)))
        drafted = torch.zeros_like(rooms).index_fill_(0, torch.tensor(plan.rows).to(rooms.device), 1)[:, None]
        alive = self._survival_ahead(confidence) * drafted
        positions = torch.arange(confidence.shape[1], device=rooms.device)
        return torch.minimum(cut(alive * (positions < most[:, None]), plan.budget), most)

    def keep(self, rows):
        super().keep(rows)
        self.idle = self.idle[rows]

    def observe(self, step, draft_seconds, step_seconds):
        if step.drafted:
            self.table.observe("draft", step.drafting, step.context, step.drafted, draft_seconds)
        kind = "packed" if step.packed else "verify"
        self.table.observe(kind, step.rows, step.context, step.tokens / step.rows, step_seconds)

    # -- Searching ----------------------------------------------------------------------------------------------

    def _best(self, rooms: np.ndarray, context: float, load: Load) -> Plan:
        """The plan of highest Theta over rows, positions and ways to verify, as far as earlier rounds tell."""
        rows, busy = len(rooms), load.total / len(rooms)
        costs = Costs(*(self.table.seconds(kind, load.total, context) for kind in KINDS))
        positions = np.arange(self.estimates.recent.shape[2])
        worth = self.estimates.recent * (positions < np.minimum(rooms, self.settings.most)[:, None])
        if self.settings.threshold is not None:
            worth = worth * (worth >= self.settings.threshold)
        order = np.argsort(-worth.sum(axis=(0, 2)), kind="stable")
        count, plan = rows, NO_DRAFT
        # All rows, or where that does not pay the most promising half of them, and so on.
        while count and not plan.rows:
            chosen = np.sort(order[:count])
            draft = costs.draft if count == rows else self.table.seconds("draft", count * busy, context)
            plan = self._of_rows(worth[:, chosen], chosen, rows, replace(costs, draft=draft))
            count //= 2
        return replace(plan, rows=self._without_losers(plan, worth, context, busy)) if plan.rows else plan

    def _of_rows(self, worth: np.ndarray, drafting: np.ndarray, rows: int, costs: Costs) -> Plan:
        """The best plan when the rows `drafting` [n] of `rows` rows draft, whose survival [H, n, G] is a sample of
        what is to come; no draft where that is as good."""
        best, plan = rows / costs.verify[0], NO_DRAFT
        for packed in (False, True) if self.packs and rows > 1 else (False,):
            # A draft costs one token in a packed pass, a column of the whole batch otherwise.
            units = worth if packed else worth.sum(axis=1, keepdims=True)
            sizes, share = (costs.packed, 1 / rows) if packed else (costs.verify, 1)
            theta, length, count = best_length(units, rows, costs.draft, sizes, share)
            if theta > best:
                budget = round(count) if packed else round(count) * len(drafting)
                best = theta
                plan = Plan(drafting.tolist(), length, length, packed, budget, theta, costs=costs)
        if plan.rows and rows == 1 and not self.runs_ahead:
            plan = replace(plan, most=int(worth.any(axis=(0, 1)).sum()), walk=_walk(costs))
        return plan

    def _without_losers(self, plan: Plan, worth: np.ndarray, context: float, busy: float) -> list[int]:
        """The rows of the plan whose drafts bring more than drafting them costs, and those that have rested for long.

        Args:
            worth: [H, R, G], as in `_of_rows`, of all rows.
        """
        rows = np.array(plan.rows)
        if len(rows) == 1:
            return plan.rows
        fewer = len(rows) // 2
        seconds = plan.costs.draft - self.table.seconds("draft", fewer * busy, context)
        price = plan.theta * seconds[plan.length - 1] / (len(rows) - fewer)
        value = worth[:, rows, : plan.length].sum(axis=2).mean(axis=0)
        kept = rows[(value > price) | (self.idle[rows] >= ROW_PATIENCE)]
        return kept.tolist() or plan.rows


def _walk(costs: Costs) -> np.ndarray:
    """[block + 1] smoothed seconds of a round of one row that drafts and verifies 0, 1, .. positions."""
    before = max(2 * costs.draft[0] - costs.draft[1:2].sum(), 0.0) if len(costs.draft) > 1 else 0.0
    return smoothed(np.concatenate(([before], costs.draft)) + costs.verify)
