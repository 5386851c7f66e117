"""DeepSpec's layout for Qwen3 and Gemma 4 targets: config keys at top level, tensor names equal to this project's.

Its "DFlash" heads are the same class without a sequential and a confidence head.
"""

from typing import Any

from .schema import SIZES, check_value, forbid_code, layer_types_of, require, rope_of
from .writing import CALIBRATION, require_values

NAME = "deepspec"
DESCRIPTION = "DeepSpec (architectures ['Qwen3DSparkModel'] or ['Gemma4DSparkModel'])"
QWEN3, GEMMA4 = "Qwen3DSparkModel", "Gemma4DSparkModel"
# Engines write the one class name or the other over a head; its keys stay its trainer's.
NAMES_OF_OTHERS = {"DSparkDraftModel", "DFlashDraftModel"}
PREFIXES: dict[str, str] = {}
REQUIRED = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    *SIZES,
    "markov_rank",
    "enable_confidence_head",
)
REQUIRED_BY_GEMMA4 = ("global_head_dim", "hidden_activation", "rope_parameters.full_attention")
NAMES_OF_GEMMA4 = {
    "head_dim": "global_head_dim",
    "num_key_value_heads": "num_global_key_value_heads",
    "hidden_act": "hidden_activation",
    "rope_parameters": "rope_parameters.full_attention",
}
# For training only, but DeepSpec's class demands it: its trainer's default for heads that were trained elsewhere.
NUM_ANCHORS = 512
# Keys of ours that go without saying in this layout, or have no place in it.
OMITTED_KEYS: tuple[str, ...] = (
    "backbone",
    "sample_from_anchor",
    "draft_vocab_size",
    "window_counted_from",
    "sliding_is_causal",
    "embedding_scale",
    "target_sliding",
    "target_name_or_path",
    "target_architectures",
    "borrow_lm_head",
    "stage_config",
    "confidence_head_bias",
)
OMITTED_KEYS_OF_QWEN3 = ("attention_k_eq_v", "final_logit_softcapping")
OMITTED_KEYS_OF_GEMMA4 = ("hidden_act", "max_window_layers", "use_sliding_window")


def recognises(published: dict[str, Any]) -> bool:
    classes = set(published.get("architectures") or [])
    says_so = {"target_layer_ids", "mask_token_id", "markov_rank"} <= published.keys()
    return bool(classes & {QWEN3, GEMMA4}) or (says_so and bool(classes & NAMES_OF_OTHERS))


def names(published: dict[str, Any]) -> dict[str, str]:
    """What the layout calls this project's keys, where that differs."""
    return NAMES_OF_GEMMA4 if GEMMA4 in published["architectures"] else {}


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """Published keys -> keys of a `DSparkConfig`. Keys without a meaning here are kept and written back."""
    require(published, REQUIRED, source)
    if published["markov_rank"]:
        require(published, ["markov_head_type"], source)
    forbid_code(published, (), source)
    layers, count = published.get("layer_types") or [], published["num_hidden_layers"]
    check_value(published, "layer_types", set(map(str, layers)) <= {"full_attention"}, "full_attention", source)
    native = {key: value for key, value in published.items() if key not in ("rope_theta", "rope_scaling")}
    native |= {"model_type": "dspark", "layer_types": layers or layer_types_of({"num_hidden_layers": count})}
    if GEMMA4 in published["architectures"]:
        return native | _read_gemma4(published, source)
    return native | {"rope_parameters": rope_of(published, source)}


def _read_gemma4(published: dict[str, Any], source: str) -> dict[str, Any]:
    require(published, REQUIRED_BY_GEMMA4, source)
    check_value(published, "enable_moe_block", not published.get("enable_moe_block"), "false", source)
    per_layer = published.get("hidden_size_per_layer_input")
    check_value(published, "hidden_size_per_layer_input", not per_layer, "0", source)
    width, shared = published["hidden_size"], published.get("attention_k_eq_v") or False
    check_value(published, "hidden_size", type(width) is int and width > 0, "a positive whole number", source)
    kv_heads = "num_global_key_value_heads" if shared else "num_key_value_heads"
    require(published, [kv_heads], source)
    rope = published["rope_parameters"]
    sliding = {key: published.get(key) for key in ("head_dim", "num_key_value_heads", "sliding_window")}
    return {
        "backbone": "gemma4",
        "head_dim": published["global_head_dim"],
        "num_key_value_heads": published[kv_heads],
        "attention_k_eq_v": shared,
        "hidden_act": published["hidden_activation"],
        "rope_parameters": rope["full_attention"],
        "embedding_scale": width**0.5,
        "target_sliding": sliding | {"rope_parameters": rope.get("sliding_attention")},
    }


def write_config(native: dict[str, Any]) -> dict[str, Any]:
    """Keys of a `DSparkConfig` -> DeepSpec's `config.json`.

    Raises:
        CannotExpress: for what only other layouts know.
    """
    native, omitted = {"num_anchors": NUM_ANCHORS} | native, OMITTED_KEYS
    require_values("DeepSpec", native, sample_from_anchor=True, draft_vocab_size=None, confidence_head_bias=True)
    require_values("DeepSpec", native, borrow_lm_head=native["borrow_embeddings"])
    require_values("DeepSpec", native, layer_types=["full_attention"] * native["num_hidden_layers"])
    if native["backbone"] == "gemma4":
        published = native | _write_gemma4(native)
        omitted += OMITTED_KEYS_OF_GEMMA4
    else:
        require_values("DeepSpec", native, final_logit_softcapping=None, embedding_scale=None)
        published = native | {"architectures": [QWEN3], "model_type": "qwen3"}
        omitted += OMITTED_KEYS_OF_QWEN3
    if not native["borrow_embeddings"]:
        omitted += ("borrow_embeddings",)
    if native["borrow_logit_scaling"] or not native["borrow_lm_head"]:
        omitted += ("borrow_logit_scaling",)
    if not native["markov_rank"]:
        omitted += ("markov_head_type",)
    if not native["enable_confidence_head"]:
        omitted += ("confidence_head_with_markov",)
    omitted += tuple(key for key in CALIBRATION if native.get(key) is None)
    return {key: value for key, value in published.items() if key not in omitted}


def _write_gemma4(native: dict[str, Any]) -> dict[str, Any]:
    sliding = native["target_sliding"] or {}
    rope = {"full_attention": native["rope_parameters"]}
    if sliding.get("rope_parameters"):
        rope["sliding_attention"] = sliding["rope_parameters"]
    return {
        "architectures": [GEMMA4],
        "model_type": native.get("target_text_model_type") or "gemma4_text",
        "global_head_dim": native["head_dim"],
        "head_dim": sliding.get("head_dim") or native["head_dim"],
        "num_key_value_heads": sliding.get("num_key_value_heads") or native["num_key_value_heads"],
        "num_global_key_value_heads": native.get("num_global_key_value_heads") or native["num_key_value_heads"],
        "hidden_activation": native["hidden_act"],
        "sliding_window": sliding.get("sliding_window"),
        "rope_parameters": rope,
    }
