"""Errors about a target and a head that do not fit together, raised before the first token."""

import inspect
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.utils import logging

from ..modeling_dspark import DSparkHead
from ..pairing import doubts, misfits
from .compressed import FAMILIES
from .packing import implementation_of
from .releases import CACHE
from .states import KINDS

logger = logging.get_logger(__name__)

# Layers that keep nothing are among them.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "moe", "mlp"}
RECURRENT_LAYERS = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}
# Text configs of models whose recurrent and convolutional layers are known; see `states` and `recurrences`.
HYBRIDS = {
    "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "nemotron_h", "olmo_hybrid",
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next",
}  # fmt: skip
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "dspark")
# Inputs of `generate` that the rounds make themselves.
HANDLED_INPUTS = {
    "input_ids", "attention_mask", "position_ids", "cache_position", "logits_to_keep", "use_cache", CACHE,
    "inputs_embeds", "output_attentions", "output_hidden_states", "inputs_tensor", "tokenizer", "assistant_tokenizer",
}  # fmt: skip
# Inputs that hold pictures, or since 5.18 what `generate` has made of them; and those that come with them.
PICTURES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
BESIDE_PICTURES = {
    "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "token_type_ids", "image_sizes",
    "pixel_attention_mask", "spatial_shapes", "image_position_ids", "video_position_ids",
}  # fmt: skip
# Architectures without `position_ids` whose position bias counts the cache's columns, which are each row's positions.
POSITIONS_FROM_COLUMNS = {"mpt"}


def check_pair(target: PreTrainedModel, head: DSparkHead) -> None:
    """Raise a `ValueError` that names both sides and the fix when `head` cannot draft for `target`."""
    name, config = type(target).__name__, head.config
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"A DSpark head drafts for decoder-only targets, but {name} is an encoder-decoder. Leave out "
            "`assistant_model`, or pass an encoder-decoder assistant."
        )
    check_layers(target)
    check_attention(target)
    problems = misfits(config, target.config)
    if problems:
        raise ValueError(f"{problems[0]} Load the head that was trained for this target ({name}).")
    for doubt in doubts(config, target.config):
        logger.warning_once(doubt)


def check_layers(target: PreTrainedModel) -> None:
    """Raise for layers that keep neither a slot of keys and values a row, which a rollback by length needs, nor a state
    that we know how to take back."""
    name, text = type(target).__name__, target.config.get_text_config(decoder=True)
    types = set(getattr(text, "layer_types", None) or ())
    if getattr(text, "attention_chunk_size", None) is not None and not types:
        types = {"chunked_attention"}
    is_known = text.model_type in HYBRIDS | FAMILIES
    if is_known and target._compiled_call_impl is not None:
        raise ValueError(
            f"{name} has recurrent or compressed layers, and what they keep cannot be told from a compiled model. "
            "Leave out `model.compile()`, or `assistant_model`."
        )
    if is_known:
        types -= set(KINDS if text.model_type in HYBRIDS else types)
    others = types - ATTENTION_LAYERS
    if others & RECURRENT_LAYERS or (target._is_stateful and not is_known and not others):
        raise ValueError(
            f"{name} has recurrent layers ({_listed(others & RECURRENT_LAYERS) or 'stateful'}), and how to take their "
            f"state back when a draft is rejected is known of {_listed(HYBRIDS)} only. Leave out `assistant_model`."
        )
    if others:
        raise ValueError(
            f"{name} has layers of type {_listed(others)}. DSpark heads draft for targets whose layers are full or "
            "sliding attention, or recurrent ones that are known; leave out `assistant_model`."
        )


def check_attention(target: PreTrainedModel) -> None:
    """Raise when the target cannot be told what each row of the batch sees, or at which positions it is."""
    name, text = type(target).__name__, target.config.get_text_config(decoder=True)
    implementation = implementation_of(text)
    takes_positions = "position_ids" in inspect.signature(target.forward).parameters
    if not takes_positions and text.model_type not in POSITIONS_FROM_COLUMNS:
        raise ValueError(
            f"{name} takes no `position_ids`, which rows that accept different numbers of drafts need. Leave out "
            "`assistant_model`."
        )
    if getattr(text, "alibi", False):
        raise ValueError(
            f"{name} computes its positions (ALiBi) from a two-dimensional attention mask, but rows that accept "
            "different numbers of drafts need their own masks. Leave out `assistant_model`."
        )
    if getattr(text, "prefix_lm", False):
        raise ValueError(
            f"{name} reads its prompt in both directions (`prefix_lm=True`), but DSpark rounds mask causally. Leave "
            "out `assistant_model`."
        )
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"The attention of {name}, {implementation!r}, cannot take the masks of rows that accept different numbers "
            'of drafts. Load the target with `attn_implementation="sdpa"`, or call '
            '`model.set_attn_implementation("sdpa")`; "eager" and "flex_attention" work too.'
        )


def check_mode(mode: GenerationMode, config: GenerationConfig) -> None:
    """Raise for decoding modes that a head cannot serve; transformers would ignore the head with a warning. Point out
    settings that change no text but do nothing beside a head."""
    if mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"A DSpark head works with greedy decoding and sampling, but the settings ask for {mode.value} "
            f"(num_beams={config.num_beams}). Pass `num_beams=1`, or leave out `assistant_model`."
        )
    weight = getattr(config, "assistant_ensemble_weight", None)
    if weight is not None:
        raise ValueError(
            f"`assistant_ensemble_weight={weight}` mixes the assistant's distribution into the target's, but with a "
            "DSpark head text is the target's own. Leave it out."
        )
    for name in ("cache_implementation", "compile_config"):
        value = getattr(config, name, None)
        if value is not None and config.cache_implementation != "static":
            logger.warning_once(f"`{name}={value}` does nothing with a DSpark head, whose rounds keep their own cache.")


def check_sequences(config: GenerationConfig) -> None:
    """Raise for several texts of a prompt, as transformers does beside any assistant."""
    if config.num_return_sequences > 1:
        raise ValueError(
            f"A DSpark head writes one text for each prompt, not num_return_sequences={config.num_return_sequences}. "
            "Repeat the prompt in the batch, or leave out `assistant_model`."
        )


def check_inputs(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The scalars among the inputs of a call, which every pass of the target is given.

    Raises:
        ValueError: for inputs that the rounds cannot start from, or do not forward.
    """
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("A DSpark head needs token ids: pass `input_ids` instead of `inputs_embeds`.")
    name = _unknown_input(model_kwargs)
    if name is not None:
        raise ValueError(
            f"DSpark decoding does not forward `{name}` to the model. Leave it out, or leave out `assistant_model`."
        )
    return {name: value for name, value in model_kwargs.items() if name not in HANDLED_INPUTS and _is_scalar(value)}


def reason_for_plain(target: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> str | None:
    """Why a call is decoded without its head, a clause; `None` where nothing speaks against the head.

    That is so where the model, or PEFT around it, makes something else of a step than a pass over tokens: what
    `prepare_inputs_for_generation` would run is seen by asking it for the first step.
    """
    given, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
    first = target.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    prepared = first.get(CACHE)
    embeds = model_kwargs.get("inputs_embeds") is None and first.get("inputs_embeds") is not None
    if embeds or (prepared is not given and prepared is not None):
        return "prompts of virtual tokens (PEFT's prompt and prefix tuning) change every step"
    added = _unknown_input({name: value for name, value in first.items() if name not in model_kwargs})
    if added is not None:
        return f"`prepare_inputs_for_generation` of {type(target).__name__} adds `{added}` to every step"
    if len(input_ids) > 1 and any(map(_has_adapter_names, target.modules())):
        return "`adapter_names` gives each row of the batch an adapter of its own"
    columns = input_ids.shape[1] if mask is None else mask.shape[1]
    if getattr(given, "_is_user_defined", False) and columns < given.get_seq_length():
        return f"the attention mask covers {columns} tokens, fewer than the cache holds"
    return None


def _unknown_input(inputs: dict[str, Any]) -> str | None:
    """The first of a step's inputs that the rounds neither make themselves nor forward."""
    known = HANDLED_INPUTS | (BESIDE_PICTURES | set(PICTURES) if has_pictures(inputs) else set())
    for name, value in inputs.items():
        empty = value is None or (isinstance(value, (dict, list, tuple)) and not value)
        zeros = name.endswith("token_type_ids") and torch.is_tensor(value) and not value.any()
        if not (empty or zeros or name in known or _is_scalar(value)):
            return name
    return None


def has_pictures(inputs: dict[str, Any]) -> bool:
    """Whether the inputs of a call or a step hold pictures."""
    # Of no pictures `generate` makes an empty dict.
    return any(inputs.get(name) is not None and len(inputs[name]) for name in PICTURES)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _has_adapter_names(module: torch.nn.Module) -> bool:
    """Whether PEFT has hung an adapter for each row on the module, as it does for the length of a call."""
    return any("adapter_names" in getattr(hook, "keywords", ()) for hook in module._forward_pre_hooks.values())


def check_positions(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    """Raise for positions other than those that count a row's tokens, which is where its slots put them."""
    if position_ids is None or (attention_mask is not None and attention_mask.shape != position_ids.shape):
        return
    if attention_mask is None:
        attention_mask = torch.ones_like(position_ids)
    counted, real = attention_mask.cumsum(-1) - 1, attention_mask.bool()
    if (position_ids != counted)[real].any():
        raise ValueError(
            "The given `position_ids` do not count the tokens of each prompt. A DSpark head needs those that do: leave "
            "`position_ids` out."
        )


def check_padding(target: PreTrainedModel, attention_mask: torch.Tensor | None) -> None:
    """Raise for a mask [R, P] that hides a token behind one that it shows: attention leaves it out, but what a state
    that goes from token to token makes of it is each layer's own."""
    if attention_mask is None:
        return
    hidden = (attention_mask[:, 1:].bool() < attention_mask[:, :-1].bool()).nonzero()
    if len(hidden):
        row, column = hidden[0].tolist()
        raise ValueError(
            f"The attention mask hides column {column + 1} of row {row}, which follows a token that it shows. "
            f"{type(target).__name__} keeps states of whole texts (recurrent, convolutional or compressed), with which "
            'DSpark decoding takes padding on the left only: set `tokenizer.padding_side = "left"`. If the prompt '
            "holds the pad token, pass its `attention_mask`; or leave out `assistant_model`."
        )


def check_prompt(target: PreTrainedModel, limit: int | None, length: int) -> None:
    """Raise when `length` tokens of a row are more than the `limit` positions that the target has a table of."""
    if limit is not None and length > limit:
        raise ValueError(
            f"A row has {length} tokens, but {type(target).__name__} knows {limit} positions "
            "(`max_position_embeddings`). Shorten the prompt, for example with `truncation=True, "
            f"max_length={limit}` in the tokenizer call, or pass a smaller `max_new_tokens`."
        )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
