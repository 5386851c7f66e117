"""Which hidden states to ask a transformers model for, and where to find them.

Layer ids are DeepSpec's: id i is the output of layer i, -1 the embedding output. In the `hidden_states` tuple of
transformers that is index i + 1; but the last of them are not the last layer's output, they have passed the final norm.
Heads are fed what lies in the tuple. Those of DeepSeek V4, whose layers have several streams a token, are fed the mean
of the streams, the last layer's own too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from transformers import PreTrainedModel

from .releases import SELECTS_BY_INDEX

_noted: ContextVar[list[torch.Tensor] | None] = ContextVar("dspark_last_layer", default=None)


def indices_of(layer_ids: list[int]) -> list[int]:
    """Indices into the `hidden_states` tuple of the outputs of the given layers."""
    return [i + 1 for i in layer_ids]


def request_for(indices: list[int]) -> list[int] | bool:
    """What to pass as `output_hidden_states` so that these indices are there; no more than these where possible."""
    return list(indices) if SELECTS_BY_INDEX else True


def last_layer_of(model: PreTrainedModel, layer_ids: list[int]) -> nn.Module | None:
    """The last layer of a model with streams, where a head reads it: its output is not among the hidden states."""
    config = model.config.get_text_config(decoder=True)
    reads_it = getattr(config, "hc_mult", None) is not None and config.num_hidden_layers - 1 in layer_ids
    return model.get_decoder().layers[-1] if reads_it else None


@contextmanager
def noting(layer: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Within this context what the layer gives in passes of this thread is appended to the list."""
    noted: list[torch.Tensor] = []
    if layer is None:
        yield noted
        return
    token, hook = _noted.set(noted), layer.register_forward_hook(_note)
    try:
        yield noted
    finally:
        hook.remove()
        _noted.reset(token)


def _note(layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
    noted = _noted.get()
    if noted is not None:
        noted.append(output)


def chosen_of(outputs, indices: Sequence[int], noted: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
    """States [R, n, d] at the indices. noted: what the last layer gave, see [`noting`]; it stands for the last ones."""
    states = list(outputs.hidden_states)
    if noted:
        states[-1] = noted[-1]
    # [R, n, streams, d] of a model with streams.
    return [states[i].mean(dim=2) if states[i].ndim == 4 else states[i] for i in indices]
