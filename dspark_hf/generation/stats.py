"""What a generation did: counts and times of its rounds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

# Tokens a round below which a head is of no use.
LOW_TAU = 1.2


@dataclass
class DSparkStats:
    """Counts and times of one `generate` call.

    The lists have an entry for every row in the order of the batch, and each of those one for every round of the row.

    committed_lengths: tokens committed, bonus included.
    accepted_lengths: drafts that became text.
    drafted_lengths: drafts made.
    verified_lengths: drafts verified, the length that the scheduler chose.
    expected_lengths: tokens that the scheduler expected to be committed.
    draft_tokens, confidence: the drafts made and the head's confidence in each, lists with an entry for every draft.
    load: of every round of the batch the rows decoded on the device, those of others included, as far as known.
    prefill_seconds, draft_seconds, schedule_seconds, verify_seconds, other_seconds: wall time by part; other is
        acceptance, commit, streaming and stopping.
    """

    gamma: int
    committed_lengths: list[list[int]]
    accepted_lengths: list[list[int]]
    drafted_lengths: list[list[int]]
    verified_lengths: list[list[int]]
    expected_lengths: list[list[float]]
    draft_tokens: list[list[list[int]]]
    confidence: list[list[list[float]]]
    load: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    schedule_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    @classmethod
    def empty(cls, rows: int, gamma: int) -> "DSparkStats":
        lists: Any = [[[] for _ in range(rows)] for _ in range(7)]
        return cls(gamma, *lists)

    @property
    def rounds(self) -> int:
        """Rounds of the batch: passes of the target, the prefill not counted."""
        return len(self.load)

    @property
    def tau(self) -> float:
        """Mean tokens a round of a row, bonus included; 0 before the first round."""
        return _mean(self.committed_lengths)

    @property
    def drafted_tau(self) -> float:
        """Tau of the rounds in which drafts were verified, which are those that say something of the head; 0 where
        there are none."""
        pairs = zip(self.committed_lengths, self.verified_lengths, strict=True)
        return _mean([[c for c, v in zip(*row, strict=True) if v] for row in pairs])

    @property
    def verify_length(self) -> float:
        """Mean drafts verified in a round of a row; 0 before the first round."""
        return _mean(self.verified_lengths)

    @property
    def drafted(self) -> list[int]:
        """Drafts of each row; `verified` and `accepted` likewise."""
        return list(map(sum, self.drafted_lengths))

    @property
    def verified(self) -> list[int]:
        return list(map(sum, self.verified_lengths))

    @property
    def accepted(self) -> list[int]:
        return list(map(sum, self.accepted_lengths))

    @property
    def drafted_at(self) -> list[int]:
        """Drafts of all rows by position in the block, the first first; `verified_at` and `accepted_at` likewise."""
        return self._by_position(self.drafted_lengths)

    @property
    def verified_at(self) -> list[int]:
        return self._by_position(self.verified_lengths)

    @property
    def accepted_at(self) -> list[int]:
        return self._by_position(self.accepted_lengths)

    def _by_position(self, lengths: list[list[int]]) -> list[int]:
        return [sum(length > k for row in lengths for length in row) for k in range(self.gamma)]


def _mean(lengths: list[list[int]]) -> float:
    count = sum(map(len, lengths))
    return sum(map(sum, lengths)) / count if count else 0.0


@dataclass
class DSparkGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with `dspark`, the statistics of the call."""

    dspark: DSparkStats | None = None


def synchronize(device: torch.device) -> None:
    """Wait for what the device has queued, before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Wall time of parts of a round, without making the host wait: on CUDA a part is bracketed by events, which are
    read once they have passed."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.device.type != "cuda":
            started = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - started)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self.pending.append((name, begin, end))

    def collect(self, wait: bool = False) -> dict[str, float]:
        """Seconds of every part since this was called last; without `wait` of those that the device has finished."""
        while self.pending and (wait or self.pending[0][2].query()):
            name, begin, end = self.pending.pop(0)
            end.synchronize()
            self._add(name, begin.elapsed_time(end) / 1000)
        last, self.last = self.last, {}
        return last

    def totals(self) -> dict[str, float]:
        """Seconds of every part since the start."""
        self.collect(wait=True)
        return self.seconds

    def _add(self, name: str, seconds: float) -> None:
        for sums in (self.seconds, self.last):
            sums[name] = sums.get(name, 0.0) + seconds
