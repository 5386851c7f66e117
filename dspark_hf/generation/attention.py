"""The attention implementation "dspark": transformers' sdpa, but for verify passes, which go to the ragged kernel.

model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dspark")
"""

import dspark_kernels
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .packing import current_pass, sdpa_attention

NAME = "dspark"


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
    ours = current_pass()
    packing = None if ours is None else ours.packing
    count = query.shape[2] if packing is None else packing.width
    if (
        ours is None
        or count > dspark_kernels.LARGEST_BLOCK
        or kwargs.get("softcap") is not None
        or kwargs.get("dropout")
        or not dspark_kernels.uses_kernels(query)
    ):
        kwargs |= {"scaling": scaling, "sliding_window": sliding_window}
        kwargs |= {} if s_aux is None else {"s_aux": s_aux}
        return sdpa_attention(module, query, key, value, attention_mask, **kwargs)
    if packing is not None:
        query = packing.unpack(query.transpose(1, 2)).transpose(1, 2)
    starts, counts = ours.starts.to(query.device), ours.counts(count).to(query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = dspark_kernels.ragged_attention(query, key, value, starts, counts, scale, sliding_window, s_aux)
    return mixed if packing is None else packing.pack(mixed), None
