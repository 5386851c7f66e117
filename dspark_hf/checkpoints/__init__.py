"""Published layouts ("dialects") of draft heads: recognise, read, write. The rest of the project knows one config.

A dialect is a module with `recognises` (of a published config), `names` (what it calls our keys), `read_config`,
`write_config` and `PREFIXES` (of tensor names, where they differ from ours). One whose head lies inside its target's
checkpoint also has `INSIDE` (how its tensor names begin), `gather` (what our tensors are made of) with its inverse
`scatter`, and `told_by` (keys that the tensors tell).
"""

import dataclasses
from types import ModuleType
from typing import Any

from ..configuration_dspark import DSparkConfig
from . import deepseek_v4, deepspec, dflash, modelopt, native, specforge, speculators
from .errors import CheckpointError, config_file
from .schema import check
from .writing import CannotExpress

__all__ = ["DIALECTS", "CannotExpress", "CheckpointError", "dialect_of", "read_config", "write_config"]

# In the order in which they are asked: class names are not unique, see each module.
DIALECTS = (native, speculators, modelopt, specforge, dflash, deepspec, deepseek_v4)
# Targets whose checkpoints hold a head that cannot be read, or may lack one: what is expected, and what to do.
WITHOUT_A_HEAD = {
    "deepseek_v4": (
        "dspark_* keys beside it",
        "This checkpoint has no DSpark head, or one of an earlier kind; deepseek-ai/DeepSeek-V4-Flash-DSpark has one.",
    ),
    "mistral_large4": (
        "a head whose layout is known",
        "What its tensors mtp_dspark.* mean is published nowhere that this project knows of. Train a head "
        "(`dspark-hf train`), or use one in a layout that is known.",
    ),
}


def dialect_of(published: dict[str, Any], source: str) -> ModuleType:
    """The layout of a published `config.json`.

    Raises:
        CheckpointError: when no dialect recognises it, naming what was found.
    """
    classes = published.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise CheckpointError(config_file(source), "architectures", repr(classes), "a list of class names")
    for dialect in DIALECTS:
        if dialect.recognises(published):
            return dialect
    known = WITHOUT_A_HEAD.get(published.get("model_type"))
    if known is not None:
        raise CheckpointError(config_file(source), "model_type", repr(published["model_type"]), *known)
    raise CheckpointError(
        config_file(source),
        "architectures",
        f"{classes} with model_type {published.get('model_type')!r}",
        f"a draft head: {'; '.join(dialect.DESCRIPTION for dialect in DIALECTS)}",
        "If this is a whole language model, load it with AutoModelForCausalLM and pass a head trained for it as "
        "`assistant_model`.",
    )


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """The keys of a [`DSparkConfig`] from a published `config.json`.

    Raises:
        OSError: when there is no config at all.
        CheckpointError: for an unknown layout, and for values that are missing, unsound or contradict each other.
    """
    if not published:
        raise OSError(f"There is no config.json in {source!r}. Check the path or the repository id.")
    if published.get("sample_from_anchor", True) is None:
        # Null is as good as nothing: the trainer's own default.
        published = {key: value for key, value in published.items() if key != "sample_from_anchor"}
    dialect = dialect_of(published, source)
    translated = dialect.read_config(published, source)
    check(_defaults() | translated, dialect.names(published), source)
    return translated


def write_config(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` for the keys of a `DSparkConfig`: DeepSpec's, or our own where that cannot express the head."""
    try:
        return deepspec.write_config(config)
    except CannotExpress:
        return native.write_config(config)


def _defaults() -> dict[str, Any]:
    fields = dataclasses.fields(DSparkConfig)
    given = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return given | {"rope_parameters": None, "layer_types": None}
