"""Qwen3-style draft backbone: decoder layers whose attention sees injected context (DFlash, paper section 3).

Queries come from the block only; keys and values from the projected target states of committed tokens and from the
block itself. The context part depends on nothing that a layer computes, so its keys and values can stay cached.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

from ..configuration_dspark import DSparkConfig

Rope = tuple[torch.Tensor, torch.Tensor]


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotary embedding of [R, heads, n, head_dim] with cosines and sines [R, n, head_dim]."""
    cos, sin = (part.unsqueeze(1) for part in rope)
    return x * cos + rotate_half(x) * sin


class DraftAttention(nn.Module):
    """Attention of a block over context and itself; families differ in norms, in values and in the query scale."""

    RMSNorm = Qwen3RMSNorm
    # Of queries; 1 / sqrt(head_dim) when `None`.
    scale: float | None = None

    def __init__(self, config: DSparkConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = self.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = self.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def keys_and_values(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, n, kv_heads, head_dim] each, before the rotary embedding, from [R, n, d]."""
        return self.k_norm(self._heads(self.k_proj(source))), self._heads(self.v_proj(source))

    def cached(self, source: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as a cache keeps them, [R, kv_heads, n, head_dim]."""
        keys, values = (x.transpose(1, 2) for x in self.keys_and_values(source))
        return rotate(keys, rope), values

    def forward(
        self, block: torch.Tensor, context: torch.Tensor, rope: Rope, mask: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        source = torch.cat([context, block], dim=1)
        queries = self.q_norm(self._heads(self.q_proj(block))).transpose(1, 2)
        size = block.shape[1]
        queries = rotate(queries, (rope[0][:, -size:], rope[1][:, -size:]))
        keys, values = self.cached(source, rope)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class DraftLayer(GradientCheckpointingLayer):
    def __init__(self, config: DSparkConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DraftAttention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, block: torch.Tensor, context: torch.Tensor, rope: Rope, mask: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        # The block passes the norm, the projected context does not: it was normalised by `hidden_norm`.
        block = block + self.self_attn(self.input_layernorm(block), context, rope, mask, cache)
        return block + self.mlp(self.post_attention_layernorm(block))


MLP, RMSNorm, RotaryEmbedding = Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding
