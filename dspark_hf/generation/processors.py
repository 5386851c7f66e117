"""Logits processors over a block of positions.

Processors that look only at the logits run once over the whole block; those that look at the tokens before run
position by position, each with the prefix it would have seen in plain decoding.
"""

import math
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as stock

PREFIX_FREE = (
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
)
# These keep a state that moves on by one token with every call; a block asks for several positions, some in vain.
ONE_TOKEN_AT_A_TIME = {
    stock.UnbatchedClassifierFreeGuidanceLogitsProcessor: "`guidance_scale` (classifier-free guidance)",
    stock.SynthIDTextWatermarkLogitsProcessor: "`watermarking_config` with SynthID",
}


class BlockProcessors:
    """Applies a `LogitsProcessorList` to several positions of several rows.

    Args:
        processors: the list that `generate` built.
        do_sample: whether tokens are sampled from the processed logits, or are their argmax.
        batch_size: of the `generate` call.

    Raises:
        ValueError: for processors that can only follow decoding one token at a time.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, batch_size: int = 1):
        for processor in processors:
            if type(processor) in ONE_TOKEN_AT_A_TIME:
                raise ValueError(
                    f"{ONE_TOKEN_AT_A_TIME[type(processor)]} keeps a state that advances with every single token, so "
                    "it cannot work with the blocks of a DSpark head. Leave it out, or leave out `assistant_model`."
                )
        self.processors = processors
        self.do_sample = do_sample
        self.batch_size = batch_size
        # An exact type: a subclass may look at the prefix.
        self.needs_prefix = any(type(processor) not in PREFIX_FREE for processor in processors)
        # What divides the logits when nothing else is done to them, else `None`.
        self.temperature: float | None = None
        if all(type(processor) is stock.TemperatureLogitsWarper for processor in processors):
            self.temperature = math.prod(processor.temperature for processor in processors)

    def on_target(
        self, logits: torch.Tensor, prefixes: Sequence[torch.Tensor] | None, rows: Sequence[int]
    ) -> torch.Tensor:
        """Processed target logits [R, n, V].

        Args:
            prefixes: for every row the tokens [length + n - 1], of which position j has seen all but the last
                n - 1 - j; only needed when `needs_prefix`.
            rows: place of every row in the batch that `generate` was called with.
        """
        if not self.processors:
            return logits
        if not self.needs_prefix:
            return self.processors(None, logits.flatten(0, 1)).view_as(logits)
        width = logits.shape[1]
        columns = [
            self._at_position([prefix[: len(prefix) - (width - 1 - j)] for prefix in prefixes], logits[:, j], rows)
            for j in range(width)
        ]
        return torch.stack(columns, dim=1)

    def _at_position(self, prefixes: Sequence[torch.Tensor], logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Processed logits [R, V] of one position. Processors may keep something for every row of the batch, so each
        is shown a whole batch, of one row's copies, and asked for that row."""
        size = self.batch_size
        return torch.stack(
            [
                self.processors(prefix.expand(size, -1), row_logits.repeat(size, 1))[row]
                for prefix, row_logits, row in zip(prefixes, logits, rows, strict=True)
            ]
        )

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [R] from processed logits [R, V]."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(-1)

    def drafting(self, prefixes: Sequence[torch.Tensor] | None, rows: Sequence[int]) -> "Selection":
        """Chooses the tokens of one draft. The head's logits go through the same processors as the target's: what
        they forbid or favour would otherwise be drafted in vain.

        Args:
            prefixes: for every row its tokens [length], anchor included; only needed when `needs_prefix`.
        """
        return Selection(self, prefixes, rows)


class Selection:
    """Chooses the tokens of one draft, position by position; see `BlockProcessors.drafting`.

    sample: whether they are sampled. temperature: as in [`BlockProcessors`].
    """

    def __init__(self, processors: BlockProcessors, prefixes: Sequence[torch.Tensor] | None, rows: Sequence[int]):
        self.processors, self.seen, self.rows = processors, prefixes, rows
        self.sample, self.temperature = processors.do_sample, processors.temperature

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [R] from logits [R, V], and what they were sampled from, `None` when they were not."""
        own = self.processors
        if not own.processors:
            processed = logits.float() if self.sample else logits
        elif not own.needs_prefix:
            processed = own.processors(None, logits.float())
        else:
            at_target = logits.float().to(self.seen[0].device)
            processed = own._at_position(self.seen, at_target, self.rows).to(logits.device)
        tokens = own.choose(processed)
        if own.needs_prefix:
            ahead = tokens.to(self.seen[0])
            self.seen = [torch.cat([prefix, token[None]]) for prefix, token in zip(self.seen, ahead, strict=True)]
        return tokens, processed if self.sample else None
