"""What the layouts share when they are written."""

from collections.abc import Mapping
from typing import Any

# Keys of a Qwen3 draft that all layouts but DeepSpec's write under the same names.
QWEN3_KEYS = (
    "attention_bias",
    "attention_dropout",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)
CALIBRATION = ("confidence_temperatures", "confidence_shifts")

# Why a layout cannot hold a value other than the one it implies.
REASONS = {
    "backbone": "it knows Qwen3 draft layers only",
    "attention_k_eq_v": "its values have their own projection",
    "final_logit_softcapping": "it does not cap logits",
    "embedding_scale": "it does not scale the embedding",
    "draft_vocab_size": "it drafts from the whole vocabulary",
    "sample_from_anchor": "in it the anchor's row is the first prediction",
    "layer_types": "its layers have no window",
    "window_counted_from": "its windows are counted from elsewhere",
    "sliding_is_causal": "its sliding layers look at the block in another way",
    "borrow_lm_head": "it has both of embedding and LM head in the file, or neither",
    "markov_rank": "it always has a sequential head",
    "confidence_head_with_markov": "its confidence head always sees the previous token",
    "confidence_head_bias": "its confidence head always adds a number",
    "enable_confidence_head": "it has no confidence head",
}


class CannotExpress(ValueError):
    """A layout has no way to say what a head is."""


def require_values(layout: str, native: Mapping[str, Any], **allowed: Any) -> None:
    """Raise where a key has another value than the only one that a layout can express."""
    for key, value in allowed.items():
        if native[key] != value:
            raise CannotExpress(
                f"The {layout} layout cannot express this head: {REASONS[key]}, but the head has {key}={native[key]!r}."
            )


def slides(native: Mapping[str, Any]) -> bool:
    return "sliding_attention" in native["layer_types"]


def qwen3_keys(native: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the draft layers, and the calibration of the confidence head where there is one."""
    keys = {key: native[key] for key in QWEN3_KEYS}
    return keys | {key: native[key] for key in CALIBRATION if native.get(key) is not None}
