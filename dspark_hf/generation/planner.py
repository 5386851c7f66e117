"""Between the rows of an engine and its scheduler: what a round is planned with, and what is learnt from it."""

from collections.abc import Sequence

import numpy as np
import torch

from ..modeling_dspark import DraftBlock
from ..scheduling.load import Call, Load
from ..scheduling.plan import Plan, Step
from ..scheduling.scheduler import ConstantSchedule
from .compatibility import check_prompt
from .drafting import Drafter
from .ranks import Ranks
from .round import HostRound, VerifyLayout
from .rows import Row
from .stats import Stopwatch
from .target import Target


class Planner:
    """Plans the rounds of an engine, and feeds their times and outcomes back.

    Args:
        drafts: whether rows may draft at all.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        scheduler: ConstantSchedule,
        clock: Stopwatch,
        drafts: bool,
    ):
        self.target, self.drafter, self.scheduler, self.clock = target, drafter, scheduler, clock
        self.drafts = drafts
        self.gamma = drafter.head.config.gamma
        self.ranks, self.call = Ranks(target.model), Call(target.device, 0)
        # The shape of the last round, whose times are known when the next is planned.
        self.last: Step | None = None

    def plan(self, rows: Sequence[Row], max_drafts: list[int], context: int) -> tuple[Plan, Load, int]:
        """Which rows draft, and how many positions; the load that this goes by; and tokens that the head has to read
        first.

        Args:
            context: tokens of the longest row.
        """
        times, load = self.clock.collect(), self.call.load(self.drafter.head.load_sensor)
        if self.last is not None and self.ranks.leads:
            deciding = times.get("draft", 0.0) + times.get("schedule", 0.0)
            self.scheduler.observe(self.last, load, deciding, times["verify"] + times.get("other", 0.0))
        # Rows come and go; beside one that is sampled no schedule may look ahead.
        self.scheduler.greedy = not any(row.processors.do_sample for row in rows)
        pending = self._pending(range(len(rows)))
        plan = self.ranks.agreed(lambda: self.scheduler.plan(max_drafts, context, load, pending))
        return plan, load, self._pending(plan.rows)

    def learn(
        self, plan: Plan, layout: VerifyLayout, host: HostRound, rows: int, context: int, pending: int
    ) -> np.ndarray:
        """Tell the scheduler what became of a round of so many rows. Returns the survival [R, drafted] that it went
        by."""
        drafting, estimates = plan.index(rows), self.scheduler.estimates
        tokens = layout.tokens if layout.packed else rows * (1 + layout.most)
        self.last = Step(len(plan.rows), layout.drafted, pending, rows, tokens, layout.packed, context)
        if not plan.rows:
            return host.confidence
        survival = layout.survival
        if survival is None:
            survival = np.zeros_like(host.confidence)
            survival[drafting] = estimates.survival(host.confidence[drafting], drafting)
        verified, accepted = host.verified[drafting], host.accepted[drafting]
        estimates.learn(drafting, host.confidence[drafting], survival[drafting], verified, accepted)
        return survival

    def max_drafts_of(self, row: Row) -> int:
        """Drafts that a row could commit, with one place left for the target's own token."""
        if not self.drafts:
            return 0
        most, position = self.gamma, len(row.columns) - 1
        if row.stopping.max_length is not None:
            most = row.stopping.max_length - row.length - 1
        if self.target.positions is not None:
            check_prompt(self.target.model, self.target.positions, position + 1)
            most = min(most, self.target.positions - 1 - position)
        border = self.target.rereads_at
        if border is not None and row.anchor_column < border:
            most = min(most, border - 1 - row.anchor_column)
        return most

    def confidence(self, block: DraftBlock | None) -> torch.Tensor | None:
        """[R, drafted], calibrated; without a confidence head, running acceptance."""
        if block is None:
            return None
        if block.confidence_logits is None:
            running = self.scheduler.estimates.shared.confidence[: block.tokens.shape[1]]
            return torch.from_numpy(running).expand(len(block.tokens), -1)
        return self.drafter.head.calibrated(block.confidence_logits)

    def _pending(self, rows: Sequence[int]) -> int:
        """Tokens of a row, at most, that the head has yet to read; 0 for what a round or two leave."""
        longest = max((self.drafter.num_pending[row] for row in rows), default=0)
        return longest if longest > 2 * (self.gamma + 1) else 0
