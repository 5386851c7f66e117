"""Decides every round which rows draft, how many positions, and how many of the drafts are verified.

The head's `generation_config` says which of the two schedules runs: "load" weighs expected tokens against step times,
"constant" always drafts and verifies `num_assistant_tokens`.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from .algorithm import admit, at_size, best_length, cut, smoothed
from .cost import CostTable
from .estimates import LEAST_CERTAIN, MOST_CERTAIN, Experience, RowEstimates
from .horizon import seconds_to_end
from .load import Load
from .plan import NO_DRAFT, Costs, Plan, Step
from .settings import Settings

# Rounds without a draft before a call, or a row among others that draft, is tried again, at most.
MOST_PATIENCE, ROW_PATIENCE = 256, 8
# What deciding in the middle of a draft, and packing, have to bring to be worth their own cost.
STOPPING_PAYS, PACKING_PAYS = 1.08, 1.15
# How much sooner than without drafts a batch must be expected to end for drafting to begin with a call, to go on, and
# to begin again after a rest; and how much sooner than with the present length for a longer one to be tried. To go to
# and fro costs more than either, and what drafts cost is only seen while they are made: where neither is clearly
# better, a call goes on as it began, with drafts.
BEGIN_AT, GO_ON_AT, BEGIN_AGAIN_AT, LENGTHEN_AT = 0.96, 0.93, 1.0, 1.03
# Of lengths about as good as the best the shortest is taken. In a batch rows differ by more than is known of them, and
# the one that it ends with is mostly one for which longer drafts do little; for a single row it is what wastes least.
AS_GOOD = 1.01
# A row whose drafts have kept less than this share of what their confidence promised does not draft even to end with
# the others; a promise is so many tokens.
HOPELESS, PROMISE = 0.05, 6.0
# Rows that try whether drafts have come to be worth their cost; each has all its context to read first.
PROBING = 1
POWERS = [1 << i for i in range(16)]
# Confidence that is worth less than this share of what it says.
DISTRUSTED = 0.7
# Rounds that a plan is used for: at first, and at most, as one that is found right again lasts twice as long.
PLAN_LASTS, PLAN_LASTS_AT_MOST = 6, 16
# Where drafts bring less than this, one plan in so many does without: what a step costs is only known of steps that are
# taken.
LOOK_EVERY, LOOKS_LIKE = 12, 1.08


class ConstantSchedule:
    """Drafts and verifies the same number of positions every round, whatever the load.

    Args:
        settings: of the head. shared: what is known of the pair. rows: of the call.
    """

    def __init__(self, settings: Settings, shared: Experience, rows: int):
        self.settings = settings
        self.estimates = RowEstimates(shared, rows)

    def plan(self, rooms: list[int], context: int, load: Load, waiting: int = 0) -> Plan:
        """What to draft.

        Args:
            rooms: [R], drafts that each row could still commit. context: tokens of the longest row. load: of the
                device. waiting: tokens of a row that a draft has to read first, beyond those of a round or two.
        """
        length = min(self.settings.most, max(rooms))
        return Plan(list(range(len(rooms))), length, length) if length > 0 else NO_DRAFT

    def walk(self, plan: Plan) -> Callable[[float], bool] | None:
        """What decides, given the confidence of one position after the other, whether it is drafted; `None` where
        `plan` has decided. Losslessness asks that this does not depend on what is drafted there, and it does not: the
        confidence of a position sees only the tokens before it."""
        return None

    def choose(self, plan: Plan, survival: np.ndarray, rooms: list[int]) -> np.ndarray:
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
        corrections = torch.from_numpy(self.estimates.corrections)
        corrections = corrections.to(confidence.device, confidence.dtype, non_blocking=True)
        return (confidence * corrections[:, None]).clamp(LEAST_CERTAIN, MOST_CERTAIN).cumprod(dim=1)

    def observe(self, step: Step, draft_seconds: float, step_seconds: float) -> None:
        """Learn from the times of a round: its draft, and everything behind it."""

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.estimates.keep(rows)

    def _confident(self, survival: np.ndarray) -> np.ndarray:
        """[R] drafts before the first whose survival is below the threshold."""
        if self.settings.threshold is None:
            return survival.any(axis=1) * survival.shape[1]
        return (survival >= self.settings.threshold).sum(axis=1)


class SyncedSchedule(ConstantSchedule):
    """Drafts as many positions in every round, whether there is room for them or not: processes that wait for each
    other in every pass must make the same passes."""

    def plan(self, rooms, context, load, waiting=0):
        return Plan(list(range(len(rooms))), self.settings.most, self.settings.most)


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
        # The last plan, the load it was made for, in how many rounds it has been used, and for how many it is good.
        # idle: rounds that each row had gone without a draft then.
        self.last, self.situation, self.age, self.lasts = NO_DRAFT, None, 0, PLAN_LASTS
        self.plans = 0

    def plan(self, rooms, context, load, waiting=0):
        limit = min(max(rooms), self.settings.most)
        if limit <= 0:
            return NO_DRAFT
        self.age += 1
        if not self.last.rows:
            self.estimates.shared.rested += 1
        if self._is_out_of_date(limit, load):
            self._renew(np.array(rooms), context, load, waiting)
        return self.last

    def _is_out_of_date(self, limit: int, load: Load) -> bool:
        if self.last.rows:
            return self.age > self.lasts or self.last.probe or limit < self.last.most
        return self.estimates.shared.rested > self.estimates.shared.patience or load != self.situation

    def _renew(self, rooms: np.ndarray, context: int, load: Load, waiting: int) -> None:
        shared = self.estimates.shared
        self.idle += self.age
        self.idle[self.last.rows] = 0
        plan = self._best(rooms, context, load, waiting)
        waited = not self.last.rows and shared.rested > shared.patience
        if self.last.probe and shared.last_rate > 0.5 and shared.correction < DISTRUSTED:
            # Drafts that had failed succeed: worth another look soon.
            shared.patience = max(1, shared.patience // 4)
        if plan.rows:
            shared.patience = 1
        elif waited:
            shared.patience = min(2 * shared.patience, MOST_PATIENCE)
            rested = np.argsort(-self.idle, kind="stable")[:PROBING]
            plan = Plan(sorted(rested.tolist()), 1, 1, self.packs, len(rested), probe=True)
        if plan.rows:
            shared.rested = 0
        confirmed = (plan.rows, plan.length) == (self.last.rows, self.last.length)
        self.lasts = min(2 * self.lasts, PLAN_LASTS_AT_MOST) if confirmed else PLAN_LASTS
        self.last, self.situation, self.age = plan, load, 0

    def walk(self, plan):
        if plan.walk is None:
            return None
        seconds, threshold = plan.walk, self.settings.threshold or 0.0
        correction = self.estimates.corrections[0]
        alive, tokens, k = 1.0, 1.0, 0

        def goes_on(confidence: float) -> bool:
            nonlocal alive, tokens, k
            before, k = tokens, k + 1
            alive *= min(max(confidence * correction, LEAST_CERTAIN), MOST_CERTAIN)
            tokens += alive
            return alive >= threshold and tokens * seconds[k - 1] > before * seconds[k]

        return goes_on

    def choose(self, plan, survival, rooms):
        most = super().choose(plan, survival, rooms)
        if plan.probe:
            return np.minimum(rooms, survival.any(axis=1))
        if not plan.packed:
            # A single row: every position was admitted before it was drafted, and to drop one now would depend on what
            # it is. Several: a column was paid for by all rows, whatever becomes of some.
            return most
        rows, drafted = survival.shape
        admissible = survival if most.min() == drafted else survival * (np.arange(drafted) < most[:, None])
        sizes = plan.costs.packed if self.greedy else smoothed(plan.costs.packed)
        seconds = plan.costs.draft[drafted - 1] + at_size(sizes, 1 + np.arange(rows * drafted + 1) / rows)
        return admit(admissible, rows, seconds, self.greedy)

    def choose_ahead(self, plan, confidence, rooms):
        drafted = torch.zeros_like(rooms).index_fill_(0, torch.tensor(plan.rows).to(rooms.device), 1)
        most = super().choose_ahead(plan, confidence, rooms) * drafted
        if plan.probe:
            return most
        if not plan.packed:
            return most.clamp(max=max(1, plan.budget // len(plan.rows)))
        alive = self._survival_ahead(confidence) * drafted[:, None]
        positions = torch.arange(confidence.shape[1], device=rooms.device)
        return torch.minimum(cut(alive * (positions < most[:, None]), plan.budget), most)

    def keep(self, rows):
        super().keep(rows)
        self.idle = self.idle[rows]
        # Where many are gone another length may be right; a plan outlives a row.
        if self.situation is not None and 2 * len(rows) <= self.situation.rows:
            self.lasts = PLAN_LASTS
        drafting = set(self.last.rows)
        self.last = replace(self.last, rows=[i for i, row in enumerate(rows) if row in drafting])

    def observe(self, step, draft_seconds, step_seconds):
        if step.waiting:
            self.table.observe("start", step.drafting, step.waiting, 1, draft_seconds)
        elif step.drafted:
            self.table.observe("draft", step.drafting, step.context, step.drafted, draft_seconds)
        kind = "packed" if step.packed else "verify"
        self.table.observe(kind, step.rows, step.context, step.tokens / step.rows, step_seconds)

    # -- Searching ----------------------------------------------------------------------------------------------

    def _best(self, rooms: np.ndarray, context: int, load: Load, waiting: int) -> Plan:
        """The plan that earlier rounds suggest."""
        rows, busy = len(rooms), load.total / len(rooms)
        costs = Costs(*(self.table.seconds(kind, load.total, context) for kind in ("verify", "packed", "draft")))
        allowed = np.arange(self.estimates.recent.shape[2]) < np.minimum(rooms, self.settings.most)[:, None]
        worth = self.estimates.recent * allowed
        if self.settings.threshold is not None:
            worth = worth * (worth >= self.settings.threshold)
        if rows == 1:
            return self._of_one(worth[:, 0], costs)
        mean = self.estimates.mean * allowed
        length = self._first_to_end(rooms, mean, context, busy, waiting)
        if length == 0:
            return NO_DRAFT
        everybody, packed = list(range(rows)), False
        columns = rows + worth[:, :, :length].sum(axis=(1, 2)).mean()
        theta, budget = columns / (costs.draft[length - 1] + costs.verify[length]), length * rows
        if self.packs:
            best, its_length, count = best_length(worth, rows, costs.draft, costs.packed, 1 / rows)
            if best > PACKING_PAYS * theta:
                theta, length, budget, packed = best, its_length, round(count), True
        plan = Plan(everybody, length, length, packed, budget, theta, costs=costs)
        return replace(plan, rows=self._without_losers(plan, mean, rooms, context, busy))

    def _first_to_end(self, rooms: np.ndarray, survival: np.ndarray, context: int, busy: float, waiting: int) -> int:
        """Drafts to verify of each row, for the batch to end soonest; see `horizon`."""
        counts = [n for n in POWERS if n < len(rooms)] + [len(rooms)]
        verify, draft = ([self.table.seconds(kind, n * busy, context) for n in counts] for kind in ("verify", "draft"))
        seconds = np.stack(verify, axis=1)
        seconds[1:] += np.stack(draft, axis=1)
        ends = seconds_to_end(rooms + 1, survival, self.estimates.shared.hazard, np.array(counts), seconds)
        if waiting:
            ends[1:] += self.table.catching_up(len(rooms) * busy, waiting)
        best = self._length(ends[1:])
        if ends[0] < self._pays_at * ends[best]:
            return 0
        self.plans += 1
        looks = self.plans % LOOK_EVERY == 0 and ends[0] < LOOKS_LIKE * ends[best]
        return 0 if looks else best

    def _length(self, seconds: np.ndarray) -> int:
        """The drafts to make where 1, 2, .. G of them take so many `seconds` [G] for the same."""
        best = 1 + int((seconds <= AS_GOOD * seconds.min()).argmax())
        present = self.last.length
        stays = self._drafts and present < best and seconds[present - 1] < LENGTHEN_AT * seconds[best - 1]
        return present if stays else best

    @property
    def _drafts(self) -> bool:
        """Whether the last plan was to draft, and not only to see how drafts fare."""
        return bool(self.last.rows) and not self.last.probe

    @property
    def _pays_at(self) -> float:
        """How much sooner than without drafts a batch must end with them."""
        if self._drafts:
            return GO_ON_AT
        return BEGIN_AT if self.situation is None else BEGIN_AGAIN_AT

    def _of_one(self, worth: np.ndarray, costs: Costs) -> Plan:
        """The plan of about the highest Theta for a single row, whose survival [H, G] is a sample of what is to come;
        no draft where that is as good."""
        rates = (1 + worth.mean(axis=0).cumsum()) / (costs.draft + costs.verify[1:])
        length = self._length(1 / rates)
        theta = rates[length - 1]
        plan = Plan([0], length, length, budget=length, theta=theta, costs=costs)
        if not self.runs_ahead:
            walk = _walk(costs)
            # What stopping early would have brought in the rounds of the sample.
            price = theta * np.diff(walk)
            taken = np.logical_and.accumulate((worth > price) & (worth > 0), axis=1)
            stopping = (1 + (worth * taken).sum(axis=1)).mean() / walk[taken.sum(axis=1)].mean()
            if stopping > STOPPING_PAYS * theta:
                most = int(worth.any(axis=0).sum())
                plan = replace(plan, most=max(most, length), theta=stopping, walk=walk.tolist())
        return plan if plan.theta > 1 / costs.verify[0] else NO_DRAFT

    def _without_losers(self, plan: Plan, mean: np.ndarray, rooms: np.ndarray, context: int, busy: float) -> list[int]:
        """The rows of the plan whose drafts bring more than drafting them costs, those that would end after all others
        without drafts and are not hopeless, and those that have rested for long.

        Args:
            mean: [R, G], survival of the drafts of all rows in earlier rounds.
        """
        rows = np.array(plan.rows)
        if len(rows) == 1:
            return plan.rows
        fewer = len(rows) // 2
        seconds = plan.costs.draft - self.table.seconds("draft", fewer * busy, context)
        price = plan.theta * seconds[plan.length - 1] / (len(rows) - fewer)
        value = mean[rows, : plan.length].sum(axis=1)
        promised, kept = self.estimates.expected[rows], self.estimates.accepted[rows]
        hopeless = (promised > PROMISE) & (kept < HOPELESS * promised)
        late = (rooms[rows] + 1 > ((rooms[rows] + 1) / (1 + value)).max()) & ~hopeless
        kept = rows[(value > price) | late | (self.idle[rows] >= ROW_PATIENCE)]
        return kept.tolist() or plan.rows


def _walk(costs: Costs) -> np.ndarray:
    """[block + 1] smoothed seconds of a round of one row that drafts and verifies 0, 1, .. positions."""
    before = max(2 * costs.draft[0] - costs.draft[1:2].sum(), 0.0) if len(costs.draft) > 1 else 0.0
    return smoothed(np.concatenate(([before], costs.draft)) + costs.verify)
