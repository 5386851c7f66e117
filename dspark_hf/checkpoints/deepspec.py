"""DeepSpec's layout for Qwen3 targets: config keys at top level, tensor names equal to this project's."""

from typing import Any

DESCRIPTION = "DeepSpec (architectures ['Qwen3DSparkModel'])"
ARCHITECTURE = "Qwen3DSparkModel"
REQUIRED_KEYS = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "markov_rank",
    "enable_confidence_head",
)


def recognises(published: dict[str, Any]) -> bool:
    return ARCHITECTURE in (published.get("architectures") or []) and "target_layer_ids" in published


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """Published keys -> keys of a `DSparkConfig`. Keys without a meaning here are kept and written back."""
    missing = [key for key in REQUIRED_KEYS if published.get(key) is None]
    if published.get("markov_rank") and not published.get("markov_head_type"):
        missing.append("markov_head_type")
    if missing:
        raise ValueError(f"config.json of {source!r} has no value for {', '.join(missing)}: it is incomplete.")
    return published | {"model_type": "dspark"}


def write_config(config: dict[str, Any]) -> dict[str, Any]:
    """Keys of a `DSparkConfig` -> DeepSpec's `config.json`."""
    published = config | {"architectures": [ARCHITECTURE], "model_type": "qwen3"}
    if not published["borrow_embeddings"]:
        del published["borrow_embeddings"]
    if not published["markov_rank"]:
        published.pop("markov_head_type", None)
    if not published["enable_confidence_head"]:
        published.pop("confidence_head_with_markov", None)
    return published
