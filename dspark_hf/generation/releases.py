"""What the installed release of transformers calls things, and whether it is one that we know how to follow.

Nothing else in the package asks for a version or chooses between an old name and a new one.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationMixin, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

TESTED = "5.17 to 5.24"
# 5.24 renamed `past_key_values`, everywhere, and warns where the old name is used.
CACHE = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
# After 5.17 the tokens of a block of continuous batching are called otherwise.
PAGE_SIZE = "page_size" if "page_size" in {field.name for field in fields(ContinuousBatchingConfig)} else "block_size"
# Since 5.23 `output_hidden_states` takes indices of the full tuple; before, a list meant layer numbers, and the tuple
# lacked the embedding output. Asking for everything means the same in all releases.
SELECTS_BY_INDEX = Version(transformers.__version__) >= Version("5.23.0")

# What the hook relies on: methods of `GenerationMixin`, and the arguments that they are called with.
RELIED_ON = {
    "_assisted_decoding": (
        "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
        "assistant_model",
    ),
    "_prepare_generation_config": ("generation_config", "kwargs"),
    "_validate_generation_mode": ("generation_mode", "generation_config", "generation_mode_kwargs"),
    "_get_candidate_generator": ("generation_config", "assistant_model", "logits_processor", "model_kwargs"),
    "_sample": ("input_ids",),
    "prepare_inputs_for_generation": ("input_ids", "next_sequence_length", CACHE, "is_first_iteration"),
}  # fmt: skip


def cache_argument(model: PreTrainedModel) -> str:
    """What `model.forward` calls its cache; code that comes with a model may lag behind the release."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE, "past_key_values") if name in taken), CACHE)


def differences(mixin: type = GenerationMixin) -> list[str]:
    """Where this release's `GenerationMixin` is not what the hook relies on, a phrase each; none in those we know."""
    found = []
    for method, names in RELIED_ON.items():
        if not hasattr(mixin, method):
            found.append(f"there is no `{method}`")
            continue
        missing = _missing(getattr(mixin, method), names)
        if missing:
            found.append(f"`{method}` takes no {', '.join(f'`{name}`' for name in missing)}")
    return found


def _missing(method: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """The names that are no parameters of the method; `**kwargs` would swallow them without a word."""
    return [name for name in names if name not in inspect.signature(method).parameters]
