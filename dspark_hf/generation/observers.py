"""What watches the rounds of an engine: statistics, recorded outputs, streamers."""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.utils import logging

from ..scheduling.load import Load
from ..scheduling.plan import Plan
from .outputs import Recorder
from .round import HostRound
from .rows import Row, Streaming
from .stats import LOW_TAU, DSparkStats
from .target import TargetOutput

logger = logging.get_logger(__name__)

# Rounds of rows in which drafts were verified, after which a call knows whether its head helps.
ENOUGH_ROUNDS = 64


@dataclass
class CommittedRound:
    """A round, or the prefill of rows that join, as far as it is decided.

    rows: those of the pass, which do not hold their new tokens yet.
    host: what it came to.
    passed: the pass of the target.
    logits: [R, L+1, V], after processors; `None` where they stay in a compiled pass.
    load: of the device, as far as known; `None` for a prefill, as are the next two.
    plan: what was to be drafted.
    survival: [R, drafted], which the schedule went by.
    kept: of every row the tokens that it keeps, up to its end. ends: whether it ends with them.
    """

    rows: list[Row]
    host: HostRound
    passed: TargetOutput
    logits: torch.Tensor | None
    load: Load | None = None
    plan: Plan | None = None
    survival: np.ndarray | None = None
    kept: list[list[int]] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)


class Observer:
    """Is told of every round."""

    def on_round(self, done: CommittedRound) -> None:
        """Before the rows hold what they keep."""

    def on_commit(self) -> None:
        """When they do."""


class StatsObserver(Observer):
    """Adds every round to the statistics of a call."""

    def __init__(self, stats: DSparkStats):
        self.stats = stats

    def on_round(self, done):
        if done.plan is None:
            return
        stats, host, drafting = self.stats, done.host, set(done.plan.rows)
        stats.load.append(done.load.total)
        drafted = host.confidence.shape[1]
        expected = (done.survival * (np.arange(drafted) < host.verified[:, None])).sum(axis=1).tolist()
        accepted, verified, confidence = host.accepted.tolist(), host.verified.tolist(), host.confidence.tolist()
        for r, row in enumerate(done.rows):
            own, drafts = row.index, drafted if r in drafting else 0
            stats.committed_lengths[own].append(len(done.kept[r]))
            stats.accepted_lengths[own].append(min(accepted[r], len(done.kept[r])))
            stats.drafted_lengths[own].append(drafts)
            stats.verified_lengths[own].append(verified[r])
            stats.expected_lengths[own].append(1 + expected[r] if drafts else 1.0)
            stats.draft_tokens[own].append(host.drafts[r][:drafts])
            stats.confidence[own].append(confidence[r][:drafts])


class UseObserver(Observer):
    """Says once when the drafts of a call are of no use. Rounds without drafts say nothing of the head."""

    def __init__(self):
        self.rounds = self.tokens = 0

    def on_round(self, done):
        if done.plan is None or self.rounds >= ENOUGH_ROUNDS:
            return
        drafted = done.host.verified > 0
        self.rounds += int(drafted.sum())
        self.tokens += int((1 + done.host.accepted[drafted]).sum())
        if self.rounds >= ENOUGH_ROUNDS and self.tokens < LOW_TAU * self.rounds:
            logger.warning(
                f"The head hardly helps: tau is {self.tokens / self.rounds:.2f} tokens a round after {self.rounds} "
                "rounds. The text is right all the same. `dspark-hf doctor --model TARGET --head HEAD` says why."
            )


class OutputObserver(Observer):
    """Records scores, logits, hidden states and attentions.

    Args:
        cached: columns that a given cache holds.
    """

    def __init__(self, recorder: Recorder, cached: int):
        self.recorder, self.cached = recorder, cached

    def on_round(self, done):
        for r, (row, kept) in enumerate(zip(done.rows, done.kept, strict=True)):
            passed, logits = done.passed, done.logits
            if not row.committed:
                width, columns = row.width - self.cached, row.prompt_columns
                self.recorder.record_prefill(row.index, r, passed, logits, columns, len(row.prompt), width)
                continue
            drafts = range(row.columns[-1] + 1, row.columns[-1] + passed.features.shape[1])
            self.recorder.record(row.index, r, len(kept), passed, logits, [*row.columns, *drafts])


class StreamObserver(Observer):
    """Hands committed tokens to a streamer."""

    def __init__(self, streaming: Streaming):
        self.streaming = streaming

    def on_commit(self):
        self.streaming.put()
