"""The two ends of a draft: the embedding and the LM head it goes through, the target's or the head's own copies."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Logits [..., V] from hidden states [..., d] of any type and on any device.
Logits = Callable[[torch.Tensor], torch.Tensor]
# Hidden states that `_scales` looks at reach from minus to plus this: far enough for every cap to show.
PROBE = 100.0

_scaling: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class SharedEmbeddings:
    """The embedding and the LM head a draft goes through, and the tokens that head and target share.

    embed: module, [...] int64 -> [..., d]. logits: [..., d] -> [..., V]. vocab_size: of the target. shared: the first
    so many tokens of the draft vocabulary are tokens of the target.
    """

    embed: nn.Module
    logits: Logits
    vocab_size: int
    shared: int


@dataclass(frozen=True)
class LMHead:
    """The output of an LM head as it is. dtype: of the hidden states that it is made for, which quantised weights do
    not tell."""

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.module(hidden.to(device_of(self.module), self.dtype))


class TargetLogits:
    """The logits that a target itself makes of its last hidden states, with whatever it does around its LM head:
    Granite divides them, Cohere multiplies them, Gemma 2 caps them.

    Every family does so in its `forward`, in its own words. So `forward` it is, of a stand-in for the target that
    shares all but its decoder, which returns the states that it is given.
    """

    def __init__(self, target: PreTrainedModel):
        embed = target.get_input_embeddings()
        name, body = next((name, child) for name, child in target.named_children() if _holds(child, embed))
        self.stand_in = object.__new__(type(target))
        self.stand_in.__dict__ = target.__dict__ | {"_modules": target._modules | {name: _Given(body, embed)}}
        self.lm_head = LMHead(target.get_output_embeddings(), target.dtype)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        states = hidden.reshape(1, -1, hidden.shape[-1]).to(device_of(self.lm_head.module), self.lm_head.dtype)
        # Not by calling the stand-in: hooks of the whole model, and a `forward` that was put in its place, are about
        # the whole model.
        output = type(self.stand_in).forward(self.stand_in, inputs_embeds=states, use_cache=False, return_dict=True)
        return output.logits.unflatten(1, hidden.shape[:-1])[0]


class _Given:
    """In place of a decoder: its output is what it is given as embeddings; all else is as in the decoder, or what holds
    it."""

    def __init__(self, body: nn.Module, embed: nn.Module):
        self._body, self._embed = body, embed

    def __call__(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        return _GivenOutput(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._body, name)
        return self if isinstance(found, nn.Module) and _holds(found, self._embed) else found


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return module is not part and any(inner is part for inner in module.modules())


class _GivenOutput(BaseModelOutputWithPast):
    """Whatever else a model looks for in the output of its decoder is not there."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def target_logits(target: PreTrainedModel) -> Logits:
    """What makes the target's logits of its last hidden states: its LM head, or all of its `forward` behind the decoder
    where that changes them."""
    return TargetLogits(target) if scales_logits(target) else LMHead(target.get_output_embeddings(), target.dtype)


def scales_logits(target: PreTrainedModel) -> bool:
    """Whether a target's logits are something else than the output of its LM head. Looked at once for an LM head."""
    lm_head = target.get_output_embeddings()
    if lm_head not in _scaling:
        _scaling[lm_head] = _scales(target)
    return _scaling[lm_head]


@torch.no_grad()
def _scales(target: PreTrainedModel) -> bool:
    width = target.config.get_text_config(decoder=True).hidden_size
    hidden = torch.linspace(-PROBE, PROBE, width).expand(1, 2, -1)
    raw = LMHead(target.get_output_embeddings(), target.dtype)(hidden)
    try:
        logits = TargetLogits(target)(hidden)
    except Exception as error:  # whatever a model's own code may raise
        logger.warning_once(
            f"Whether {type(target).__name__} scales or caps the output of its LM head cannot be told ({error!r}); "
            "drafts go by that output as it is. The text is right either way."
        )
        return False
    return raw.shape != logits.shape or not torch.equal(raw.float(), logits.float())


def raw_rows(table: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Rows of an embedding as they are stored, also where the module scales what it looks up; a plain module, sharded
    perhaps, and a quantised one have to be asked."""
    weight = getattr(table, "weight", None)
    if type(table) is nn.Embedding or weight is None or not weight.is_floating_point():
        return table(ids)
    return F.embedding(ids, weight)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is nothing but a table of that kind: not quantised, scaled, sharded or with an adapter."""
    weight = getattr(module, "weight", None)
    plain = type(module) is kind and type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point()
    return plain and getattr(module, "bias", None) is None


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b)


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs: where its weights are, or where accelerate brings them for the call."""
    device = next(chain(module.parameters(), module.buffers())).device
    return torch.device(module._hf_hook.execution_device) if device.type == "meta" else device
