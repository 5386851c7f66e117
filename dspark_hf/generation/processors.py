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
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool):
        self.processors = processors
        self.do_sample = do_sample
        # An exact type: a subclass may look at the prefix.
        self.prefix_free = LogitsProcessorList(p for p in processors if type(p) in PREFIX_FREE)
        self.all_prefix_free = len(self.prefix_free) == len(processors)

    def on_target(self, logits: torch.Tensor, prefixes: list[torch.Tensor] | None) -> torch.Tensor:
        """Processed target logits [R, n, V].

        Args:
            prefixes: for every row the tokens [1, length + n - 1] of which position j has seen all but the last
                n - 1 - j; only needed (and only built) when `needs_prefix`.
        """
        if not self.processors:
            return logits
        if self.all_prefix_free:
            return self.prefix_free(None, logits.flatten(0, 1)).view_as(logits)
        processed = torch.empty_like(logits)
        width = logits.shape[1]
        for row, prefix in enumerate(prefixes):
            for j in range(width):
                seen = prefix[:, : prefix.shape[1] - (width - 1 - j)]
                processed[row, j] = self.processors(seen, logits[row : row + 1, j].clone())[0]
        return processed

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
