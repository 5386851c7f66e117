"""Errors about a target and a head that do not fit together, raised before the first token."""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ..modeling_dspark import DSparkHead


def check_pair(target: PreTrainedModel, head: DSparkHead) -> None:
    """Raise a `ValueError` that names both sides and the fix when `head` cannot draft for `target`."""
    name, config = type(target).__name__, head.config
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"A DSpark head drafts for decoder-only targets, but {name} is an encoder-decoder. Leave out "
            "`assistant_model`, or pass an encoder-decoder assistant."
        )
    text = target.config.get_text_config(decoder=True)
    fix = "Load the head that was trained for this target."
    for key, label in (("vocab_size", "a vocabulary of"), ("hidden_size", "hidden size")):
        wanted, found = getattr(config, key), getattr(text, key)
        if wanted != found:
            raise ValueError(f"The head was made for {label} {wanted}, but {name} has {label} {found}. {fix}")
    layers = text.num_hidden_layers
    if config.target_layer_ids[-1] >= layers:
        raise ValueError(
            f"The head reads the target's layers {config.target_layer_ids}, but {name} has {layers} layers "
            f"(0 to {layers - 1}). {fix}"
        )
    if config.num_target_layers not in (None, layers):
        raise ValueError(
            f"The head was made for a target of {config.num_target_layers} layers, but {name} has {layers}. {fix}"
        )


def check_mode(mode: GenerationMode, config: GenerationConfig) -> None:
    """Raise for decoding modes that a head cannot serve; transformers would ignore the head with a warning."""
    if mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"A DSpark head works with greedy decoding and sampling, but the settings ask for {mode.value} "
            f"(num_beams={config.num_beams}). Pass `num_beams=1`, or leave out `assistant_model`."
        )


def check_inputs(model_kwargs: dict[str, Any]) -> None:
    """Raise for inputs that the rounds cannot start from."""
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("A DSpark head needs token ids: pass `input_ids` instead of `inputs_embeds`.")


def check_prompt(target: PreTrainedModel, length: int) -> None:
    """Raise when a prompt of `length` tokens is longer than the positions the target knows."""
    limit = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"The prompt has {length} tokens, but {type(target).__name__} knows {limit} positions "
            "(`max_position_embeddings`). Shorten the prompt, for example with `truncation=True, "
            f"max_length={limit}` in the tokenizer call."
        )
