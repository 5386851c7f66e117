"""Plain DFlash as z-lab publishes it, and SpecForge and Model-Optimizer write it too: no sequential head, no confidence
head, and the anchor's row predicts nothing. Embedding and LM head are the target's.

Sliding layers: in the layers that `layer_types` names, a row sees the last tokens before it and no row behind it, as in
z-lab's code since its heads have such layers; with Model-Optimizer's `use_swa` all layers slide and see the whole
block.
"""

from typing import Any

from .schema import (
    SIZES,
    agree,
    check_value,
    default_layer_ids,
    forbid_code,
    layer_types_of,
    lookup,
    require,
    require_sections,
    rope_of,
)
from .writing import qwen3_keys, require_values, slides

NAME = "dflash"
DESCRIPTION = "z-lab DFlash (architectures ['DFlashDraftModel'] and a dflash_config)"
ARCHITECTURE = "DFlashDraftModel"
CODE = "dflash.DFlashDraftModel"
PREFIXES: dict[str, str] = {}
REQUIRED = (
    "num_target_layers",
    *SIZES,
    "dflash_config.mask_token_id",
)
NAMES = {
    "mask_token_id": "dflash_config.mask_token_id",
    "target_layer_ids": "dflash_config.target_layer_ids",
    "markov_rank": "dflash_config.markov_rank",
    "markov_head_type": "dflash_config.markov_head_type",
    "enable_confidence_head": "dflash_config.enable_confidence_head",
    "confidence_head_with_markov": "dflash_config.confidence_head_with_markov",
}


def recognises(published: dict[str, Any]) -> bool:
    return "dflash_config" in published and ARCHITECTURE in (published.get("architectures") or [])


def names(published: dict[str, Any]) -> dict[str, str]:
    """What the layout calls this project's keys, where that differs."""
    return NAMES


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """Published keys -> keys of a `DSparkConfig`."""
    native = read_draft(published, source, (CODE,))
    projector = lookup(published, "dflash_config.projector_type")
    check_value(published, "dflash_config.projector_type", projector in (None, "dflash"), "dflash", source)
    multiplier = lookup(published, "dflash_config.output_multiplier")
    check_value(published, "dflash_config.output_multiplier", multiplier in (None, 1), "1", source)
    own = {"markov_rank": 0, "markov_head_type": None, "enable_confidence_head": False}
    own["sample_from_anchor"] = published.get("sample_from_anchor", False)
    scale = lookup(published, "dflash_config.input_embedding_scale")
    cap = lookup(published, "dflash_config.final_logit_softcapping") or published.get("final_logit_softcapping")
    return native | own | {"embedding_scale": scale, "final_logit_softcapping": cap}


def read_draft(published: dict[str, Any], source: str, code: tuple[str, ...]) -> dict[str, Any]:
    """What all layouts with a `dflash_config` share."""
    require_sections(published, ["dflash_config"], source)
    require(published, REQUIRED, source)
    forbid_code(published, code, source)
    agree(published, ["block_size", "dflash_config.block_size"], source)
    section = published["dflash_config"]
    ids = section.get("target_layer_ids")
    native = {key: value for key, value in published.items() if key not in ("dflash_config", "auto_map", "torch_dtype")}
    for key in ("rope_theta", "rope_scaling"):
        native.pop(key, None)
    return native | {
        "model_type": "dspark",
        "borrow_embeddings": True,
        "borrow_logit_scaling": False,
        "block_size": published.get("block_size", section.get("block_size")),
        "mask_token_id": section["mask_token_id"],
        "target_layer_ids": default_layer_ids(published, source) if ids is None else ids,
        "rope_parameters": rope_of(published, source),
        "dtype": published.get("dtype") or published.get("torch_dtype"),
        **_windows(published, source),
    }


def _windows(published: dict[str, Any], source: str) -> dict[str, Any]:
    section, count = published["dflash_config"], published["num_hidden_layers"]
    types = layer_types_of(published)
    causal = section.get("causal")
    check_value(published, "dflash_config.causal", causal in (None, True, False), "true or false", source)
    if section.get("use_swa"):
        require(published, ["dflash_config.swa_window_size"], source)
        agree(published, ["dflash_config.swa_window_size", "sliding_window"], source)
        types = ["sliding_attention"] * count if type(count) is int and 0 < count < 1000 else None
        window, causal = section["swa_window_size"], bool(causal)
    else:
        sliding = isinstance(types, list) and "sliding_attention" in types
        if sliding:
            require(published, ["sliding_window"], source)
        check_value(
            published, "dflash_config.causal", sliding or not causal, "false: full layers see their block", source
        )
        window, causal = published.get("sliding_window"), causal is not False
    return {
        "layer_types": types,
        "sliding_window": window,
        "use_sliding_window": bool(window) and "sliding_attention" in (types or ()),
        "window_counted_from": "row",
        "sliding_is_causal": causal,
    }


def write_config(native: dict[str, Any]) -> dict[str, Any]:
    """Keys of a `DSparkConfig` -> z-lab's `config.json`.

    Raises:
        CannotExpress: for what only other layouts know.
    """
    require_values("DFlash", native, sample_from_anchor=False, markov_rank=0, enable_confidence_head=False)
    published = write_draft("DFlash", native) | {"architectures": [ARCHITECTURE], "auto_map": {"AutoModel": CODE}}
    for key in ("final_logit_softcapping", "input_embedding_scale"):
        value = native[{"input_embedding_scale": "embedding_scale"}.get(key, key)]
        if value is not None:
            published["dflash_config"][key] = value
    return published


def write_draft(layout: str, native: dict[str, Any]) -> dict[str, Any]:
    """What all layouts with a `dflash_config` share; `layer_types` and windows as in SpecForge."""
    require_values(layout, native, backbone="qwen3", draft_vocab_size=None)
    if slides(native):
        require_values(layout, native, window_counted_from="row")
    return qwen3_keys(native) | {
        "model_type": "qwen3",
        "block_size": native["block_size"],
        "num_target_layers": native["num_target_layers"],
        "dflash_config": {"mask_token_id": native["mask_token_id"], "target_layer_ids": native["target_layer_ids"]},
        "rope_parameters": native["rope_parameters"],
        "max_window_layers": native["num_hidden_layers"],
        "sliding_window": native["sliding_window"],
        "use_sliding_window": slides(native),
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": native.get("bos_token_id"),
        "eos_token_id": native.get("eos_token_id"),
        "pad_token_id": native.get("pad_token_id"),
        "dtype": native["dtype"],
    }
