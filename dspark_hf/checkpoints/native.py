"""This project's own layout: all keys of a `DSparkConfig`. Heads that DeepSpec's cannot express are saved so."""

from typing import Any

NAME = "native"
DESCRIPTION = "dspark_hf (model_type 'dspark')"
MODEL_TYPE = "dspark"
PREFIXES: dict[str, str] = {}


def recognises(published: dict[str, Any]) -> bool:
    return published.get("model_type") == MODEL_TYPE


def names(published: dict[str, Any]) -> dict[str, str]:
    """What the layout calls this project's keys, where that differs."""
    return {}


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """Published keys -> keys of a `DSparkConfig`."""
    return published


def write_config(native: dict[str, Any]) -> dict[str, Any]:
    """Keys of a `DSparkConfig` -> `config.json`."""
    return native | {"architectures": ["DSparkHead"], "model_type": MODEL_TYPE}
