"""Packing: rows that verify different numbers of drafts share a pass without padding.

A rectangle of R rows and W columns costs R * W tokens however few of them matter. A packed pass shows the model the
tokens that matter as one sequence, so that everything but attention costs what they are worth. Attention needs rows:
its queries are spread over the rectangle again, and each row looks at its own slot of the cache.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass(frozen=True)
class Packing:
    """Which places of a [rows, width] rectangle are filled: their flat index [B], increasing."""

    index: torch.Tensor
    rows: int
    width: int

    @classmethod
    def of(cls, lengths: torch.Tensor, width: int, total: int) -> "Packing":
        """The first 1 + lengths[r] places of every row; `total` of them, which saves asking the device."""
        filled = torch.arange(width, device=lengths.device) <= lengths[:, None]
        # A stable sort puts the filled places first and leaves them in order.
        index = (~filled).flatten().to(torch.uint8).argsort(stable=True)[:total]
        return cls(index, len(lengths), width)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width, ...] -> [1, B, ...]"""
        return x.flatten(0, 1)[self.index.to(x.device)][None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[1, B, ...] -> [rows, width, ...], zeros where nothing is."""
        spread = x.new_zeros(self.rows * self.width, *x.shape[2:])
        spread[self.index.to(x.device)] = x[0]
        return spread.unflatten(0, (self.rows, self.width))


_packing: ContextVar[Packing | None] = ContextVar("dspark_packing", default=None)


@contextmanager
def packed(packing: Packing):
    """Within this context the sdpa attention of models takes its queries packed and its keys by rows."""
    token = _packing.set(packing)
    try:
        yield
    finally:
        _packing.reset(token)


def install() -> None:
    """Teach transformers' sdpa attention about packed queries; without a packing it is what it was."""
    AttentionInterface.register("sdpa", sdpa_attention)


def sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention; in a packed pass for queries [1, heads, B, head_dim] and keys and values
    [rows, kv_heads, view, head_dim], with a mask [rows, 1, width, view]. Returns [1, B, heads, head_dim] then."""
    # Packed passes are not compiled; a compiler need not look into the context.
    packing = None if torch.compiler.is_compiling() else _packing.get()
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    spread = packing.unpack(query.transpose(1, 2)).transpose(1, 2)
    mixed, _ = sdpa_attention_forward(module, spread, key, value, attention_mask, *args, **kwargs)
    return packing.pack(mixed), None
