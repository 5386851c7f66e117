"""Decides every round which rows draft, how many positions, and how many of the drafts are verified.

The head's `generation_config` says which of the two schedules runs: "load" weighs expected tokens against step times,
"constant" always drafts and verifies `num_assistant_tokens`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from . import constants
from .algorithm import admit, at_size, best_length, lower_hull, top_k_by_survival
from .cost import CostModel
from .estimates import AcceptanceStats, RowEstimates, corrected
from .load import Load
from .plan import NO_DRAFT, Costs, Plan, Step
from .settings import Settings


class ConstantSchedule:
    """Drafts and verifies the same number of positions every round, whatever the load.

    Args:
        settings: of the head. shared: what is known of the pair. rows: of the call. runs_ahead: whether the host queues
            work for the device without waiting, so that this round's confidences come too late.
    """

    def __init__(self, settings: Settings, shared: AcceptanceStats, rows: int, runs_ahead: bool = False):
        self.settings, self.runs_ahead = settings, runs_ahead
        # Whether no row is sampled, so that any schedule is lossless; the rows of each plan say so.
        self.greedy = True
        self.estimates = RowEstimates(shared, rows)

    def plan(self, max_drafts: list[int], context: int, load: Load, pending: int = 0) -> Plan:
        """What to draft.

        Args:
            max_drafts: [R], drafts that each row could still commit. context: tokens of the longest row. load: of the
                device. pending: tokens of a row that a draft has to read first, beyond those of a round or two.
        """
        length = min(self.settings.most, max(max_drafts))
        return Plan(list(range(len(max_drafts))), length) if length > 0 else NO_DRAFT

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
        return corrected(confidence, corrections.to(confidence.device, confidence.dtype, non_blocking=True))

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
        return Plan(list(range(len(max_drafts))), self.settings.most)


class LoadSchedule(ConstantSchedule):
    """Weighs expected tokens against step times.

    Args:
        costs: what steps of the pair cost on this device.
        packs: whether rows of different lengths can be verified in one pass without padding.
        tiers: drafts a row that there are passes for; any number when `None`.
    """

    def __init__(
        self,
        settings: Settings,
        shared: AcceptanceStats,
        rows: int,
        costs: CostModel,
        packs: bool,
        runs_ahead: bool,
        tiers: Sequence[int] | None = None,
    ):
        super().__init__(settings, shared, rows, runs_ahead)
        self.costs, self.packs = costs, packs
        self.tiers = None if tiers is None else sorted({min(length, settings.most) for length in tiers})
        # The last plan, the load it was made for, rounds since it was made, and for how many it is good.
        self.last, self.age, self.lasts = NO_DRAFT, 0, 1
        self.plan_load: Load | None = None
        self.probes = 0

    def plan(self, max_drafts, context, load, pending=0):
        limit = min(max(max_drafts), self.settings.most)
        if limit <= 0 or self.costs.pace is None:
            return NO_DRAFT
        self.age += 1
        if not self.last.rows:
            self.estimates.shared.undrafted_rounds += 1
        if self._is_out_of_date(limit, load):
            self._renew(np.array(max_drafts), context, load, pending)
        return self.last

    def _is_out_of_date(self, limit: int, load: Load) -> bool:
        if load != self.plan_load:
            return True
        if self.last.rows:
            return self.age > self.lasts or self.last.probe or limit < self.last.length
        return self._waited()

    def _waited(self) -> bool:
        """Whether drafts have not been tried for long."""
        return self.estimates.shared.undrafted_rounds > self.estimates.shared.probe_interval

    def _renew(self, max_drafts: np.ndarray, context: int, load: Load, pending: int) -> None:
        shared, before = self.estimates.shared, self.last
        if before.probe:
            # As long as they fail they are tried ever more rarely.
            interval = shared.probe_interval // 2 if shared.last_rate else 2 * shared.probe_interval
            shared.probe_interval = min(max(interval, 1), constants.MOST_PROBE_INTERVAL)
        self.last = self._best(max_drafts, context, load, pending)
        if not self.last.rows and self._waited():
            # One row is enough to see how drafts fare, and has all its context to read first.
            self.probes += 1
            self.last = Plan([self.probes % len(max_drafts)], 1, self.packs, 1, probe=True)
        if self.last.rows:
            shared.undrafted_rounds = 0
            shared.probe_interval = shared.probe_interval if self.last.probe else 1
        # A plan that is found right again is good for twice as long.
        is_confirmed = (before.rows, before.length) == (self.last.rows, self.last.length)
        self.lasts = min(2 * self.lasts, constants.PLAN_LASTS) if is_confirmed else 1
        self.plan_load, self.age = load, 0

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

    def observe(self, step, load, draft_seconds, step_seconds):
        # Rounds of one plan say the same. The rows of others slow a round down that says nothing of their number; but
        # it is better than nothing.
        if self.costs.pace is not None and (self.age > 0 or load.others):
            return
        self.costs.learn_verify(step.rows, step.tokens, step.context, step.packed, step_seconds)
        if step.drafted:
            self.costs.learn_draft(step.drafting, step.drafted, step.context, step.pending, draft_seconds)

    # -- Searching ----------------------------------------------------------------------------------------------

    def _best(self, max_drafts: np.ndarray, context: int, load: Load, pending: int) -> Plan:
        """The plan that earlier rounds suggest."""
        rows, total, model = len(max_drafts), load.total, self.costs
        draft = model.draft(total, context)
        costs = Costs(model.verify(total, context), model.verify(total, context, packed=True), draft)
        most = int(min(max_drafts.max(), self.settings.most))
        worth = self.estimates.mean * (np.arange(self.estimates.mean.shape[1]) < max_drafts[:, None])
        if self.settings.threshold is not None:
            worth = worth * (worth >= self.settings.threshold)
        # [limit + 1], of a round of 0, 1, .. drafts a row. A pass of a tier is run whatever there is room for.
        sizes = (most if self.tiers is None else self.tiers[-1]) + 1
        tokens = rows + np.concatenate(([0.0], worth.sum(axis=0).cumsum()))[:sizes]
        seconds = (costs.verify + np.concatenate(([0.0], draft)))[:sizes]
        if pending:
            # What the head has to read first is paid once, and is shared by the rounds to the end of the call.
            reading = model.draft(total, context, pending)[0] - draft[0]
            seconds[1:] += reading * tokens[1:] / (rows * (max_drafts.max() + 1))
        thetas = tokens / seconds
        # What is hardly known may be better than it looks.
        hoped = thetas * (1 + model.unsure(total, context)[:sizes])
        if self.tiers is not None:
            hoped[[length for length in range(sizes) if length not in self.tiers]] = 0
        length = int(hoped.argmax())
        if length == 0:
            return NO_DRAFT
        plan = Plan(list(range(rows)), length, budget=length * rows, theta=thetas[length], costs=costs)
        if rows > 1 and self.packs and not pending:
            theta, its_length, count = best_length(worth, draft, costs.packed)
            if theta > plan.theta:
                return replace(plan, length=its_length, packed=True, budget=count, theta=theta)
        return plan
