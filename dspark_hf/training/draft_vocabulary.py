"""A reduced draft vocabulary: the tokens that the data has most often.

The head then has an LM head of its own, the target's rows of these tokens, so that drafting multiplies no others.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_dspark import DSparkConfig
from ..modeling_dspark import DSparkHead
from ..shared_embeddings import is_plain, scales_logits
from .data import Row


def most_frequent(rows: Iterable[Row], size: int, vocab_size: int) -> torch.Tensor:
    """[size] int64, increasing: the tokens most often supervised in the data, as only those are drafted; where it has
    fewer, the first of the others too.

    Raises:
        ValueError: for a size that is no part of the vocabulary.
    """
    if not 0 < size < vocab_size:
        raise ValueError(f"`draft_vocab_size` must be 1 to {vocab_size - 1}, a part of the vocabulary, got {size}.")
    counts = Counter(token for row in rows for token, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on)
    seen = sorted(counts, key=lambda token: (-counts[token], token))[:size]
    others = (token for token in range(vocab_size) if token not in counts)
    return torch.tensor(sorted([*seen, *(next(others) for _ in range(size - len(seen)))]))


def owns_lm_head(target: PreTrainedModel) -> bool:
    """Whether a head can have rows of the target's LM head: a quantised or scaled one is more than its rows."""
    return is_plain(target.get_output_embeddings(), nn.Linear) and not scales_logits(target)


@torch.no_grad()
def choose_draft_vocabulary(head: DSparkHead, target: PreTrainedModel, rows: Iterable[Row]) -> float:
    """Make the most frequent tokens of the data the draft vocabulary of a fresh head.

    Returns:
        the share of supervised tokens that are in it.
    """
    config: DSparkConfig = head.config
    rows = list(rows)
    tokens = most_frequent(rows, config.draft_vocab_size, config.vocab_size)
    head.d2t.copy_(tokens - torch.arange(len(tokens)))
    if head.lm_head is not None:
        head.lm_head.weight.copy_(target.get_output_embeddings().weight[tokens.to(target.device)])
    drafted = set(tokens.tolist())
    inside = [
        token in drafted for row in rows for token, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on
    ]
    return sum(inside) / len(inside)
