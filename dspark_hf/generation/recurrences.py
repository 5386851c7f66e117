"""The recurrences of hybrid models, in passes over a block: what they start from, and what they were behind any token.

Models call them as functions of their modules: once over a prompt, in a form for long texts, and then token by token.
Around the long form of each lies one of ours, which does nothing but in our passes over a block. There it leaves with
the layer of the cache a way to run the recurrence again over what it was fed, where tokens that do not count have a
step of size zero: they neither add to the state nor let it fade.

With `hook.py` and `serving/hook.py` the only file that touches private names of transformers.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from .packing import current_context
from .states import Behind


def install(model: PreTrainedModel) -> None:
    """Wrap the recurrences of the model's modules once; repeated calls change nothing."""
    for module in {sys.modules[type(own).__module__] for own in model.modules()}:
        for name, form in FORMS.items():
            stock = getattr(module, name, None)
            if stock is not None and not hasattr(stock, "_dspark"):
                setattr(module, name, _wrap(stock, form, module))


def _wrap(stock: Callable, form: Callable, module: ModuleType) -> Callable:
    def recurrence(*args, **kwargs):
        context = current_context()
        layer = None if context is None else context.recurrence
        if layer is None:
            return stock(*args, **kwargs)
        context.recurrence = None
        if context.is_prompt and form in START_FROM_STATES:
            return stock(*args, **kwargs)
        outputs, layer.behind = form(stock, module, layer.recurrent_states[0], *args, **kwargs)
        return outputs

    recurrence._dspark = True
    return recurrence


# -- Forms: what the stock one returns, and what gives the state behind the tokens of a mask [R, n] -------------------


def _delta(stock, module, before, query, key, value, chunk_size: int = 64, **kwargs) -> tuple[Any, Behind]:
    """The gated delta rule and Kimi's: [R, n, heads, dim], with a decay g, in log space, and a rate beta a token."""
    g, beta, chunk = kwargs.pop("g"), kwargs.pop("beta"), _chunk(key, chunk_size)

    def behind(mask: torch.Tensor) -> torch.Tensor:
        decay, rate = (x * mask.view(*mask.shape, *[1] * (x.ndim - 2)) for x in (g, beta))
        return stock(query, key, value, g=decay, beta=rate, **chunk, **kwargs)[1]

    return stock(query, key, value, g=g, beta=beta, **chunk, **kwargs), behind


def _mamba2(stock, module, before, hidden_states, dt, A, B, C, chunk_size: int, **kwargs) -> tuple[Any, Behind]:
    """Mamba 2: hidden_states [R, n, heads, dim], with a step dt [R, n, heads]. Models may bound it in prompts
    (Nemotron-H does), but not token by token."""
    step, chunk = _step(dt, kwargs["dt_bias"]), {"chunk_size": chunk_size} | _chunk(hidden_states, chunk_size)
    kwargs |= {"dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, float("inf"))}

    def behind(mask: torch.Tensor) -> torch.Tensor:
        return stock(hidden_states, step * mask[..., None], A, B, C, **chunk, **kwargs | {"D": None})[1]

    return stock(hidden_states, step, A, B, C, **chunk, **kwargs), behind


def _mamba(stock, module, before, hidden_states, dt, A, B, C, **kwargs) -> tuple[Any, Behind]:
    """Mamba: hidden_states and dt [R, channels, n], B and C [R, state, n]. The stock form begins with no state, so this
    goes token by token, as plain decoding does."""
    step, D, gate = _step(dt, kwargs["delta_bias"][:, None]), kwargs["D"], kwargs["z"]

    def run(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = before.clone()
        tokens = (x.unbind(dim=-1) for x in (hidden_states, step, B, C, gate))
        outputs = [
            module.mamba_selective_state_update(state, x, dt, A, b, c, D, z=z)
            for x, dt, b, c, z in zip(*tokens, strict=True)
        ]
        return torch.stack(outputs, dim=-1), state

    return run(step), lambda mask: run(step * mask[:, None])[1]


def _chunk(tokens: torch.Tensor, size: int) -> dict[str, int]:
    """Chunks of [R, n, ...] tokens that are no longer than a block: torch's forms pad to whole ones."""
    return {} if tokens.is_cuda else {"chunk_size": min(tokens.shape[1], size)}


def _step(dt: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The sizes of steps, as the recurrences make them."""
    return softplus(dt + bias.to(dt.dtype))


FORMS = {
    "torch_chunk_gated_delta_rule": _delta,
    "chunk_kimi_delta_attention": _delta,
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba,
}
# Those whose stock form goes on from a state, as a further piece of a prompt needs it.
START_FROM_STATES = {_delta, _mamba2}
