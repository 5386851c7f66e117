"""Logits processors over a block of positions.

Processors that look only at the logits run once over the whole block; those that look at the tokens before run
position by position, each with the prefix it would have seen in plain decoding.
"""

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

PREFIX_FREE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class BlockProcessors:
    """Applies a `LogitsProcessorList` to several positions of several rows.

    Args:
        processors: the list that `generate` built.
        do_sample: whether tokens are sampled from the processed logits, or are their argmax.
        batch_size: of the `generate` call.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, batch_size: int = 1):
        self.batch_size = batch_size
        self.processors = processors
        self.do_sample = do_sample
        # An exact type: a subclass may look at the prefix.
        self.prefix_free = LogitsProcessorList(p for p in processors if type(p) in PREFIX_FREE)
        self.all_prefix_free = len(self.prefix_free) == len(processors)

    def on_target(self, logits: torch.Tensor, prefixes: list[torch.Tensor] | None, rows: list[int]) -> torch.Tensor:
        """Processed target logits [R, n, V].

        Args:
            prefixes: for every row the tokens [length + n - 1], of which position j has seen all but the last
                n - 1 - j; only needed (and only built) when `needs_prefix`.
            rows: place of every row in the batch that `generate` was called with.
        """
        if not self.processors:
            return logits
        if self.all_prefix_free:
            return self.prefix_free(None, logits.flatten(0, 1)).view_as(logits)
        processed = torch.empty_like(logits)
        width = logits.shape[1]
        for r, (prefix, row) in enumerate(zip(prefixes, rows, strict=True)):
            for j in range(width):
                seen = prefix[: len(prefix) - (width - 1 - j)]
                processed[r, j] = self._in_batch(seen, logits[r, j], row)
        return processed

    def _in_batch(self, seen: torch.Tensor, logits: torch.Tensor, row: int) -> torch.Tensor:
        """Processed logits [V] of one position. Processors may keep something for every row of the batch, so each is
        shown a whole batch, of this row's copies, and asked for this row."""
        return self.processors(seen.expand(self.batch_size, -1), logits.repeat(self.batch_size, 1))[row]

    @property
    def needs_prefix(self) -> bool:
        return bool(self.processors) and not self.all_prefix_free

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [R] from processed logits [R, V]."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(-1)

    def select_draft(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft tokens [R] of position k from the head's logits [R, V], and what they were sampled from."""
        if not self.do_sample:
            return logits.argmax(dim=-1), None
        processed = self.prefix_free(None, logits.float()) if self.prefix_free else logits.float()
        return self.choose(processed), processed
