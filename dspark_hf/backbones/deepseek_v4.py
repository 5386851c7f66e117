"""DeepSeek V4 draft backbone: transformers' own decoder layer of the target, a stage.

A stage is a V4 layer of the sliding kind without compression, with experts and hyper-connections: what flows from stage
to stage is several streams a token. It differs from the target's in what attention sees: in front of the block's keys
lie those of the context, which come from the projected target states, and the rows of a block all see each other. Keys
are the values.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from ..configuration_dspark import DSparkConfig
from .qwen3 import Rope

RMSNorm = v4.DeepseekV4RMSNorm
# Parts of names of what is computed in float32, whatever the type of the head: as the target, and the confidence.
KEPT_IN_FLOAT32 = [*v4.DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict, "confidence_head"]


def stage_config(config: DSparkConfig) -> DeepseekV4Config:
    """The config of a V4 model that has the stages for its layers."""
    stages = config.num_hidden_layers
    own = {
        "num_hidden_layers": stages,
        "layer_types": ["sliding_attention"] * stages,
        "mlp_layer_types": ["moe"] * stages,
    }
    # A copy, as the config fills in what its parts leave out.
    made = DeepseekV4Config(**copy.deepcopy(config.stage_config) | own)
    # What V4 models have by default: its attention has no other, and these experts keep the host from waiting.
    made._attn_implementation, made._experts_implementation = "eager", "grouped_mm"
    return made


class RotaryEmbedding(nn.Module):
    """Cosines and sines [R, n, rotated / 2] each, of the target's sliding layers; named so that transformers knows how
    to fill its buffers."""

    rope_type = "default"

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.config = stage_config(config)
        frequencies, _ = self.compute_default_rope_parameters(self.config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DeepseekV4Config) -> tuple[torch.Tensor, float]:
        return v4.DeepseekV4RotaryEmbedding.compute_default_rope_parameters(config, layer_type="main")

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> Rope:
        turned = positions[..., None].float() * self.inv_freq.float()
        return turned.cos().to(x.dtype), turned.sin().to(x.dtype)


class StreamHead(v4.DeepseekV4HyperHead):
    """What makes streams [R, Q, s, d] of a block [R, Q, d], and the block of streams again."""

    def __init__(self, config: DSparkConfig):
        super().__init__(stage_config(config))
        nn.init.normal_(self.hc_fn, std=config.initializer_range)
        nn.init.zeros_(self.hc_base)
        nn.init.ones_(self.hc_scale)

    def spread(self, block: torch.Tensor) -> torch.Tensor:
        return block.unsqueeze(2).expand(-1, -1, self.hc_mult, -1).contiguous()


class Behind:
    """What V4's attention takes for its cache in one layer: the keys of a block come back behind those of its context.

    Args:
        context: keys [R, 1, C, head_dim] that the cache does not hold yet. mask: [R, 1, 1 or Q, keys] bool.
        most: keys that any row sees at most.
    """

    def __init__(self, context: torch.Tensor, mask: torch.Tensor, cache: Cache | None, most: int):
        self.context, self.cache = context, cache
        self.index = seen_at(mask, most)
        shown = mask if self.index is None else mask.gather(-1, self.index)
        # What is added to the scores.
        self.mask = torch.zeros_like(shown, dtype=context.dtype).masked_fill(~shown, torch.finfo(context.dtype).min)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.cat([self.context, keys], dim=2)
        if self.cache is not None:
            keys, _ = self.cache.update(keys, no_values(keys), layer_idx)
        if self.index is not None:
            keys = keys.gather(2, self.index.transpose(2, 3).expand(-1, -1, -1, keys.shape[3]))
        return keys, keys


def seen_at(mask: torch.Tensor, most: int) -> torch.Tensor | None:
    """[R, 1, 1, most] int64, the keys that are looked at where all rows of a block see the same ones; `None` where that
    saves nothing. The target's heads share keys, so that eager attention makes a copy for each of them."""
    if mask.shape[2] > 1 or mask.shape[-1] <= most:
        return None
    return mask.to(torch.uint8).topk(most, dim=-1).indices.sort(dim=-1).values


def no_values(keys: torch.Tensor) -> torch.Tensor:
    """What a cache keeps as values beside keys that are the values: nothing."""
    return keys[..., :0]


class DraftAttention(v4.DeepseekV4Attention):
    def cached(self, source: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [R, 1, n, head_dim] of [R, n, d] as a cache keeps them, and no values."""
        keys = v4.apply_rotary_pos_emb(self.kv_norm(self.kv_proj(source)).unsqueeze(1), *rope)
        return keys, no_values(keys)

    def forward(self, hidden_states: torch.Tensor, rope: Rope, behind: Behind) -> tuple[torch.Tensor, None]:
        # By place: releases have different names for the cache.
        return super().forward(hidden_states, {"main": rope}, None, behind.mask, behind)


class DraftLayer(v4.DeepseekV4DecoderLayer):
    """A stage: streams [R, Q, s, d] in and out."""

    def __init__(self, config: DSparkConfig, layer_idx: int):
        own = stage_config(config)
        super().__init__(own, layer_idx)
        self.self_attn = DraftAttention(own, layer_idx)
        initialise(self, config.initializer_range)

    def forward(
        self, block: torch.Tensor, context: torch.Tensor, rope: Rope, mask: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        count, size = context.shape[1], block.shape[1]
        before, own = [tuple(part.split([count, size], dim=1)[i] for part in rope) for i in (0, 1)]
        keys, _ = self.self_attn.cached(context, before)
        behind = Behind(keys, mask, cache, self.self_attn.sliding_window + size)
        return super().forward(block, rope=own, behind=behind)


def initialise(layer: DraftLayer, std: float) -> None:
    """Give the parameters that are no module's of torch the values of a fresh model."""
    nn.init.zeros_(layer.self_attn.sinks)
    for weight in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
        nn.init.normal_(weight, std=std)
    for mixing in (layer.attn_hc, layer.ffn_hc):
        nn.init.normal_(mixing.fn, std=std)
        nn.init.zeros_(mixing.base)
        nn.init.ones_(mixing.scale)
