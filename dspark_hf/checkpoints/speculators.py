"""speculators: nested layer config, layer ids counted from the embedding, and often a reduced draft vocabulary.

`d2t` holds offsets (target id = draft id + d2t[draft id]); `t2d` says the same as a mask over the target's vocabulary
and is made anew when written.
"""

from typing import Any

import torch

from .schema import agree, check_value, forbid_code, layer_types_of, lookup, require, require_sections, rope_of
from .writing import CALIBRATION, qwen3_keys, require_values, slides

NAME = "speculators"
DESCRIPTION = "speculators (speculators_model_type 'dspark' or 'dflash')"
PREFIXES: dict[str, str] = {}
# The verifier's embedding and LM head are usually in the file, but need not be.
MAY_LACK_TABLES = True
# Keys equal to the defaults of Qwen3's config class may be missing.
QWEN3_ROPE_THETA = 10000.0
VERSION = "0.7.0"  # of the layout that is written
CODE = {"dspark": "config.DSparkSpeculatorConfig", "dflash": "config.DFlashSpeculatorConfig"}
CLASSES = {"dspark": "DSparkDraftModel", "dflash": "DFlashDraftModel"}
LAYER_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
NAMES = {
    "target_layer_ids": "aux_hidden_state_layer_ids",
    "target_name_or_path": "speculators_config.verifier.name_or_path",
    "sliding_is_causal": "sliding_window_non_causal",
} | {
    key: f"transformer_layer_config.{key}"
    for key in (
        *LAYER_KEYS,
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "attention_bias",
        "rope_parameters",
        "layer_types",
        "sliding_window",
    )
}


def recognises(published: dict[str, Any]) -> bool:
    return "speculators_model_type" in published


def names(published: dict[str, Any]) -> dict[str, str]:
    """What the layout calls this project's keys, where that differs."""
    return NAMES


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """Published keys -> keys of a `DSparkConfig`."""
    kind = published["speculators_model_type"]
    check_value(published, "speculators_model_type", kind in ("dspark", "dflash"), "dspark or dflash", source)
    require_sections(published, ["transformer_layer_config"], source)
    layers = published["transformer_layer_config"]
    check_value(published, "transformer_layer_config.model_type", layers.get("model_type") == "qwen3", "qwen3", source)
    require(published, [f"transformer_layer_config.{key}" for key in LAYER_KEYS], source)
    require(published, ["block_size", "mask_token_id", "aux_hidden_state_layer_ids"], source)
    forbid_code(published, CODE.values(), source)
    agree(published, ["speculators_model_type", "speculators_config.algorithm"], source)
    width = published.get("target_hidden_size")
    check_value(published, "target_hidden_size", width in (None, layers["hidden_size"]), "the hidden size", source)
    ids = published["aux_hidden_state_layer_ids"]
    sound = isinstance(ids, list) and all(type(i) is int for i in ids)
    check_value(published, "aux_hidden_state_layer_ids", sound, "a list of whole numbers", source)
    unread = ("model_type", "transformers_version", "rope_theta", "rope_scaling")
    native = {key: value for key, value in layers.items() if key not in unread}
    native |= {key: published[key] for key in CALIBRATION if key in published}
    native |= (
        _read_heads(published, source) if kind == "dspark" else {"markov_rank": 0, "enable_confidence_head": False}
    )
    return native | {
        "model_type": "dspark",
        "block_size": published["block_size"],
        "mask_token_id": published["mask_token_id"],
        "target_layer_ids": [i - 1 for i in ids],
        "sample_from_anchor": published.get("sample_from_anchor", kind == "dspark"),
        "draft_vocab_size": _reduced(published, layers["vocab_size"]),
        "rope_parameters": _rope(layers, source),
        "layer_types": layer_types_of(layers),
        "window_counted_from": "block",
        "borrow_logit_scaling": False,
        "sliding_is_causal": not _flag(published, "sliding_window_non_causal", source),
        "dtype": published.get("dtype"),
        "target_name_or_path": lookup(published, "speculators_config.verifier.name_or_path"),
        "target_architectures": lookup(published, "speculators_config.verifier.architectures"),
    }


def _read_heads(published: dict[str, Any], source: str) -> dict[str, Any]:
    require(published, ["markov_rank", "enable_confidence_head"], source)
    if published["markov_rank"]:
        require(published, ["markov_head_type"], source)
    with_markov = published.get("confidence_head_with_markov", bool(published["markov_rank"]))
    return {
        "markov_rank": published["markov_rank"],
        "markov_head_type": published.get("markov_head_type"),
        "enable_confidence_head": published["enable_confidence_head"],
        "confidence_head_with_markov": with_markov,
    }


def _flag(published: dict[str, Any], key: str, source: str) -> bool:
    value = published.get(key)
    check_value(published, key, value in (None, True, False), "true or false", source)
    return bool(value)


def _reduced(published: dict[str, Any], vocab_size: Any) -> Any:
    size = published.get("draft_vocab_size")
    return None if size == vocab_size else size


def _rope(layers: dict[str, Any], source: str) -> Any:
    """One rope serves all layers; of variants by layer type, the sliding one."""
    if not layers.get("rope_parameters") and layers.get("rope_theta") is None:
        layers = layers | {"rope_theta": QWEN3_ROPE_THETA}
    rope = rope_of(layers, source)
    if isinstance(rope, dict) and isinstance(rope.get("sliding_attention"), dict):
        return rope["sliding_attention"]
    return rope


def write_config(native: dict[str, Any]) -> dict[str, Any]:
    """Keys of a `DSparkConfig` -> speculators' `config.json`.

    Raises:
        CannotExpress: for what only other layouts know.
    """
    layout = "speculators"
    require_values(layout, native, backbone="qwen3", final_logit_softcapping=None, embedding_scale=None)
    if slides(native):
        require_values(layout, native, window_counted_from="block")
    plain = not native["sample_from_anchor"] and not native["markov_rank"] and not native["enable_confidence_head"]
    kind = "dflash" if plain else "dspark"
    gamma = native["block_size"] - (not native["sample_from_anchor"])
    published = {
        "architectures": [CLASSES[kind]],
        "auto_map": {"": CODE[kind]},
        "aux_hidden_state_layer_ids": [i + 1 for i in native["target_layer_ids"]],
        "block_size": native["block_size"],
        "draft_vocab_size": native["draft_vocab_size"] or native["vocab_size"],
        "dtype": native["dtype"],
        "mask_token_id": native["mask_token_id"],
        "sample_from_anchor": native["sample_from_anchor"],
        "sliding_window_non_causal": slides(native) and not native["sliding_is_causal"],
        "speculators_config": _speculators_config(kind, gamma, native),
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": _layer_config(native),
    }
    if kind == "dspark":
        published |= {
            "markov_rank": native["markov_rank"],
            "markov_head_type": native["markov_head_type"] or "vanilla",
            "enable_confidence_head": native["enable_confidence_head"],
            "confidence_head_with_markov": native["confidence_head_with_markov"],
        }
    return published | {key: native[key] for key in CALIBRATION if native.get(key) is not None}


def _speculators_config(kind: str, gamma: int, native: dict[str, Any]) -> dict[str, Any]:
    proposal = {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": gamma, "verifier_accept_k": 1}
    verifier = {
        "architectures": native.get("target_architectures") or [],
        "name_or_path": native.get("target_name_or_path"),
    }
    return {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [proposal],
        "verifier": verifier,
    }


def _layer_config(native: dict[str, Any]) -> dict[str, Any]:
    keys = {key: value for key, value in qwen3_keys(native).items() if key not in CALIBRATION}
    return keys | {
        "model_type": "qwen3",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "max_window_layers": native.get("max_window_layers", native["num_hidden_layers"]),
        "rope_parameters": native["rope_parameters"],
        "sliding_window": native["sliding_window"],
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": slides(native),
    }


def extra_tensors(native: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`t2d` [V] bool, true where a target id belongs to the draft vocabulary."""
    if native["draft_vocab_size"] is None:
        return {}
    d2t = tensors["d2t"]
    mask = torch.zeros(native["vocab_size"], dtype=torch.bool)
    mask[torch.arange(len(d2t)) + d2t] = True
    return {"t2d": mask}
