"""Logits processors over a block of positions.

What looks only at the logits runs once over the whole block; what looks at the tokens of its row runs position by
position, each with the prefix that it would have seen in plain decoding. All else, an application's own processors
among it, may keep a state, count its calls or tell rows apart by their place: those are only ever called as plain
decoding calls them, see `lockstep`.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from dspark_kernels import INVALID, random_seeds
from dspark_kernels.reference import largest
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as stock

from ..sequential_heads import as_drafted
from .cache import on_device

OF_LOGITS = {
    stock.EpsilonLogitsWarper,
    stock.EtaLogitsWarper,
    stock.InfNanRemoveLogitsProcessor,
    stock.LogitNormalization,
    stock.MinPLogitsWarper,
    stock.SuppressTokensLogitsProcessor,
    stock.TemperatureLogitsWarper,
    stock.TopHLogitsWarper,
    stock.TopKLogitsWarper,
    stock.TopPLogitsWarper,
    stock.TypicalLogitsWarper,
}
OF_PREFIX = {
    stock.ExponentialDecayLengthPenalty,
    stock.ForcedBOSTokenLogitsProcessor,
    stock.ForcedEOSTokenLogitsProcessor,
    stock.MinLengthLogitsProcessor,
    stock.MinNewTokensLengthLogitsProcessor,
    stock.NoBadWordsLogitsProcessor,
    stock.NoRepeatNGramLogitsProcessor,
    stock.RepetitionPenaltyLogitsProcessor,
    stock.SequenceBiasLogitsProcessor,
    stock.SuppressTokensAtBeginLogitsProcessor,
    stock.WatermarkLogitsProcessor,
}


def is_pure(processor: LogitsProcessor) -> bool:
    """Whether what a processor makes of a row's logits depends on these and on the row's tokens only. An exact type
    says so: a subclass may do otherwise."""
    return type(processor) in OF_LOGITS | OF_PREFIX


@dataclass(frozen=True)
class Prefixes:
    """What rows hold before a position. tokens: of each [length], as plain `generate` holds them. rows: their places in
    the batch."""

    tokens: list[torch.Tensor]
    rows: list[int]

    def seen(self, positions: int) -> list[list[torch.Tensor]]:
        """Of every row what each of so many positions has seen: the last one all of its tokens, each before it one
        fewer."""
        return [[own[: len(own) - positions + 1 + j] for j in range(positions)] for own in self.tokens]

    def of(self, places: list[int]) -> "Prefixes":
        """Those of some rows."""
        return Prefixes([self.tokens[i] for i in places], [self.rows[i] for i in places])

    def longer(self, tokens: torch.Tensor) -> "Prefixes":
        """With tokens [R] or [R, n] behind."""
        columns = (tokens if tokens.dim() == 2 else tokens[:, None]).to(self.tokens[0])
        return Prefixes([torch.cat(pair) for pair in zip(self.tokens, columns, strict=True)], self.rows)


class BlockProcessors:
    """Applies the pure ones of a `LogitsProcessorList` to several positions of several rows.

    Args:
        processors: the list that `generate` built. do_sample: whether tokens are sampled from the processed logits, or
            are their argmax.

    Attributes:
        needs_prefix: whether one of them looks at the tokens before. temperature: what divides the logits when nothing
            else is done to them, else `None`.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool):
        pure = [processor for processor in processors if is_pure(processor)]
        self.do_sample = do_sample
        # Neighbours of one kind run together, in the order of the list.
        groups = itertools.groupby(pure, key=_run_of)
        self.runs = [run(LogitsProcessorList(of_it)) for run, of_it in groups]
        self.needs_prefix = any(type(run) is not OverLogits for run in self.runs)
        self.temperature: float | None = None
        if all(type(processor) is stock.TemperatureLogitsWarper for processor in pure):
            self.temperature = math.prod(processor.temperature for processor in pure)

    def __call__(self, logits: torch.Tensor, prefixes: Prefixes | None) -> torch.Tensor:
        """Processed logits [R, n, V] from logits [R, n, V]: float32, or as they are where their argmax is all that is
        asked of them, and that of a large vocabulary is sooner found in fewer bits.

        Args:
            prefixes: of every row what its last position has seen; only needed when `needs_prefix`.
        """
        if self.runs or self.do_sample:
            logits = logits.float()
        for run in self.runs:
            logits = run(logits, prefixes)
        return logits

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [R] from processed logits [R, V]."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        return drawn(logits, torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device))

    def next_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [R] of the target from its processed logits [R, V], where nothing was drafted."""
        return self.choose(logits) if self.do_sample else likeliest(logits)

    def seeds(self, rows: int, device: torch.device) -> torch.Tensor | None:
        """Of the verification of so many rows, [R]."""
        return random_seeds(rows, device) if self.do_sample else None

    def draft_sampler(self, prefixes: Prefixes | None) -> "ProcessedSampler":
        """Chooses the tokens of one draft. The head's logits go through the same processors as the target's: what
        they forbid or favour would otherwise be drafted in vain.

        Args:
            prefixes: of every row its tokens, anchor included; only needed when `needs_prefix`.
        """
        return ProcessedSampler(self, prefixes)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The argmax [R] of processed logits [R, V], `INVALID` where they are NaN or nothing but -inf."""
    best, tokens = largest(logits)
    return tokens.where(best > -torch.inf, INVALID)


def drawn(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """The tokens [R] of processed logits [R, V] in whose share of the whole a random number [R, 1] of 0 to 1 falls.

    torch.multinomial draws a number for every token of the vocabulary, which on a CPU takes longer than all else in the
    choice, and makes the host wait for its checks.
    """
    shares = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    whole = shares[:, -1:]
    point = torch.minimum(chance * whole, whole.nextafter(torch.zeros_like(whole)))
    # Logits that are no distribution have no whole.
    return torch.searchsorted(shares, point, right=True).where(whole > 0, INVALID).squeeze(-1)


@dataclass(frozen=True)
class OverLogits:
    """Runs processors that look only at the logits over all positions of all rows at once."""

    processors: LogitsProcessorList

    def __call__(self, logits: torch.Tensor, prefixes: Prefixes | None) -> torch.Tensor:
        flat = logits.flatten(0, 1)
        for processor in self.processors:
            flat = processor(None, flat)
        return flat.view_as(logits)


@dataclass(frozen=True)
class OverPrefixes:
    """Runs processors that look at the tokens before a position after the other; rows of one length together."""

    processors: LogitsProcessorList

    def __call__(self, logits: torch.Tensor, prefixes: Prefixes) -> torch.Tensor:
        columns = []
        for j, seen in enumerate(zip(*prefixes.seen(logits.shape[1]), strict=True)):
            if len(set(map(len, seen))) == 1:
                columns.append(self.processors(torch.stack(seen), logits[:, j]))
            else:
                rows = zip(seen, logits[:, j : j + 1].unbind(), strict=True)
                columns.append(torch.cat([self.processors(prefix[None], row) for prefix, row in rows]))
        return columns[0][:, None] if len(columns) == 1 else torch.stack(columns, dim=1)


@dataclass
class Repetition:
    """Repetition penalties over all positions of all rows at once. Many models ask for one by default, and a call of
    the stock processor for every row and position takes longer than the target's pass."""

    processors: LogitsProcessorList

    @cached_property
    def ignored(self) -> list[list[int] | int]:
        """Tokens of a prompt that a processor does not look at, of every row or of all; read once a call, as the host
        waits for it."""
        lengths = [processor.prompt_ignore_length for processor in self.processors]
        return [own.tolist() if torch.is_tensor(own) else own or 0 for own in lengths]

    def __call__(self, logits: torch.Tensor, prefixes: Prefixes) -> torch.Tensor:
        for processor, ignored in zip(self.processors, self.ignored, strict=True):
            firsts = [ignored if isinstance(ignored, int) else ignored[row] for row in prefixes.rows]
            logits = self._penalised(logits, prefixes, processor, firsts)
        return logits

    @staticmethod
    def _penalised(
        logits: torch.Tensor, prefixes: Prefixes, processor: stock.RepetitionPenaltyLogitsProcessor, firsts: list[int]
    ) -> torch.Tensor:
        positions, vocabulary = logits.shape[1], logits.shape[2]
        seen = [own[first:] for first, row in zip(firsts, prefixes.seen(positions), strict=True) for own in row]
        at = torch.arange(len(seen)).repeat_interleave(torch.tensor(list(map(len, seen))))
        at = on_device(at, logits.device)
        # A prompt may hold ids that cannot be generated: they are given a place that is cut off again.
        tokens = torch.cat(seen).to(logits.device).clamp(max=vocabulary)
        wider = functional.pad(logits.reshape(-1, vocabulary), (0, 1))
        score = wider[at, tokens]
        wider[at, tokens] = torch.where(score < 0, score * processor.penalty, score / processor.penalty)
        return wider[:, :vocabulary].unflatten(0, logits.shape[:2])


def _run_of(processor: LogitsProcessor) -> type:
    if type(processor) is stock.RepetitionPenaltyLogitsProcessor:
        return Repetition
    return OverPrefixes if type(processor) in OF_PREFIX else OverLogits


class ProcessedSampler:
    """Chooses the tokens of one draft, position by position; see `BlockProcessors.draft_sampler`.

    sample: whether they are sampled. temperature: as in [`BlockProcessors`].
    """

    def __init__(self, processors: BlockProcessors, prefixes: Prefixes | None):
        self.processors, self.prefixes = processors, prefixes
        self.sample, self.temperature = processors.do_sample, processors.temperature

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [R] from logits [R, V], and what they were sampled from, `None` when they were not; see
        `as_drafted`."""
        own = self.processors
        if own.needs_prefix:
            at_target = logits.float().to(self.prefixes.tokens[0].device)
            processed = own(at_target[:, None], self.prefixes)[:, 0].to(logits.device)
        elif own.runs:
            processed = own(logits.float()[:, None], None)[:, 0]
        else:
            processed = logits.float() if self.sample else logits
        tokens = own.choose(processed) if self.sample else likeliest(processed)
        tokens, processed = as_drafted(tokens, processed if self.sample else None)
        if own.needs_prefix:
            self.prefixes = self.prefixes.longer(tokens.clamp(min=0))
        return tokens, processed
