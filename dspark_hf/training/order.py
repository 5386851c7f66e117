"""Which rows a step trains on, in which process, and the random numbers that go with them.

A step takes a global batch: rows a process x processes x batches that are accumulated. What is in it, and the anchors
drawn in a row, follow from the seed and from the place in the run alone. So runs with the same global batch train on
the same blocks, whatever the number of processes, and a resumed run sees what an uninterrupted one would have seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .data import Row, collate
from .features import FeatureCache


class ShuffledByLength(Sampler[list[int]]):
    """Global batches of a whole run: rows of similar length together, in a new random order every epoch.

    Args:
        lengths: tokens of every row. batches: batches of the run. start: batches to leave out at the front.
    """

    WINDOW = 50  # batches whose rows are sorted together

    def __init__(self, lengths: list[int], batch_size: int, seed: int, batches: int, start: int = 0):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.batches, self.start = batches, start

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        endless = (batch for epoch in count() for batch in self._epoch(epoch))
        yield from islice(endless, self.start, self.batches)

    def _epoch(self, epoch: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = self.WINDOW * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


class Sample(NamedTuple):
    """A row, and the number of the sample in the run; `None` for a row that only fills a batch of none."""

    row: int
    number: int | None


@dataclass(frozen=True)
class Share(Sampler[list[Sample]]):
    """The batches of one process: of every global batch as many as are accumulated, in turn.

    Rows are dealt out one by one, so that the batches of a step are of similar size and length; where there are fewer
    rows than batches, at the end of an epoch, a batch gets a row that nothing is learnt from.
    """

    batches: ShuffledByLength
    process: int = 0
    processes: int = 1
    accumulated: int = 1

    def __len__(self) -> int:
        return len(self.batches) * self.accumulated

    def __iter__(self) -> Iterator[list[Sample]]:
        parts = self.processes * self.accumulated
        for step, rows in enumerate(self.batches, start=self.batches.start):
            first = step * self.batches.batch_size
            samples = [Sample(row, first + i) for i, row in enumerate(rows)]
            for part in range(self.process, parts, self.processes):
                yield samples[part::parts] or [Sample(rows[0], None)]


@dataclass(frozen=True)
class Samples(Dataset):
    """Rows with the random numbers `draws` that their anchors are drawn by, as many as the row has tokens, whatever it
    is padded to; and with the target's `states` where these are cached."""

    rows: list[Row]
    seed: int
    features: FeatureCache | None = None

    def __getitem__(self, sample: Sample) -> dict:
        row = self.rows[sample.row]
        if sample.number is None:
            row = row | {"loss_mask": [0] * len(row["loss_mask"])}
        draws = np.random.default_rng((self.seed, sample.number or 0)).random(len(row["input_ids"]))
        found = {} if self.features is None else {"states": self.features.read(sample.row)}
        return row | {"draws": torch.from_numpy(draws)} | found


def collate_samples(samples: list[dict]) -> dict[str, Any]:
    """What `collate` makes of the rows, with `draws` [b, T], and with the target's `states` where they are cached."""
    batch = collate(samples)
    length = batch["input_ids"].shape[1]
    batch["draws"] = torch.stack([_padded(sample["draws"], length) for sample in samples])
    if "states" in samples[0]:
        of_rows = zip(*(sample["states"] for sample in samples), strict=True)
        batch["states"] = tuple(torch.stack([_padded(x, length) for x in one]) for one in of_rows)
    return batch


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    whole = x.new_zeros(length, *x.shape[1:])
    whole[: len(x)] = x
    return whole
