"""Logits processors over a block of positions.

What looks only at the logits runs once over the whole block; what looks at the tokens of its row runs position by
position, each with the prefix that it would have seen in plain decoding. All else, an application's own processors
among it, may keep a state, count its calls or tell rows apart by their place: those are only ever called as plain
decoding calls them, see `lockstep`.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as stock

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
    by_place = torch.is_tensor(getattr(processor, "prompt_ignore_length", None))
    return type(processor) in OF_LOGITS | OF_PREFIX and not by_place


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
        groups = itertools.groupby(pure, key=lambda processor: type(processor) in OF_PREFIX)
        self.runs = [(of_prefix, LogitsProcessorList(run)) for of_prefix, run in groups]
        self.needs_prefix = any(of_prefix for of_prefix, _ in self.runs)
        self.temperature: float | None = None
        if all(type(processor) is stock.TemperatureLogitsWarper for processor in pure):
            self.temperature = math.prod(processor.temperature for processor in pure)

    def __call__(self, logits: torch.Tensor, prefixes: Sequence[torch.Tensor] | None) -> torch.Tensor:
        """Processed logits [R, n, V] from logits [R, n, V].

        Args:
            prefixes: for every row the tokens [length + n - 1], of which position j has seen all but the last
                n - 1 - j; only needed when `needs_prefix`.
        """
        for of_prefix, run in self.runs:
            if of_prefix:
                logits = _with_prefixes(run, logits, prefixes)
            else:
                logits = run(None, logits.flatten(0, 1)).view_as(logits)
        return logits

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [R] from processed logits [R, V]."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(-1)

    def drafting(self, prefixes: Sequence[torch.Tensor] | None) -> "Selection":
        """Chooses the tokens of one draft. The head's logits go through the same processors as the target's: what
        they forbid or favour would otherwise be drafted in vain.

        Args:
            prefixes: for every row its tokens [length], anchor included; only needed when `needs_prefix`.
        """
        return Selection(self, prefixes)


def _with_prefixes(run: LogitsProcessorList, logits: torch.Tensor, prefixes: Sequence[torch.Tensor]) -> torch.Tensor:
    """[R, n, V], a position after the other; rows of one length together."""
    count, columns = logits.shape[1], []
    for j in range(count):
        seen = [prefix[: len(prefix) - count + 1 + j] for prefix in prefixes]
        if len(set(map(len, seen))) == 1:
            columns.append(run(torch.stack(seen), logits[:, j]))
        else:
            rows = zip(seen, logits[:, j : j + 1].unbind(), strict=True)
            columns.append(torch.cat([run(prefix[None], row) for prefix, row in rows]))
    return columns[0][:, None] if count == 1 else torch.stack(columns, dim=1)


class Selection:
    """Chooses the tokens of one draft, position by position; see `BlockProcessors.drafting`.

    sample: whether they are sampled. temperature: as in [`BlockProcessors`].
    """

    def __init__(self, processors: BlockProcessors, prefixes: Sequence[torch.Tensor] | None):
        self.processors, self.seen = processors, prefixes
        self.sample, self.temperature = processors.do_sample, processors.temperature

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [R] from logits [R, V], and what they were sampled from, `None` when they were not."""
        own = self.processors
        if own.needs_prefix:
            at_target = logits.float().to(self.seen[0].device)
            processed = own(at_target[:, None], self.seen)[:, 0].to(logits.device)
        elif own.runs:
            processed = own(logits.float()[:, None], None)[:, 0]
        else:
            processed = logits.float() if self.sample else logits
        tokens = own.choose(processed)
        if own.needs_prefix:
            ahead = tokens.to(self.seen[0])
            self.seen = [torch.cat([prefix, token[None]]) for prefix, token in zip(self.seen, ahead, strict=True)]
        return tokens, processed if self.sample else None
