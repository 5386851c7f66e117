"""Rows of a round that choose their tokens each in its own way: by other processors, sampled or not, with a seed."""

from collections.abc import Sequence

import numpy as np
import torch

from .acceptance import accept_sampled
from .cache import on_device
from .processors import BlockProcessors, Prefixes, ProcessedSampler, drawn, likeliest
from .rows import Row

# Streams of a row's random numbers: what chooses tokens, and what verifies them.
CHOICE, VERIFICATION = 0, 1


def processors_of(rows: Sequence[Row]) -> "BlockProcessors | MixedProcessors":
    """How the tokens of rows are chosen in a round: as the first one's, where all are alike."""
    first = rows[0].processors
    if all(row.processors is first and (row.seed is None or not first.do_sample) for row in rows):
        return first
    return MixedProcessors(rows)


class MixedProcessors:
    """What `BlockProcessors` is for rows of one kind, in one round. Beside sampled rows a greedy one is sampled from a
    distribution that leaves its argmax only."""

    temperature = None
    runs = True

    def __init__(self, rows: Sequence[Row]):
        kinds = {id(row.processors): row.processors for row in rows}
        self.groups = [(own, [r for r, row in enumerate(rows) if row.processors is own]) for own in kinds.values()]
        self.do_sample = any(own.do_sample for own in kinds.values())
        self.needs_prefix = any(own.needs_prefix for own in kinds.values())
        self.rows = rows
        self.choosing = self._random(CHOICE)

    def __call__(self, logits: torch.Tensor, prefixes: Prefixes | None) -> torch.Tensor:
        """See `BlockProcessors`."""
        logits = logits.float()
        processed = torch.empty_like(logits)
        for own, places in self.groups:
            index = on_device(places, logits.device)
            part = own(logits[index], prefixes.of(places) if own.needs_prefix else None)
            processed[index] = only_argmax(part) if self.do_sample and not own.do_sample else part
        return processed

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [R] from processed logits [R, V]."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        chances = torch.rand(len(logits), 1, dtype=torch.float64)
        for r, random in self.choosing.items():
            chances[r] = random.random()
        return drawn(logits, on_device(chances, logits.device))

    def next_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [R] of the target from its processed logits [R, V], where nothing was drafted: the same as where that
        was done for the sake of others and none of it is verified."""
        if not self.do_sample:
            return likeliest(logits)
        nothing = torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
        seeds = self.seeds(len(logits), logits.device)
        lengths = nothing.sum(dim=1)
        return accept_sampled(logits[:, None], nothing, logits[:, None][:, :0], lengths, seeds).next_tokens

    def seeds(self, rows: int, device: torch.device) -> torch.Tensor | None:
        """See `BlockProcessors`."""
        if not self.do_sample:
            return None
        seeds = torch.randint(2**63 - 1, (rows,))
        for r, random in self._random(VERIFICATION).items():
            seeds[r] = int(random.integers(2**63 - 1))
        return on_device(seeds, device)

    def draft_sampler(self, prefixes: Prefixes | None) -> ProcessedSampler:
        """See `BlockProcessors`."""
        return ProcessedSampler(self, prefixes)

    def _random(self, stream: int) -> dict[int, np.random.Generator]:
        """Of every row with a seed its numbers for this round. They depend on how long the row is, so that neighbours,
        and how many drafts are made for their sake, change nothing."""
        counters = {
            r: (row.seed, [0, row.length, stream, 0]) for r, row in enumerate(self.rows) if row.seed is not None
        }
        return {r: np.random.Generator(np.random.Philox(key=key, counter=at)) for r, (key, at) in counters.items()}


def only_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] whose distribution is the argmax; those that are none stay as they are."""
    best, token = logits.max(dim=-1, keepdim=True)
    kept = torch.full_like(logits, -torch.inf).scatter_(-1, token, 0.0)
    return torch.where(best.isfinite(), kept, logits)
