"""Rotary embeddings whose angles follow the length of the text: dynamic NTK, and longrope.

transformers takes the frequencies of a pass from its longest position. Plain decoding reads a token a pass; ours read
blocks of rows at different lengths. So within our passes every token is turned as in the pass in which plain decoding
reads it, by the module's own code.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationMixin, PreTrainedModel

from .packing import current_context


def growing_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The rotary embeddings of a model whose frequencies follow the length of the text."""
    if not any(map(_grows, _configured_types(model))):
        return []
    return [module for module in model.modules() if any(map(_grows, _rope_types(module)))]


def rereads_at(model: PreTrainedModel) -> int | None:
    """The length at which plain decoding reads the whole text anew with other frequencies, as models with longrope say
    in their `prepare_inputs_for_generation`; `None` for all others."""
    if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return None
    if "longrope" not in _configured_types(model):
        return None
    return getattr(model.config, "original_max_position_embeddings", None)


@contextmanager
def turned_as_in_plain(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Within this context the modules give cos and sin by the `lengths` of the current pass; see
    `packing.ForwardContext`."""
    handles = [module.register_forward_hook(_turn, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turn(module, args, kwargs, output):
    """The output (cos, sin), each [R, n, ...], with every token's part as at the length at which plain reads it."""
    context = current_context()
    if context is None or context.lengths is None:
        return output
    (x, positions), others = _arguments(*args, **kwargs)
    lengths = _effective(module, others, context.lengths.to(positions.device))
    turned = [part.clone() for part in output]
    for length in lengths.unique().tolist():
        chosen = lengths == length
        # The module goes by the largest position of what it is asked for, and by what it remembers of passes before.
        asked = torch.cat([positions[chosen], positions.new_tensor([length - 1])])[None]
        _forget(module)
        for part, whole in zip(module.forward(x, asked, **others), turned, strict=True):
            whole[chosen] = part[0, :-1]
    _forget(module)
    return tuple(turned)


def _forget(module: torch.nn.Module) -> None:
    """The longest text so far: the next pass, whoever makes it, takes its frequencies from its own length."""
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, 0)


def _arguments(x, position_ids, layer_type=None) -> tuple[tuple[torch.Tensor, torch.Tensor], dict]:
    return (x, position_ids), {} if layer_type is None else {"layer_type": layer_type}


def _effective(module: torch.nn.Module, others: dict, lengths: torch.Tensor) -> torch.Tensor:
    """The lengths, those of one set of frequencies made equal, so that few are asked for."""
    kind = others.get("layer_type")
    parameters = module.config.rope_parameters if kind is None else module.config.rope_parameters[kind]
    if parameters["rope_type"] == "longrope":
        border = parameters["original_max_position_embeddings"]
        return lengths.clamp(border, border + 1)
    return lengths.clamp(min=module.original_max_seq_len)


def _configured_types(model: PreTrainedModel) -> set[str]:
    """Kinds of rotary embedding that its config names, for all layers or for each kind of them."""
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return {part["rope_type"] for part in parts if "rope_type" in part}


def _rope_types(module: torch.nn.Module) -> list[str]:
    types = getattr(module, "rope_type", None)
    return list(types.values()) if isinstance(types, dict) else [types] if isinstance(types, str) else []


def _grows(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"
