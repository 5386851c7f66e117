"""What two models are made of besides their tensors: modules, and what others have hung on them."""

from collections.abc import Callable

from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel

from .rope import growing_modules


def structure(*models: PreTrainedModel) -> tuple:
    """What graphs of models depend on but their tensors and `Shape`: their modules, and what is hung on them."""
    return tuple(
        (id(own), own.training, vars(own).get("forward"), len(own._forward_hooks), len(own._forward_pre_hooks))
        for model in models
        for own in model.modules()
    )


def is_stock(*models: PreTrainedModel) -> bool:
    """Whether all modules are ones that keep no state of their own: those of adapters and of remote code may."""
    types = {type(own) for model in models for own in model.modules()}
    return {own.__module__.partition(".")[0] for own in types} <= {
        "torch",
        "transformers",
        __package__.partition(".")[0],
    }


def is_watched(*models: PreTrainedModel) -> bool:
    """Whether others see what modules compute: hooks that are not transformers' own, or a `forward` put in the place of
    a module's, as accelerate does."""
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return True
    modules = [own for model in models for own in model.modules()]
    hooks = [hook for own in modules for hook in (*own._forward_hooks.values(), *own._forward_pre_hooks.values())]
    return any("forward" in vars(own) for own in modules) or not all(map(_is_of_transformers, hooks))


def is_private(target: PreTrainedModel, head: PreTrainedModel) -> bool:
    """Whether the models neither show what they compute to others nor keep it."""
    is_whole = (target.tp_size or 1) == 1 and target._compiled_call_impl is None
    keeps_state = bool(growing_modules(target)) or getattr(target, "hf_quantizer", None) is not None
    return is_whole and not keeps_state and is_stock(target, head) and not is_watched(target, head)


def _is_of_transformers(hook: Callable) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")
