"""Logits processors over a block of positions.

Processors that look only at the logits run once over the whole block; those that look at the tokens before run
position by position, each with the prefix it would have seen in plain decoding.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as stock

from ..modeling_dspark import Select

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

    def drafting(self, prefixes: Sequence[torch.Tensor] | None, rows: Sequence[int]) -> Select:
        """Chooses the tokens of one draft. The head's logits go through the same processors as the target's: what
        they forbid or favour would otherwise be drafted in vain.

        Args:
            prefixes: for every row its tokens [length], anchor included; only needed when `needs_prefix`.
        """
        seen = prefixes

        def select(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            nonlocal seen
            if not self.processors:
                processed = logits.float() if self.do_sample else logits
            elif not self.needs_prefix:
                processed = self.processors(None, logits.float())
            else:
                processed = self._at_position(seen, logits.float().to(seen[0].device), rows).to(logits.device)
            tokens = self.choose(processed)
            if self.needs_prefix:
                seen = [
                    torch.cat([prefix, token[None]]) for prefix, token in zip(seen, tokens.to(seen[0]), strict=True)
                ]
            return tokens, processed if self.do_sample else None

        return select
