"""Prompts with pictures and videos: read as plain `generate` reads them, into a cache that the rounds go on from.

Only prompts hold pictures, and what belongs to them (where they lie, how large they are, in which directions their
tokens see each other) is the model's own business. So the prompt, but for its last token, is read by a pass like
plain's; what follows is text, at positions that lie a fixed number from those that count a row's tokens (M-RoPE).
"""

import weakref
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig

from ..modeling_dspark import DSparkHead
from .hidden_states import request_for
from .past import DraftPast, RowPast
from .releases import CACHE
from .target import Target

# Inputs with a column for each token.
OF_TOKENS = ("attention_mask", "position_ids", "mm_token_type_ids", "token_type_ids")


def check_pictures(config: GenerationConfig, inputs: dict[str, Any]) -> None:
    """Raise a `ValueError` for what does not go with pictures."""
    if getattr(inputs.get(CACHE), "_is_user_defined", False):
        raise ValueError(
            f"DSpark decoding does not continue a cache with further pictures. Leave out `{CACHE}` and pass the whole "
            "conversation, or leave out `assistant_model`."
        )
    wanted = [name for name in ("output_hidden_states", "output_attentions") if getattr(config, name, None)]
    if wanted and config.return_dict_in_generate:
        raise ValueError(
            f"With pictures DSpark decoding does not record what `{wanted[0]}` asks for. Leave it out, or leave out "
            "`assistant_model`."
        )


def read_pictures(target: Target, head: DSparkHead, input_ids: torch.Tensor, inputs: dict[str, Any]) -> Cache:
    """A cache of all columns of the prompts [R, P] but the last, which remembers what the head is to know of them."""
    model, cache = target.model, DynamicCache(config=target.model.config)
    but_last = {name: inputs[name][..., :-1] for name in OF_TOKENS if inputs.get(name) is not None}
    prepared = model.prepare_inputs_for_generation(
        input_ids[:, :-1], is_first_iteration=True, **inputs | but_last | {CACHE: cache, "use_cache": True}
    )
    outputs = model(**prepared, output_hidden_states=request_for(target.hidden_state_indices), return_dict=True)
    features, mask = target.features_of(outputs), but_last.get("attention_mask")
    rows = list(features) if mask is None else [own[on.bool()] for own, on in zip(features, mask, strict=True)]
    cache.dspark = DraftPast(weakref.ref(head), [RowPast([], [], own) for own in rows])
    cache._is_user_defined = True
    return cache


def offsets_of(inputs: dict[str, Any]) -> list[int] | None:
    """[R], how far the position of each row's last token, and all that follow, lies from the number of tokens before
    it; `None` where positions count tokens."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None or positions.ndim != 3:
        return None
    last = positions[-1, :, -1]
    counted = torch.full_like(last, positions.shape[-1]) if mask is None else mask.sum(dim=-1)
    return (last - counted + 1).tolist()
