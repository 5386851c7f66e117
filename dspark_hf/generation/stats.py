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
    drafted, verified, accepted: drafts of each row.
    drafted_at, verified_at, accepted_at: drafts of all rows by position in the block, 0 first.
    rounds: rounds of the batch (a pass of the target each, the prefill not counted).
    prefill_seconds, draft_seconds, verify_seconds, other_seconds: wall time by part; other is acceptance, commit,
        streaming and stopping.
    """

    block_size: int
    accepted_lengths: list[list[int]]
    drafted: list[int]
    verified: list[int]
    accepted: list[int]
    drafted_at: list[int]
    verified_at: list[int]
    accepted_at: list[int]
    rounds: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    @classmethod
    def empty(cls, rows: int, block_size: int) -> "DSparkStats":
        def zeros(count: int) -> list[int]:
            return [0] * count

        return cls(
            block_size,
            [[] for _ in range(rows)],
            *(zeros(rows) for _ in range(3)),
            *(zeros(block_size) for _ in range(3)),
        )

    @property
    def tau(self) -> float:
        """Mean tokens a round of a row, bonus included; 0 before the first round."""
        lengths = [length for row in self.accepted_lengths for length in row]
        return sum(lengths) / len(lengths) if lengths else 0.0

    def record(self, row: int, drafted: int, verified: int, accepted: int, committed: int) -> None:
        """Add one round of one row. `accepted` counts drafts that were kept, `committed` all tokens that were."""
        self.accepted_lengths[row].append(committed)
        self.drafted[row] += drafted
        self.verified[row] += verified
        self.accepted[row] += accepted
        for counts, upto in ((self.drafted_at, drafted), (self.verified_at, verified), (self.accepted_at, accepted)):
            for position in range(upto):
                counts[position] += 1


@dataclass
class DSparkGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with `dspark`, the statistics of the call."""

    dspark: DSparkStats | None = None


@dataclass
class Stopwatch:
    """Wall time of parts of a round, without making the host wait: on CUDA a part is bracketed by events, which are
    read at the end of the call."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

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

    def read(self) -> dict[str, float]:
        """Seconds of every part so far."""
        for name, begin, end in self.pending:
            end.synchronize()
            self._add(name, begin.elapsed_time(end) / 1000)
        self.pending.clear()
        return self.seconds

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
