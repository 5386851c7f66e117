"""What a config must say before anything is built from it. All checks are on this project's keys."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..configuration_dspark import BACKBONES, SEQUENTIAL_HEADS
from .errors import CheckpointError, config_file

LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
DTYPES = ("float32", "float16", "bfloat16", "float64")
# No head comes near; a config that asks for more would only exhaust the machine.
MOST_LAYERS = 256
# Of Qwen3's config class: the first layer that slides, where nothing is said of it.
QWEN3_WINDOW_LAYERS = 28

Config = dict[str, Any]

# What every layout with its keys at top level must say of the draft layers.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
)


def lookup(published: Config, path: str) -> Any:
    """The value at a dotted path, `None` where there is none."""
    value: Any = published
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def require(published: Config, paths: Iterable[str], source: str) -> None:
    """Raise for the first dotted path without a value."""
    for path in paths:
        if lookup(published, path) is None:
            raise CheckpointError(config_file(source), path, "nothing", "a value", "The config is incomplete.")


def check_value(published: Config, path: str, is_so: bool, expected: str, source: str) -> None:
    """Raise about the value at a dotted path unless it is so."""
    if not is_so:
        raise CheckpointError(config_file(source), path, repr(lookup(published, path)), expected)


def rope_of(published: Config, source: str) -> Config:
    """The rotary embedding: `rope_parameters`, or `rope_theta` and `rope_scaling` as before transformers 5. The base
    may be in either place."""
    rope, theta = published.get("rope_parameters"), published.get("rope_theta")
    scaling = published.get("rope_scaling")
    check_value(published, "rope_scaling", scaling is None or isinstance(scaling, dict), "an object", source)
    scaling = dict(scaling or {})
    if "type" in scaling:
        scaling = {"rope_type": scaling.pop("type")} | scaling
    if rope is None or rope == {}:
        require(published, ["rope_theta"], source)
        return {"rope_type": "default", **scaling, "rope_theta": theta}
    if not isinstance(rope, dict):
        return rope
    agree(published, ["rope_parameters.rope_theta", "rope_theta"], source)
    same = all(rope.get(key) == value for key, value in scaling.items())
    check_value(published, "rope_scaling", same, "what `rope_parameters` says, or nothing", source)
    return rope if theta is None else rope | {"rope_theta": theta}


def layer_types_of(layers: Config) -> Any:
    """The type of every draft layer: as said, or else as Qwen3's config class derives it."""
    types, count = layers.get("layer_types"), layers.get("num_hidden_layers")
    if types is not None or not _whole(1, MOST_LAYERS)(count):
        return types
    slides = layers.get("use_sliding_window") and layers.get("sliding_window") is not None
    first = layers.get("max_window_layers", QWEN3_WINDOW_LAYERS) if slides else count
    if not _whole(0)(first):
        return None
    return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]


def default_layer_ids(published: Config, source: str) -> list[int]:
    """The layers that trainers feed where the config names none: as many as draft layers, evenly spread."""
    require(published, ["num_target_layers", "num_hidden_layers"], source)
    layers, count = published["num_target_layers"], published["num_hidden_layers"]
    for path in ("num_target_layers", "num_hidden_layers"):
        check_value(published, path, _whole(1, 10_000)(published[path]), "a positive whole number", source)
    if count == 1:
        return [layers // 2]
    return [round(1 + i * (layers - 4) / (count - 1)) for i in range(count)]


def require_sections(published: Config, names: Iterable[str], source: str) -> None:
    """Raise where one of the named parts is no JSON object."""
    for name in names:
        if not isinstance(published.get(name), dict):
            raise CheckpointError(config_file(source), name, repr(published.get(name)), "an object")


def forbid_code(published: Config, allowed: Iterable[str], source: str) -> None:
    """Raise for an `auto_map` other than the class names that a trainer writes. No class it names is ever imported."""
    code = published.get("auto_map")
    if code is None:
        return
    allowed = tuple(allowed)
    names = list(code.values()) if isinstance(code, dict) else [code]
    if not all(isinstance(name, str) and name in allowed for name in names):
        wanted = f"no code, or {' or '.join(allowed)}" if allowed else "no code"
        fix = "Code of a repository is never run; remove the key if the weights are those of a known layout."
        raise CheckpointError(config_file(source), "auto_map", repr(code), wanted, fix)


def agree(published: Config, paths: Iterable[str], source: str) -> None:
    """Raise where keys that repeat each other differ."""
    stated = {path: value for path in paths if (value := lookup(published, path)) is not None}
    first, *others = list(stated.items()) or [("", None)]
    for path, value in others:
        if value != first[1]:
            raise CheckpointError(config_file(source), path, repr(value), f"{first[1]!r}, as `{first[0]}` says")


def check(native: Config, names: dict[str, str], source: str) -> None:
    """Raise a [`CheckpointError`] for the first key without a sound value.

    Args:
        native: keys of a `DSparkConfig`, those missing having its defaults. names: what the layout calls them.
    """
    for keys, is_sound, expected in RULES:
        value, *others = [native.get(key) for key in keys]
        key = names.get(keys[0], keys[0])
        if value is None and keys[0] not in MAY_BE_NONE:
            raise CheckpointError(config_file(source), key, "nothing", "a value", "The config is incomplete.")
        if (value is not None or keys[0] in NEEDED_BY_OTHERS) and not is_sound(value, *others):
            context = ", ".join(f"{names.get(k, k)} {v}" for k, v in zip(keys[1:], others, strict=True))
            expected = f"{expected} ({context})" if context else expected
            raise CheckpointError(config_file(source), key, repr(value), expected)


def _whole(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _boolean(value: Any) -> bool:
    return type(value) is bool


def _one_of(choices: Iterable[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in choices


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _layer_ids(ids: Any, layers: int | None) -> bool:
    if not isinstance(ids, list) or not ids or not all(map(_whole(-1), ids)):
        return False
    return all(a < b for a, b in zip(ids, ids[1:], strict=False)) and (layers is None or ids[-1] < layers)


def _layer_types(types: Any, count: int) -> bool:
    return isinstance(types, list) and len(types) == count and all(map(_one_of(LAYER_TYPES), types))


def _window(window: Any, types: list[str]) -> bool:
    return "sliding_attention" not in types or _whole(1)(window)


def _rope(rope: Any) -> bool:
    sound = isinstance(rope, dict) and _positive(rope.get("rope_theta"))
    return sound and _one_of(ROPE_TYPES)(rope.get("rope_type", "default"))


def _positions(values: Any) -> bool:
    return isinstance(values, list) and all(map(_number, values))


# Keys, whether the value of the first is sound beside those of the others, and what is expected of it.
RULES: list[tuple[tuple[str, ...], Callable[..., bool], str]] = [
    (("backbone",), _one_of(BACKBONES), f"one of {', '.join(BACKBONES)}"),
    *(((key,), _whole(1), "a positive whole number") for key in ("vocab_size", "hidden_size", "intermediate_size")),
    (("num_hidden_layers",), _whole(1, MOST_LAYERS), f"a whole number from 1 to {MOST_LAYERS}"),
    (("num_attention_heads",), _whole(1), "a positive whole number"),
    (
        ("num_key_value_heads", "num_attention_heads"),
        lambda kv, heads: _whole(1)(kv) and heads % kv == 0,
        "a divisor of the number of heads",
    ),
    (("head_dim",), lambda value: _whole(2)(value) and value % 2 == 0, "a positive even number"),
    (("hidden_act",), lambda value: isinstance(value, str) and value in ACT2FN, "an activation of transformers"),
    (("rms_norm_eps",), _positive, "a positive number"),
    (("max_position_embeddings",), _whole(1), "a positive whole number"),
    (("attention_bias",), _boolean, "true or false"),
    (("rope_parameters",), _rope, f"an object with a positive rope_theta and a rope_type of {', '.join(ROPE_TYPES)}"),
    (("layer_types", "num_hidden_layers"), _layer_types, f"one of {', '.join(LAYER_TYPES)} for each layer"),
    (("sliding_window", "layer_types"), _window, "a positive whole number"),
    (("window_counted_from",), _one_of(("row", "block")), "row or block"),
    (("sliding_is_causal",), _boolean, "true or false"),
    (("sample_from_anchor",), _boolean, "true or false"),
    (
        ("block_size", "sample_from_anchor"),
        lambda size, anchor: _whole(1 + (not anchor), 4096)(size),
        "a whole number with room for at least 1 draft and at most 4096",
    ),
    (
        ("mask_token_id", "vocab_size"),
        lambda token, size: _whole(0)(token) and token < size,
        "a token of the vocabulary",
    ),
    (("num_target_layers",), _whole(1), "a positive whole number"),
    (
        ("target_layer_ids", "num_target_layers"),
        _layer_ids,
        "strictly increasing layers of the target, -1 for its embedding",
    ),
    (("markov_rank",), _whole(0), "0 (no sequential head) or a positive whole number"),
    (
        ("markov_head_type", "markov_rank"),
        lambda kind, rank: rank == 0 or _one_of(SEQUENTIAL_HEADS)(kind),
        f"one of {', '.join(SEQUENTIAL_HEADS)}",
    ),
    (("enable_confidence_head",), _boolean, "true or false"),
    (("confidence_head_with_markov",), _boolean, "true or false"),
    (("confidence_head_bias",), _boolean, "true or false"),
    (
        ("stage_config", "backbone"),
        lambda stage, backbone: isinstance(stage, dict) == (backbone == "deepseek_v4"),
        "the target's config for a deepseek_v4 backbone, and nothing for others",
    ),
    (
        ("draft_vocab_size", "vocab_size"),
        lambda size, whole: _whole(1)(size) and size <= whole,
        "at most the vocabulary",
    ),
    (("attention_k_eq_v",), _boolean, "true or false"),
    (("final_logit_softcapping",), _positive, "a positive number"),
    (("embedding_scale",), _positive, "a positive number"),
    (("borrow_embeddings",), _boolean, "true or false"),
    (("borrow_lm_head",), _boolean, "true or false"),
    (("dtype",), _one_of(DTYPES), f"one of {', '.join(DTYPES)}"),
    (("confidence_temperatures",), _positions, "a list of numbers"),
    (("confidence_shifts",), _positions, "a list of numbers"),
    (("target_name_or_path",), _text, "a text"),
]
# Without a value unless another key asks for one.
NEEDED_BY_OTHERS = {"sliding_window", "markov_head_type", "stage_config"}
MAY_BE_NONE = NEEDED_BY_OTHERS | {
    "borrow_lm_head",
    "num_target_layers",
    "draft_vocab_size",
    "final_logit_softcapping",
    "embedding_scale",
    "dtype",
    "confidence_temperatures",
    "confidence_shifts",
    "target_name_or_path",
}
