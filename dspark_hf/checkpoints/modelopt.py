"""Model-Optimizer's export of DSpark: a `DFlashDraftModel` whose `projector_type` is `dspark`, with the tensors of the
sequential and the confidence head at top level. Embedding and LM head are the target's.

The export may name a rope base that the head was not trained with; see `pairing.rope_contradiction`.
"""

from typing import Any

from . import dflash
from .schema import check_value, lookup
from .writing import require_values, slides

NAME = "modelopt"
DESCRIPTION = "Model-Optimizer (architectures ['DFlashDraftModel'] and projector_type 'dspark')"
PREFIXES = {
    "markov_w1.": "markov_head.markov_w1.",
    "markov_w2.": "markov_head.markov_w2.",
    "gate_proj.": "markov_head.gate_proj.",
    "joint_proj.": "markov_head.joint_proj.",
    "confidence_proj.": "confidence_head.proj.",
}
NAMES = dflash.NAMES | {"enable_confidence_head": "dflash_config.use_confidence_head"}


def recognises(published: dict[str, Any]) -> bool:
    section = published.get("dflash_config")
    if not isinstance(section, dict) or section.get("projector_type") != "dspark":
        return False
    # Of the class names, which engines write over, only one is its own; the key of its confidence head is.
    return "use_confidence_head" in section or (
        dflash.recognises(published) and "enable_confidence_head" not in section
    )


def names(published: dict[str, Any]) -> dict[str, str]:
    """What the layout calls this project's keys, where that differs."""
    return NAMES


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """Published keys -> keys of a `DSparkConfig`."""
    native = dflash.read_draft(published, source, ())
    section = published["dflash_config"]
    shifted = section.get("shift_label", True)
    check_value(published, "dflash_config.shift_label", shifted is True, "true", source)
    rank = lookup(published, "dflash_config.markov_rank")
    check_value(
        published, "dflash_config.markov_rank", type(rank) is int and rank > 0, "a positive whole number", source
    )
    return native | {
        "markov_rank": rank,
        "markov_head_type": section.get("markov_head_type") or "vanilla",
        "enable_confidence_head": section.get("use_confidence_head", False),
        "confidence_head_with_markov": True,
    }


def write_config(native: dict[str, Any]) -> dict[str, Any]:
    """Keys of a `DSparkConfig` -> Model-Optimizer's `config.json`; a plain DFlash head as it exports those.

    Raises:
        CannotExpress: for what only other layouts know.
    """
    plain = not native["sample_from_anchor"]
    require_values("Model-Optimizer", native, final_logit_softcapping=None, embedding_scale=None)
    if plain:
        require_values("Model-Optimizer", native, markov_rank=0, enable_confidence_head=False)
    if not plain and not native["markov_rank"]:
        require_values("Model-Optimizer", native, markov_rank="positive")
    if not plain and native["enable_confidence_head"]:
        require_values("Model-Optimizer", native, confidence_head_with_markov=True)
    if slides(native):
        count = native["num_hidden_layers"]
        require_values("Model-Optimizer", native, layer_types=["sliding_attention"] * count, sliding_is_causal=False)
    published = dflash.write_draft("Model-Optimizer", native)
    section = published["dflash_config"]
    if not plain:
        section |= {
            "projector_type": "dspark",
            "shift_label": True,
            "markov_rank": native["markov_rank"],
            "markov_head_type": native["markov_head_type"],
            "use_confidence_head": native["enable_confidence_head"],
        }
    if slides(native):
        section |= {"use_swa": True, "swa_window_size": native["sliding_window"], "causal": False}
        published["layer_types"] = ["full_attention"] * native["num_hidden_layers"]
    scaling = {key: value for key, value in native["rope_parameters"].items() if key != "rope_theta"}
    published |= {
        "architectures": [dflash.ARCHITECTURE],
        "rope_theta": native["rope_parameters"]["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "torch_dtype": native["dtype"],
    }
    omitted = {"rope_parameters", "dtype", "max_window_layers", "use_sliding_window", "use_cache"}
    omitted |= {"bos_token_id", "eos_token_id", "pad_token_id"} | (set() if slides(native) else {"sliding_window"})
    return {key: value for key, value in published.items() if key not in omitted}
