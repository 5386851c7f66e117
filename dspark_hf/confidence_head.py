"""The confidence head: how likely a draft is accepted."""

import torch
from torch import nn

from .configuration_dspark import DSparkConfig


class ConfidenceHead(nn.Module):
    """c = sigmoid(w [h; W1[previous]] + b): the acceptance of a token given that those before it were accepted."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.with_markov = config.confidence_head_with_markov
        width = config.hidden_size + self.with_markov * config.markov_rank
        self.proj = nn.Linear(width, 1, bias=config.confidence_head_bias)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor | None) -> torch.Tensor:
        """Logits [...] from hidden states [..., d] and the Markov embeddings [..., r] of the previous tokens."""
        features = torch.cat([hidden, embedded], dim=-1) if self.with_markov else hidden
        return self.proj(features.to(self.proj.weight.dtype)).squeeze(-1)
