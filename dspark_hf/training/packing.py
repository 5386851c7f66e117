"""Short rows put together in long ones, so that less of a batch is padding.

A packed row also has `positions`, which begin at 0 in each of its documents. transformers makes a mask of them under
which documents do not see each other, in models that have nothing but attention; what a model really does is looked at.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .data import Row

# Of the largest hidden state: what rounding may make of a document beside another one.
ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def pack(rows: Sequence[Row], max_length: int) -> list[Row]:
    """All rows, in packed ones of at most `max_length` tokens: the longest first, each where the least room is left."""
    packed: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # of packed rows, and which ones; increasing
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        found = bisect_left(room, (length,))
        if found < len(room):
            free, place = room.pop(found)
        else:
            free, place = max_length, len(packed)
            packed.append([])
        packed[place].append(row)
        insort(room, (free - length, place))
    return [_joined(documents) for documents in packed]


def _joined(documents: list[Row]) -> Row:
    row = {key: [value for document in documents for value in document[key]] for key in ("input_ids", "loss_mask")}
    return row | {"positions": [i for document in documents for i in range(len(document["input_ids"]))]}


@torch.no_grad()
def check_packing(target: PreTrainedModel) -> None:
    """Raise `ValueError` for a target in which a document sees the ones before it in its row."""
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(1, 17, device=target.device) * 7919 % vocab_size)[None]
    first, second = ids[:, :9], ids[:, 9:]
    try:
        alone = _last_states(target, second)
        positions = torch.cat([torch.arange(part.shape[1], device=ids.device)[None] for part in (first, second)], dim=1)
        packed = _last_states(target, ids, position_ids=positions)[:, 9:]
    except TypeError as error:
        raise ValueError(
            f"Rows cannot be packed for {type(target).__name__}: {error}. Train without --pack."
        ) from error
    apart = (packed - alone).abs().max() / alone.abs().max()
    if apart > ROUNDING.get(target.dtype, ROUNDING[torch.float32]):
        raise ValueError(
            f"Rows cannot be packed for {type(target).__name__}: a text is read otherwise behind another one (hidden "
            f"states differ by {apart:.1%}), as its layers keep states or take no positions. Train without --pack."
        )


def _last_states(target: PreTrainedModel, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    output = target(input_ids=ids, use_cache=False, output_hidden_states=True, **kwargs)
    return output.hidden_states[-1].float()
