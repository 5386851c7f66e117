"""Decides every round which rows draft, how many positions, and how many of the drafts are verified.

The head's `generation_config` says which of the two schedules runs: "load" weighs expected tokens against step times,
"constant" always drafts and verifies `num_assistant_tokens`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from .algorithm import admit, at_size, best_length, lower_hull, top_k_by_survival
from .cost import CostModel
from .estimates import LEAST_CERTAIN, MOST_CERTAIN, AcceptanceStats, RowEstimates
from .load import Load
from .plan import NO_DRAFT, Costs, Plan, Step
from .settings import Settings

# What steers the load schedule, beside what `cost.py` and `estimates.py` learn with.
# Rounds without a draft before a probe, at most: 1, 2, 4 .. up to this, as long as drafts do not pay.
MOST_PROBE_INTERVAL = 256
# How many times the present plan's tokens a second another must promise: to go to and fro costs something too.
SWITCH = 1.02
# Rounds that a plan is used for, at first and at most: one that is found right again lasts twice as long.
PLAN_LASTS, PLAN_LASTS_AT_MOST = 2, 16
# One plan in so many tries a length beside the best, where what it costs is known worse than this (standard deviation,
# as a share of the round).
TRY_EVERY, UNSURE = 4, 0.04


class ConstantSchedule:
    """Drafts and verifies the same number of positions every round, whatever the load.

    Args:
        settings: of the head. shared: what is known of the pair. rows: of the call. runs_ahead: whether the host queues
            work for the device without waiting, so that this round's confidences come too late.
    """

    def __init__(self, settings: Settings, shared: AcceptanceStats, rows: int, runs_ahead: bool = False):
        self.settings, self.runs_ahead = settings, runs_ahead
        self.estimates = RowEstimates(shared, rows)

    def plan(self, max_drafts: list[int], context: int, load: Load, pending: int = 0) -> Plan:
        """What to draft.

        Args:
            max_drafts: [R], drafts that each row could still commit. context: tokens of the longest row. load: of the
                device. pending: tokens of a row that a draft has to read first, beyond those of a round or two.
        """
        length = min(self.settings.most, max(max_drafts))
        return Plan(list(range(len(max_drafts))), length, length) if length > 0 else NO_DRAFT

    def early_exit(self, plan: Plan) -> Callable[[float], bool] | None:
        """What decides, given the confidence of one position after the other, whether it is drafted; `None` where
        `plan` has decided. Losslessness asks that this does not depend on what is drafted there, and it does not: the
        confidence of a position sees only the tokens before it."""
        return None

    def choose(self, plan: Plan, survival: np.ndarray, max_drafts: list[int]) -> np.ndarray:
        """Lengths [R] to verify.

        Args:
            survival: [R, G] of the drafts, 0 where none was made. max_drafts: as in `plan`.
        """
        return np.minimum(self._confident(survival), max_drafts)

    def choose_on_device(self, plan: Plan, confidence: torch.Tensor, max_drafts: torch.Tensor) -> torch.Tensor:
        """The same where the host does not wait to see this round's confidence [R, G]: lengths [R] on the device.

        Args:
            max_drafts: [R], 0 for rows that did not draft.
        """
        if self.settings.threshold is None:
            return max_drafts.clamp(max=plan.length)
        alive = self._survival_on_device(confidence) >= self.settings.threshold
        return torch.minimum(alive.sum(dim=1), max_drafts)

    def _survival_on_device(self, confidence: torch.Tensor) -> torch.Tensor:
        corrections = torch.from_numpy(self.estimates.corrections)
        corrections = corrections.to(confidence.device, confidence.dtype, non_blocking=True)
        return (confidence * corrections[:, None]).clamp(LEAST_CERTAIN, MOST_CERTAIN).cumprod(dim=1)

    def observe(self, step: Step, load: Load, draft_seconds: float, step_seconds: float) -> None:
        """Learn from the times of a round: its draft, and everything behind it."""

    def add(self, rows: int) -> None:
        """Take in so many rows behind the others."""
        self.estimates.add(rows)

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

    def plan(self, max_drafts, context, load, pending=0):
        return Plan(list(range(len(max_drafts))), self.settings.most, self.settings.most)


class LoadSchedule(ConstantSchedule):
    """Weighs expected tokens against step times.

    Args:
        costs: what steps of the pair cost on this device.
        greedy: whether decoding is, so that any schedule is lossless.
        packs: whether rows of different lengths can be verified in one pass without padding.
        tiers: drafts a row that there are passes for; any number when `None`.
    """

    def __init__(
        self,
        settings: Settings,
        shared: AcceptanceStats,
        rows: int,
        costs: CostModel,
        greedy: bool,
        packs: bool,
        runs_ahead: bool,
        tiers: Sequence[int] | None = None,
    ):
        super().__init__(settings, shared, rows, runs_ahead)
        self.costs, self.greedy, self.packs = costs, greedy, packs
        self.tiers = None if tiers is None else sorted({min(length, settings.most) for length in tiers})
        # Rounds that each row had gone without a draft when the last plan was made.
        self.undrafted = np.zeros(rows, dtype=int)
        # The last plan, the load it was made for, in how many rounds it has been used, and for how many it is good.
        self.last, self.plan_load, self.plan_age, self.plan_lasts = NO_DRAFT, None, 0, PLAN_LASTS
        # Drafts a row that were found best last, whatever was tried since; before the first time `None`.
        self.length: int | None = None
        # Whether the last plan is to see what it costs.
        self.is_trial = False
        self.plans = self.rounds = 0

    def plan(self, max_drafts, context, load, pending=0):
        limit = min(max(max_drafts), self.settings.most)
        if limit <= 0 or self.costs.pace is None:
            return NO_DRAFT
        self.plan_age += 1
        if not self.last.rows:
            self.estimates.shared.undrafted_rounds += 1
        if self._is_out_of_date(limit, load):
            self._renew(np.array(max_drafts), context, load, pending)
        return self.last

    def _is_out_of_date(self, limit: int, load: Load) -> bool:
        if self.last.rows:
            return self.plan_age > self.plan_lasts or self.last.probe or limit < self.last.most
        return self.estimates.shared.undrafted_rounds > self.estimates.shared.probe_interval or load != self.plan_load

    def _renew(self, max_drafts: np.ndarray, context: int, load: Load, pending: int) -> None:
        shared = self.estimates.shared
        self.undrafted += self.plan_age
        self.undrafted[self.last.rows] = 0
        plan = self._best(max_drafts, context, load, pending)
        waited = not self.last.rows and shared.undrafted_rounds > shared.probe_interval
        if self.last.probe and shared.last_rate > shared.correction:
            # Drafts do better than they have come to be trusted: worth another look sooner.
            shared.probe_interval = max(1, shared.probe_interval // 4)
        if plan.rows:
            shared.probe_interval = 1
        elif waited:
            shared.probe_interval = min(2 * shared.probe_interval, MOST_PROBE_INTERVAL)
            # One row is enough to see how drafts fare, and has all its context to read first.
            plan = Plan([int(self.undrafted.argmax())], 1, 1, self.packs, 1, probe=True)
        if plan.rows:
            shared.undrafted_rounds = 0
        confirmed = (plan.rows, plan.length) == (self.last.rows, self.last.length)
        self.plan_lasts = min(2 * self.plan_lasts, PLAN_LASTS_AT_MOST) if confirmed else PLAN_LASTS
        if self.is_trial:
            self.plan_lasts = PLAN_LASTS
        self.last, self.plan_load, self.plan_age = plan, load, 0

    def early_exit(self, plan):
        if plan.early_exit is None:
            return None
        seconds, threshold = plan.early_exit, self.settings.threshold or 0.0
        correction = self.estimates.corrections[0]
        alive, tokens, k = 1.0, 1.0, 0

        def continue_drafting(confidence: float) -> bool:
            nonlocal alive, tokens, k
            before, k = tokens, k + 1
            alive *= min(max(confidence * correction, LEAST_CERTAIN), MOST_CERTAIN)
            tokens += alive
            return alive >= threshold and tokens * seconds[k - 1] > before * seconds[k]

        return continue_drafting

    def choose(self, plan, survival, max_drafts):
        most = super().choose(plan, survival, max_drafts)
        if plan.probe:
            return np.minimum(max_drafts, survival.any(axis=1))
        if not plan.packed:
            # A single row: every position was admitted before it was drafted, and to drop one now would depend on what
            # it is. Several: a column was paid for by all rows, whatever becomes of some.
            return most
        rows, drafted = survival.shape
        admissible = survival if most.min() == drafted else survival * (np.arange(drafted) < most[:, None])
        sizes = plan.costs.packed if self.greedy else lower_hull(plan.costs.packed)
        seconds = plan.costs.draft[drafted - 1] + at_size(sizes, 1 + np.arange(rows * drafted + 1) / rows)
        return admit(admissible, rows, seconds, self.greedy)

    def choose_on_device(self, plan, confidence, max_drafts):
        most = super().choose_on_device(plan, confidence, max_drafts)
        if plan.probe:
            return most
        if not plan.packed:
            return most.clamp(max=max(1, plan.budget // len(plan.rows)))
        alive = self._survival_on_device(confidence)
        positions = torch.arange(confidence.shape[1], device=max_drafts.device)
        return torch.minimum(top_k_by_survival(alive * (positions < most[:, None]), plan.budget), most)

    def add(self, rows):
        super().add(rows)
        self.undrafted, self.plan_lasts = np.append(self.undrafted, np.zeros(rows, dtype=int)), 0

    def keep(self, rows):
        super().keep(rows)
        self.undrafted = self.undrafted[rows]
        # Where many are gone another length may be right; a plan outlives a row.
        if self.plan_load is not None and 2 * len(rows) <= self.plan_load.rows:
            self.plan_lasts = PLAN_LASTS
        drafting = set(self.last.rows)
        self.last = replace(self.last, rows=[i for i, row in enumerate(rows) if row in drafting])

    def observe(self, step, load, draft_seconds, step_seconds):
        self.rounds += 1
        # The rows of others slow a round down that says nothing of their number; but it is better than nothing.
        if not self.costs.wants(self.rounds) or (load.others and self.costs.pace is not None):
            return
        self.costs.learn_verify(step.rows, step.tokens, step.context, step.packed, step_seconds)
        if step.drafted:
            self.costs.learn_draft(step.drafting, step.drafted, step.context, step.pending, draft_seconds, step.asks)

    # -- Searching ----------------------------------------------------------------------------------------------

    def _best(self, max_drafts: np.ndarray, context: int, load: Load, pending: int) -> Plan:
        """The plan that earlier rounds suggest."""
        rows, total, model = len(max_drafts), load.total, self.costs
        draft, packed = model.draft(total, context), model.verify(total, context, packed=True)
        costs = Costs(model.verify(total, context), packed, draft)
        allowed = np.arange(self.estimates.recent.shape[2]) < np.minimum(max_drafts, self.settings.most)[:, None]
        worth = self.estimates.recent * allowed
        if self.settings.threshold is not None:
            worth = worth * (worth >= self.settings.threshold)
        # [limit + 1], of a round of 0, 1, .. drafts a row. A pass of a tier is run whatever there is room for.
        sizes = (min(max_drafts.max(), self.settings.most) if self.tiers is None else self.tiers[-1]) + 1
        tokens = rows + np.concatenate(([0.0], worth.sum(axis=1).mean(axis=0).cumsum()))[:sizes]
        seconds = (costs.verify + np.concatenate(([0.0], draft)))[:sizes]
        if pending:
            # What the head has to read first is paid once, and is shared by the rounds to the end of the call.
            reading = model.draft(total, context, pending)[0] - draft[0]
            seconds[1:] += reading * tokens[1:] / (rows * (max_drafts.max() + 1))
        thetas = tokens / seconds
        if self.tiers is not None:
            thetas[[length for length in range(sizes) if length not in self.tiers]] = 0
        self.length = self._settled(thetas)
        # Without drafts a new plan is rare.
        tries, unsure = self.length == 0 or self.plans % TRY_EVERY == 0, model.unsure(total, context)
        length = self._tried(thetas, unsure) if tries else self.length
        self.is_trial = length != self.length or unsure[length] > UNSURE
        if length == 0:
            return NO_DRAFT
        plan = Plan(list(range(rows)), length, length, budget=length * rows, theta=thetas[length], costs=costs)
        if rows == 1 and self.tiers is None:
            asking = replace(costs, draft=model.draft(total, context, asks=True))
            return plan if self.runs_ahead else self._stopping_early(plan, worth[:, 0], asking)
        if self.packs and not pending:
            theta, its_length, count = best_length(worth, rows, draft, packed, 1 / rows)
            if theta > SWITCH * plan.theta:
                plan = replace(plan, length=its_length, most=its_length, packed=True, budget=round(count), theta=theta)
                self.length = its_length
        return replace(plan, rows=self._without_losers(plan, allowed, context, total / rows))

    def _settled(self, thetas: np.ndarray) -> int:
        """Drafts a row of the highest theta [G + 1], or as many as before where that is about as good."""
        self.plans += 1
        best = int(thetas.argmax())
        present = best if self.length is None else min(self.length, len(thetas) - 1)
        return best if thetas[best] > SWITCH * thetas[present] else present

    def _tried(self, thetas: np.ndarray, unsure: np.ndarray) -> int:
        """A number of drafts that may be better than the best known, as it was hardly tried; else the best."""
        lengths = self.tiers or range(len(thetas))
        before = max((n for n in lengths if n < self.length), default=0)
        near = {0, before, min((n for n in lengths if n > self.length), default=0)} - {self.length}
        hoped = {n: thetas[n] * (1 + unsure[n]) for n in near if 0 <= n < len(thetas) and unsure[n] > UNSURE}
        most = max(hoped, key=hoped.get, default=self.length)
        return most if hoped.get(most, 0.0) > thetas[self.length] else self.length

    def _stopping_early(self, plan: Plan, worth: np.ndarray, costs: Costs) -> Plan:
        """The plan of a single row, drafted position by position as long as that pays, where that brings more than all
        of its positions would have in rounds with drafts of survival [H, G].

        Args:
            costs: of steps whose drafts are decided so.
        """
        early_exit = _early_exit_seconds(costs)
        price = plan.theta * np.diff(early_exit)
        taken = np.logical_and.accumulate((worth > price) & (worth > 0), axis=1)
        theta = (1 + (worth * taken).sum(axis=1)).mean() / early_exit[taken.sum(axis=1)].mean()
        if theta < SWITCH * plan.theta:
            return plan
        most = int(worth.any(axis=0).sum())
        return replace(plan, most=max(most, plan.length), theta=theta, early_exit=early_exit.tolist())

    def _without_losers(self, plan: Plan, allowed: np.ndarray, context: int, busy: float) -> list[int]:
        """The rows of the plan whose drafts bring more than drafting them costs, and those that have rested for long.

        Args:
            allowed: [R, G], drafts for which there is room. busy: rows on the device for each of this call.
        """
        rows = np.array(plan.rows)
        fewer = len(rows) // 2
        seconds = plan.costs.draft - self.costs.draft(fewer * busy, context)
        price = plan.theta * seconds[plan.length - 1] / (len(rows) - fewer)
        value = (self.estimates.mean * allowed)[:, : plan.length].sum(axis=1)
        kept = rows[(value > price) | (self.undrafted >= PLAN_LASTS_AT_MOST)]
        return kept.tolist() or plan.rows


def _early_exit_seconds(costs: Costs) -> np.ndarray:
    """[gamma + 1] seconds of a round of one row that drafts and verifies 0, 1, .. positions, their lower hull."""
    before = max(2 * costs.draft[0] - costs.draft[1:2].sum(), 0.0) if len(costs.draft) > 1 else 0.0
    return lower_hull(np.concatenate(([before], costs.draft)) + costs.verify)
