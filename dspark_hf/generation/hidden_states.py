"""Which hidden states to ask a transformers model for, and where to find them.

Layer ids are DeepSpec's: id i is the output of layer i, -1 the embedding output. In the `hidden_states` tuple of
transformers that is index i + 1.
"""

from .releases import SELECTS_BY_INDEX


def indices_of(layer_ids: list[int]) -> list[int]:
    """Indices into the `hidden_states` tuple of the outputs of the given layers."""
    return [i + 1 for i in layer_ids]


def request_for(indices: list[int]) -> list[int] | bool:
    """What to pass as `output_hidden_states` so that these indices are there; no more than these where possible."""
    return list(indices) if SELECTS_BY_INDEX else True
