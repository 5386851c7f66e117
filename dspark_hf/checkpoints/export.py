"""A head in the layout of another trainer, for the engines that read it."""

import json
import os
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from ..modeling_dspark import DSparkHead
from ..pairing import misfits, vocabulary_difference
from ..shared_embeddings import scales_logits
from . import CannotExpress, deepseek_v4, deepspec, modelopt, specforge, speculators
from .files import TABLES

LAYOUTS = {layout.NAME: layout for layout in (deepspec, speculators, specforge, modelopt, deepseek_v4)}
# Layouts that hold the target's embedding and LM head; in the others the target's own are used.
HOLDS_TABLES = ("deepspec", "speculators")


def export(
    head: DSparkHead, to: str, folder: str | os.PathLike, target: PreTrainedModel | None = None
) -> dict[str, str]:
    """Write `head` as another trainer would have.

    Args:
        to: `"deepspec"`, `"speculators"`, `"specforge"`, `"modelopt"` or `"deepseek_v4"`.
        folder: for config.json and model.safetensors.
        target: what the head was made for. With it, layouts that hold copies of its embedding and LM head get them, and
            those that leave them to the target are refused where the head's own differ.

    Returns:
        by table, `"embed_tokens.weight"` and `"lm_head.weight"`: `"in the file"` or `"left to the target"`.

    Raises:
        CannotExpress: a `ValueError` that says what the layout has no way to say.
        ValueError: for an unknown layout, for a target that the head was not made for, and for quantised tables.
    """
    if to not in LAYOUTS:
        raise ValueError(f"Unknown layout {to!r}; heads are written as {', '.join(LAYOUTS)}.")
    layout, native = LAYOUTS[to], head.config.own_keys() | {"dtype": str(head.dtype).removeprefix("torch.")}
    tensors = head.full_state_dict()
    if target is not None:
        _check_target(head, target)
        native |= _description(target)
    if to in HOLDS_TABLES:
        tensors |= {} if target is None else _missing_tables(head, tensors, target)
        native |= {
            "borrow_embeddings": TABLES[0] not in tensors,
            "borrow_lm_head": TABLES[1] not in tensors,
        }
    else:
        _check_tables(layout.DESCRIPTION, tensors, target)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in TABLES}
    published = layout.write_config(native)
    if to == "speculators":
        tensors |= speculators.extra_tensors(native, tensors)
    if to != "modelopt":
        published["transformers_version"] = transformers_version
    else:
        published.pop("transformers_version", None)
    if hasattr(layout, "scatter"):
        written = layout.scatter(tensors, native)
    else:
        written = {_published_name(name, layout): tensor for name, tensor in tensors.items()}
    _write(Path(folder), published, written)
    return {name: "in the file" if name in tensors else "left to the target" for name in TABLES}


def _check_target(head: DSparkHead, target: PreTrainedModel) -> None:
    problems = *misfits(head.config, target.config), vocabulary_difference(head.config, target.config)
    problem = next(filter(None, problems), None)
    if problem is not None:
        raise ValueError(f"{problem} Pass the target it was made for ({type(target).__name__} was given).")
    if head.config.scales_as_target and scales_logits(target):
        raise CannotExpress(
            f"{type(target).__name__} scales or caps the output of its LM head, and this head was trained with that. "
            "Only `save_pretrained` writes such heads: in other layouts drafts go by the LM head's output as it is."
        )


def _published_name(name: str, layout: ModuleType) -> str:
    for published, own in layout.PREFIXES.items():
        if name.startswith(own):
            return published + name.removeprefix(own)
    return name


def _description(target: PreTrainedModel) -> dict[str, object]:
    return {
        "target_name_or_path": target.config._name_or_path or None,
        "target_architectures": target.config.architectures or [type(target).__name__],
        "num_target_layers": target.config.get_text_config(decoder=True).num_hidden_layers,
    }


def _target_table(target: PreTrainedModel, name: str) -> torch.Tensor:
    modules = {TABLES[0]: target.get_input_embeddings(), TABLES[1]: target.get_output_embeddings()}
    weight = getattr(modules[name], "weight", None)
    if weight is None or not weight.is_floating_point():
        raise ValueError(f"The target's {name} is quantised. To export with it, load it without quantisation.")
    return weight.detach()


def _missing_tables(head: DSparkHead, tensors: dict[str, torch.Tensor], target: PreTrainedModel) -> dict:
    """Copies of the target's tables that the head does not have; of the LM head the rows that it drafts from."""
    missing = {name: _target_table(target, name) for name in TABLES if name not in tensors}
    if "lm_head.weight" in missing and head.config.draft_vocab_size is not None:
        missing["lm_head.weight"] = missing["lm_head.weight"][head.draft_tokens.to(missing["lm_head.weight"].device)]
    return {name: table.to(head.dtype).clone() for name, table in missing.items()}


def _check_tables(description: str, tensors: dict[str, torch.Tensor], target: PreTrainedModel | None) -> None:
    if target is None:
        return
    for name in TABLES:
        if name not in tensors:
            continue
        own, table = tensors[name], _target_table(target, name)
        if own.shape != table.shape or not torch.equal(own.cpu(), table.to(own.dtype).cpu()):
            raise CannotExpress(
                f"{description} leaves the tables to the target, but the head's {name} differs from the target's."
            )


def _write(folder: Path, published: dict, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, folder)
    (folder / "config.json").write_text(json.dumps(published, indent=2, sort_keys=True) + "\n")
