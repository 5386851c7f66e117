"""How many tokens of requests there is memory for, and what a host gets back."""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch
from transformers import ContinuousBatchingConfig, PreTrainedConfig, PreTrainedModel

from ..generation.releases import PAGE_SIZE
from ..modeling_dspark import DSparkHead

# Share of the free memory that caches may take, where `max_memory_percent` does not say; the rest is for passes.
SHARE = 0.8
# The option of `mallopt`.
M_ARENA_MAX = -8


def tokens_that_fit(model: PreTrainedModel, head: DSparkHead, config: ContinuousBatchingConfig) -> int:
    """Tokens of all requests together that the caches of target and head may hold."""
    if config.num_blocks is not None:
        return config.num_blocks * getattr(config, PAGE_SIZE)
    share = SHARE if config.max_memory_percent is None else config.max_memory_percent
    target = model.config.get_text_config(decoder=True)
    size = bytes_of_token(target, model.dtype) + bytes_of_token(head.config, head.dtype)
    return int(share * free_bytes(model.device) / size)


def bytes_of_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of a token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that can be had: of a host also what caches of files take, which the system gives up for it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def keep_together() -> None:
    """Let all threads take their memory from one heap where the C library is glibc; has to be called before there are
    others. By default each has its own, whose holes the others cannot use."""
    _of_glibc("mallopt")(M_ARENA_MAX, 1)


def give_back() -> None:
    """Let the system have the pages back that the C library keeps for tensors to come, where it is glibc.

    Rounds make tensors of ever new sizes among those that stay, and use the holes of old ones badly: a server on a CPU
    grew for hours, while what was in use did not. Takes some milliseconds.
    """
    _of_glibc("malloc_trim")(0)


def _of_glibc(name: str) -> Callable[..., Any]:
    """A function of the C library, one that does nothing where there is none of that name."""
    found = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    return (lambda *args: None) if found is None else found
