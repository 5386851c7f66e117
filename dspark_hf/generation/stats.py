"""What a generation did: counts and times of its rounds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class DSparkStats:
    """Counts and times of one `generate` call.

    accepted_lengths[row]: tokens committed in each round of that row, bonus included, in the order of the batch.
    verified_lengths[row]: drafts that were verified in each of these rounds, the length that the scheduler chose.
    expected_lengths[row]: tokens that it expected each of these rounds to commit.
    load[round]: rows decoded on the device, those of others included, as far as the scheduler knew.
    drafted, verified, accepted: drafts of each row.
    drafted_at, verified_at, accepted_at: drafts of all rows by position in the block, 0 first.
    prefill_seconds, draft_seconds, schedule_seconds, verify_seconds, other_seconds: wall time by part; other is
        acceptance, commit, streaming and stopping.
    """

    block_size: int
    accepted_lengths: list[list[int]]
    verified_lengths: list[list[int]]
    expected_lengths: list[list[float]]
    drafted: list[int]
    verified: list[int]
    accepted: list[int]
    drafted_at: list[int]
    verified_at: list[int]
    accepted_at: list[int]
    load: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    schedule_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    @classmethod
    def empty(cls, rows: int, block_size: int) -> "DSparkStats":
        def zeros(count: int) -> list[int]:
            return [0] * count

        return cls(
            block_size,
            *([[] for _ in range(rows)] for _ in range(3)),
            *(zeros(rows) for _ in range(3)),
            *(zeros(block_size) for _ in range(3)),
        )

    @property
    def rounds(self) -> int:
        """Rounds of the batch: passes of the target, the prefill not counted."""
        return len(self.load)

    @property
    def tau(self) -> float:
        """Mean tokens a round of a row, bonus included; 0 before the first round."""
        lengths = [length for row in self.accepted_lengths for length in row]
        return sum(lengths) / len(lengths) if lengths else 0.0

    def expect(self, row: int, drafted: int, verified: int, expected: float) -> None:
        """Add what one round of one row drafted, verified and expected to commit."""
        self.verified_lengths[row].append(verified)
        self.expected_lengths[row].append(expected)
        self.drafted[row] += drafted
        self.verified[row] += verified
        _count(self.drafted_at, drafted)
        _count(self.verified_at, verified)

    def record(self, row: int, accepted: int, committed: int) -> None:
        """Add what it came to. `accepted` counts drafts that were kept, `committed` all tokens that were."""
        self.accepted_lengths[row].append(committed)
        self.accepted[row] += accepted
        _count(self.accepted_at, accepted)


def _count(positions: list[int], upto: int) -> None:
    for position in range(upto):
        positions[position] += 1


@dataclass
class DSparkGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with `dspark`, the statistics of the call."""

    dspark: DSparkStats | None = None


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
        """Seconds of every part since this was called last; without `wait` of those that the device is through."""
        while self.pending and (wait or self.pending[0][2].query()):
            name, begin, end = self.pending.pop(0)
            end.synchronize()
            self._add(name, begin.elapsed_time(end) / 1000)
        last, self.last = self.last, {}
        return last

    def _add(self, name: str, seconds: float) -> None:
        for sums in (self.seconds, self.last):
            sums[name] = sums.get(name, 0.0) + seconds
