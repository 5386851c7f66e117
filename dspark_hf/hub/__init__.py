"""Heads as repositories of the Hub: which there are, what is in one, and decoding with one by its name."""

from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from ..modeling_dspark import DSparkHead

LOADING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")

_heads: WeakKeyDictionary[PreTrainedModel, dict[tuple, DSparkHead]] = WeakKeyDictionary()


def generate_with(model: PreTrainedModel, repository: str, **kwargs: Any) -> Any:
    """`model.generate(**kwargs)` with the head in a repository or folder, which is loaded once for a model; what
    `custom_generate/generate.py` of a published head calls.

    Raises:
        ValueError: when `kwargs` bring another assistant.
    """
    if kwargs.pop("assistant_model", None) is not None:
        raise ValueError(f"custom_generate={repository!r} brings its own draft head: leave out `assistant_model`.")
    loading = {key: kwargs.pop(key) for key in LOADING if key in kwargs}
    heads = _heads.setdefault(model, {})
    key = (repository, loading.get("revision"), model.dtype, model.device)
    if key not in heads:
        heads[key] = DSparkHead.from_pretrained(repository, dtype=model.dtype, **loading).to(model.device).eval()
    return model.generate(**kwargs, assistant_model=heads[key])
