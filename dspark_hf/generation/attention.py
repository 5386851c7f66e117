"""The attention implementation "dspark": transformers' sdpa, but for verify passes, which go to the ragged kernel.

model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dspark")
"""

import dspark_kernels
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .packing import Packing, attend_by_groups, by_parts, current_context, sdpa_attention

NAME = "dspark"
MOST_QUERIES = dspark_kernels.LARGEST_BLOCK


def install() -> None:
    """Make the implementation known to transformers by its name."""
    AttentionInterface.register(NAME, ragged)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def ragged(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Of a verify pass of our rounds query [R, H, n, D] ([1, H, B, D] in a packed one) against key and value
    [R, H_kv, view, D]; anything else is sdpa's, with the same arguments."""
    context = current_context()
    fits = context is not None and min((own.width for own in context.packings), default=query.shape[2]) <= MOST_QUERIES
    if not fits or kwargs.get("softcap") is not None or kwargs.get("dropout") or not dspark_kernels.uses_kernels(query):
        kwargs |= {"scaling": scaling, "sliding_window": sliding_window}
        kwargs |= {} if s_aux is None else {"s_aux": s_aux}
        return sdpa_attention(module, query, key, value, attention_mask, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(starts: torch.Tensor, counts: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        places = starts.to(query.device), counts.to(query.device)
        return dspark_kernels.ragged_attention(*tensors, *places, scale, sliding_window, s_aux)

    def of_part(packing: Packing, *tensors: torch.Tensor) -> torch.Tensor:
        if packing.width <= MOST_QUERIES:
            return attend(packing.starts, packing.counts, *tensors[:3])
        options = {"scaling": scale, "sliding_window": sliding_window} | ({} if s_aux is None else {"s_aux": s_aux})
        return attend_by_groups(context, module, *tensors, **options)

    if context.packings:
        return by_parts(context, query, key, value, attention_mask, of_part), None
    return attend(context.starts, context.counts(query.shape[2]), query, key, value), None
