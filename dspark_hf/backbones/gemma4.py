"""Gemma 4 draft backbone: Gemma's decoder layer around the block attention of `qwen3`.

What differs: norms before and after attention and MLP, a weightless norm on the values, which in the alternative
attention are the keys before their norm, a query scale of 1, a rotary embedding that turns only the first part of each
head, and a scalar a layer. All draft layers are of the full-attention kind, whatever the target mixes. Facts:
DeepSpec's Gemma 4 heads; modules: transformers.
"""

import torch
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from ..configuration_dspark import DSparkConfig
from . import qwen3
from .qwen3 import MLP, Rope, RotaryEmbedding


class DraftAttention(qwen3.DraftAttention):
    RMSNorm = Gemma4RMSNorm
    scale = 1.0

    def __init__(self, config: DSparkConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.attention_k_eq_v:
            self.v_proj = None
        self.v_norm = Gemma4RMSNorm(self.head_dim, eps=config.rms_norm_eps, with_scale=False)

    def keys_and_values(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        projected = self._heads(self.k_proj(source))
        values = projected if self.v_proj is None else self._heads(self.v_proj(source))
        return self.k_norm(projected), self.v_norm(values)


class DraftLayer(GradientCheckpointingLayer):
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
