"""Sequential heads: the bias that the previous token adds to the logits of a block position (paper, section on the
semi-autoregressive head).

All three look the previous token up in W1 [V, r] and project to the (draft) vocabulary with W2 [V, r]. Shapes below use
`...` for any leading dimensions, d = hidden size, r = rank, V = vocabulary.
"""

import torch
from torch import nn

from .configuration_dspark import DSparkConfig

# The logit of a token outside the draft vocabulary. Its probability is exactly 0, as it is with -inf; but where a
# processor leaves nothing but such tokens, there still is a distribution to draw from.
OUTSIDE = -1e30


class VanillaHead(nn.Module):
    """First-order Markov head: B(t, .) = W1[t] W2."""

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.rank = config.markov_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.draft_vocab_size or config.vocab_size, bias=False)

    def embed(self, previous: torch.Tensor) -> torch.Tensor:
        """W1 rows [..., r] of the previous tokens [...]."""
        return self.markov_w1(previous)

    def initial_state(self, embedded: torch.Tensor) -> torch.Tensor | None:
        """State before the first position of a block; `None` for heads without memory."""
        return None

    def step(
        self, hidden: torch.Tensor, embedded: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bias [..., V] of one position from its hidden state [..., d], the embedded previous token [..., r] and the
        state of the position before; and the new state."""
        mixed, state = self.mix(hidden, embedded, state)
        return self.markov_w2(mixed), state

    def mix(
        self, hidden: torch.Tensor, embedded: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What W2 is multiplied by, [..., r], and the new state; arguments as in `step`."""
        return embedded, None

    def mix_block(self, hidden: torch.Tensor, embedded: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        """What W2 is multiplied by, [..., B, r], of a block [..., B, d] whose previous tokens are known; arguments
        as in `step`, with a dimension for the block."""
        return self.mix(hidden, embedded, state)[0]


class GatedHead(VanillaHead):
    """The W1 row passes a gate that sees the hidden state: g = sigmoid(gate([h; W1[t]]))."""

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size + self.rank, self.rank)

    def mix(self, hidden, embedded, state):
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], dim=-1)))
        return gate * embedded, None


class RnnHead(VanillaHead):
    """A gated recurrence over the positions of the block; the state starts at zero with every block."""

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        self.joint_proj = nn.Linear(2 * self.rank + config.hidden_size, 3 * self.rank)

    def initial_state(self, embedded):
        return torch.zeros_like(embedded)

    def mix(self, hidden, embedded, state):
        gate, candidate, output = self.joint_proj(torch.cat([state, embedded, hidden], dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)

    def mix_block(self, hidden, embedded, state):
        block = []
        for h, e in zip(hidden.unbind(-2), embedded.unbind(-2), strict=True):
            mixed, state = self.mix(h, e, state)
            block.append(mixed)
        return torch.stack(block, dim=-2)


HEADS = {"vanilla": VanillaHead, "gated": GatedHead, "rnn": RnnHead}


def build_sequential_head(config: DSparkConfig) -> VanillaHead | None:
    """The config's sequential head, or `None` when its rank is 0."""
    return HEADS[config.markov_head_type](config) if config.markov_rank else None


def as_drafted(tokens: torch.Tensor, logits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Drafts [...] that are tokens, and the logits [..., V] that they were sampled from, `None` when they were not.

    Where logits are no distribution, there is no token (-1). Token 0 stands for it, as if nothing else could have been
    drawn: it is verified as any draft is, and what is committed stays the target's.
    """
    if logits is not None:
        certain = logits.new_full(logits.shape[-1:], OUTSIDE)
        certain[0] = 0
        logits = logits.where(tokens[..., None] >= 0, certain)
    return tokens.clamp(min=0), logits
