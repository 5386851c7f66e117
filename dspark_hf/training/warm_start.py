"""A fresh head that starts from layers of its target, or from another head, instead of from noise.

The draft layers of a Qwen3-style head have the shape of a Qwen3 target's layers. Copied from the lower middle of the
target they learn faster than random ones; examples/embedded_pair/README.md has what was measured.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_dspark import DSparkHead

DEPTH = 0.25  # where in the target the copied layers begin
# Names of tensors that are a target's: embedding, LM head and draft vocabulary.
TABLES = ("embed_tokens.", "lm_head.", "d2t")


@torch.no_grad()
def warm_start(head: DSparkHead, target: PreTrainedModel) -> list[int]:
    """Copy consecutive target layers, its final norm and the projection's identity into `head`.

    Returns:
        ids of the copied layers; empty, with the head untouched, when the shapes differ.
    """
    decoder = target.get_decoder()
    layers = getattr(decoder, "layers", [])
    first = min(int(len(layers) * DEPTH), len(layers) - len(head.layers))
    if first < 0 or not all(
        _same_shapes(own, theirs) for own, theirs in zip(head.layers, layers[first:], strict=False)
    ):
        return []
    ids = list(range(first, first + len(head.layers)))
    for own, i in zip(head.layers, ids, strict=True):
        own.load_state_dict(layers[i].state_dict())
    head.norm.load_state_dict(decoder.norm.state_dict())
    head.hidden_norm.load_state_dict(layers[first].input_layernorm.state_dict())
    # Of the fed states, the one that the first copied layer is used to.
    fed = head.config.target_layer_ids
    nearest = min(range(len(fed)), key=lambda i: abs(fed[i] - (first - 1)))
    size = head.config.hidden_size
    head.fc.weight[:, nearest * size : (nearest + 1) * size] += torch.eye(size, device=head.fc.weight.device)
    return ids


def _same_shapes(a: nn.Module, b: nn.Module) -> bool:
    return {name: x.shape for name, x in a.state_dict().items()} == {
        name: x.shape for name, x in b.state_dict().items()
    }


@torch.no_grad()
def take(head: DSparkHead, other: DSparkHead) -> tuple[list[str], float]:
    """Copy what fits of a head for another target: tensors of the same name and shape. Not its tables, which are its
    target's.

    Returns:
        names of the copied tensors, and their share of what `head` has to learn.
    """
    theirs, taken = other.state_dict(), []
    own = {name: x for name, x in head.state_dict().items() if not name.startswith(TABLES)}
    for name, x in own.items():
        if name in theirs and theirs[name].shape == x.shape:
            x.copy_(theirs[name])
            taken.append(name)
    return taken, sum(own[name].numel() for name in taken) / sum(x.numel() for x in own.values())
