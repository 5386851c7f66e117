"""SpecForge: DSpark as `DSparkDraftModel` with a `dflash_config`, and the same rewritten for SGLang as
`Qwen3DSparkModel`. Embedding and LM head are the target's.

Read with the alignment that it was trained with, in which the anchor's row is the first prediction. SpecForge's own
decoding loop reads the rows one step early.
"""

from typing import Any

from . import dflash
from .schema import agree, check_value, lookup
from .writing import require_values, slides

NAME = "specforge"
DESCRIPTION = "SpecForge (architectures ['DSparkDraftModel'] and a dflash_config)"
ARCHITECTURE, FOR_SERVING = "DSparkDraftModel", "Qwen3DSparkModel"
CODE = "dspark.DSparkDraftModel"
PREFIXES: dict[str, str] = {}
# Early checkpoints nest the heads; they are not written so.
OLD_PREFIXES = {"logit_head.": ""}
HEAD_KEYS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")


def recognises(published: dict[str, Any]) -> bool:
    if "dflash_config" not in published:
        return False
    classes = published.get("architectures") or []
    return bool({ARCHITECTURE, FOR_SERVING} & set(classes)) or lookup(published, "dflash_config.projector_type") in (
        "dspark",
        "domino",
    )


names = dflash.names


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """Published keys -> keys of a `DSparkConfig`."""
    native = dflash.read_draft(published, source, (CODE,))
    section = published["dflash_config"]
    projector = section.get("projector_type")
    check_value(published, "dflash_config.projector_type", projector in (None, "dspark"), "dspark", source)
    for key in HEAD_KEYS:
        agree(published, [f"dflash_config.{key}", key], source)
    said = {key: section.get(key, published.get(key)) for key in HEAD_KEYS}
    rank = said["markov_rank"] or 0
    alpha = section.get("confidence_head_alpha") or 0
    check_value(published, "dflash_config.confidence_head_alpha", type(alpha) in (int, float), "a number", source)
    if "attention_mode" in section:
        mode = section["attention_mode"]
        check_value(published, "dflash_config.attention_mode", mode in ("gqa", "mha"), "gqa or mha", source)
    enabled, with_markov = said["enable_confidence_head"], said["confidence_head_with_markov"]
    return native | {
        "markov_rank": rank,
        "markov_head_type": said["markov_head_type"] or "vanilla",
        "enable_confidence_head": alpha > 0 if enabled is None else enabled,
        "confidence_head_with_markov": False if with_markov is None else with_markov,
    }


def write_config(native: dict[str, Any]) -> dict[str, Any]:
    """Keys of a `DSparkConfig` -> SpecForge's `config.json`; a plain DFlash head as SpecForge writes those.

    Raises:
        CannotExpress: for what only other layouts know.
    """
    if not native["sample_from_anchor"]:
        return dflash.write_config(native)
    require_values("SpecForge", native, final_logit_softcapping=None, embedding_scale=None)
    if slides(native):
        require_values("SpecForge", native, sliding_is_causal=True)
    published = dflash.write_draft("SpecForge", native)
    heads, kv_heads = native["num_attention_heads"], native["num_key_value_heads"]
    published["dflash_config"] |= {
        "projector_type": "dspark",
        "attention_mode": "gqa" if kv_heads < heads else "mha",
        "markov_rank": native["markov_rank"],
        "markov_head_type": native["markov_head_type"] or "vanilla",
        "enable_confidence_head": native["enable_confidence_head"],
        "confidence_head_alpha": 1.0 if native["enable_confidence_head"] else 0.0,
        "confidence_head_with_markov": native["confidence_head_with_markov"],
    }
    rope = {"rope_theta": native["rope_parameters"]["rope_theta"]}
    return published | {"architectures": [ARCHITECTURE], "auto_map": {"AutoModel": CODE}} | rope
