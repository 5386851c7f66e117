"""Gemma 4 draft backbone: Gemma's decoder layer around the block attention of `qwen3`.

What differs: norms before and after attention and MLP, a weightless norm on the values, which in the alternative
attention are the keys before their norm, a query scale of 1, a rotary embedding that turns only the first part of each
head, and a scalar a layer. All draft layers are of the full-attention kind, whatever the target
mixes. Facts: DeepSpec's Gemma 4 heads; modules: transformers.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from ..configuration_dspark import DSparkConfig
from .qwen3 import MLP, Rope, RotaryEmbedding, rotate


class DraftAttention(nn.Module):
    def __init__(self, config: DSparkConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = None if config.attention_k_eq_v else nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.q_norm = Gemma4RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Gemma4RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.v_norm = Gemma4RMSNorm(self.head_dim, eps=config.rms_norm_eps, with_scale=False)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(
        self, block: torch.Tensor, context: torch.Tensor, rope: Rope, mask: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        source = torch.cat([context, block], dim=1)
        queries = self.q_norm(self._heads(self.q_proj(block))).transpose(1, 2)
        projected = self._heads(self.k_proj(source))
        keys = self.k_norm(projected).transpose(1, 2)
        values = projected if self.v_proj is None else self._heads(self.v_proj(source))
        values = self.v_norm(values).transpose(1, 2)
        size = block.shape[1]
        queries = rotate(queries, (rope[0][:, -size:], rope[1][:, -size:]))
        keys = rotate(keys, rope)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class DraftLayer(nn.Module):
    def __init__(self, config: DSparkConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DraftAttention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self, block: torch.Tensor, context: torch.Tensor, rope: Rope, mask: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        mixed = self.self_attn(self.input_layernorm(block), context, rope, mask, cache)
        block = block + self.post_attention_layernorm(mixed)
        expanded = self.mlp(self.pre_feedforward_layernorm(block))
        return (block + self.post_feedforward_layernorm(expanded)) * self.layer_scalar


RMSNorm = Gemma4RMSNorm

__all__ = ["DraftLayer", "RMSNorm", "RotaryEmbedding"]
