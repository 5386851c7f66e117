"""How the queries of a pass are laid out for the target's attention.

Packing: rows that verify different numbers of drafts share a pass without padding. A rectangle of R rows and W columns
costs R * W tokens however few of them matter. A packed pass shows the model the tokens that matter as one sequence, so
that everything but attention costs what they are worth. Attention needs rows: its queries are spread over the
rectangle again, and each row looks at its own slot of the cache.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclass(frozen=True)
class Packing:
    """Which places of a [rows, width] rectangle are filled: their flat index [B], increasing; of row r the first
    counts[r]."""

    index: torch.Tensor
    counts: torch.Tensor
    width: int

    @property
    def rows(self) -> int:
        return len(self.counts)

    @classmethod
    def of(cls, lengths: torch.Tensor, width: int, total: int) -> "Packing":
        """The first 1 + lengths[r] places of every row; `total` of them, which saves asking the device."""
        filled = torch.arange(width, device=lengths.device) <= lengths[:, None]
        # A stable sort puts the filled places first and leaves them in order.
        index = (~filled).flatten().to(torch.uint8).argsort(stable=True)[:total]
        return cls(index, 1 + lengths, width)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width, ...] -> [1, B, ...]"""
        return x.flatten(0, 1)[self.index.to(x.device)][None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[1, B, ...] -> [rows, width, ...], zeros where nothing is."""
        spread = x.new_zeros(self.rows * self.width, *x.shape[2:])
        spread[self.index.to(x.device)] = x[0]
        return spread.unflatten(0, (self.rows, self.width))


class Pass:
    """A pass of the target by our rounds.

    starts: [R], slot of each row's first token. packing: when it is packed. lengths: for targets whose rotary
    embedding goes by it, of every token the length of the text when plain decoding reads it, [R, n] ([1, B] packed).
    is_prompt: whether it reads tokens that plain decoding reads in one pass too, all of which rows keep.
    recurrence: the layer of the cache whose recurrence is run next; see `recurrences`.
    """

    recurrence: Any = None

    def __init__(
        self,
        starts: torch.Tensor,
        packing: Packing | None,
        lengths: torch.Tensor | None = None,
        is_prompt: bool = False,
    ):
        self.starts, self.packing, self.lengths, self.is_prompt = starts, packing, lengths, is_prompt
        self.masks: dict[tuple[int, int], torch.Tensor] = {}

    def counts(self, width: int) -> torch.Tensor:
        """[R], tokens of each row in a pass of `width` columns."""
        return torch.full_like(self.starts, width) if self.packing is None else self.packing.counts

    def mask_of_groups(self, mask: torch.Tensor, groups: int) -> torch.Tensor:
        """The mask [R, 1, n, view] once for every head of a group, [R, 1, groups * n, view]; made once a pass."""
        key = id(mask), groups
        if key not in self.masks:
            self.masks[key] = mask.repeat(1, 1, groups, 1)
        return self.masks[key]


_pass: ContextVar[Pass | None] = ContextVar("dspark_pass", default=None)
# Above so many queries attention is busy enough without the heads of a group side by side.
MOST_GROUPED = 16


@contextmanager
def our_pass(
    starts: torch.Tensor,
    packing: Packing | None = None,
    lengths: torch.Tensor | None = None,
    is_prompt: bool = False,
) -> Iterator[None]:
    """Within this context the attention of models takes its queries as our rounds lay them out; see [`Pass`]."""
    token = _pass.set(Pass(starts, packing, lengths, is_prompt))
    try:
        yield
    finally:
        _pass.reset(token)


def current_pass() -> Pass | None:
    """The pass that attention is part of; compiled passes are not packed, and a compiler need not look into the
    context."""
    return None if torch.compiler.is_compiling() else _pass.get()


NAME = "dspark_rounds"
# Passes under way of each config, by its id, as several threads may run one model.
_passes: Counter[int] = Counter()
_lock = threading.Lock()


def install() -> None:
    """Make the attention of our passes known to transformers by its name."""
    AttentionInterface.register(NAME, sdpa_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def implementation_of(config: PreTrainedConfig) -> str:
    """The attention implementation that a model was loaded with, also while it makes a pass of ours."""
    name = config._attn_implementation
    return "sdpa" if name == NAME else name


@contextmanager
def attention_of_rounds(config: PreTrainedConfig) -> Iterator[None]:
    """Within this context a model of transformers' sdpa attention looks up ours. To passes of other threads that is
    sdpa's own."""
    with _lock:
        switches = _passes[id(config)] or config._attn_implementation == "sdpa"
        if switches:
            _passes[id(config)] += 1
            config._attn_implementation = NAME
    try:
        yield
    finally:
        if switches:
            with _lock:
                _passes[id(config)] -= 1
                if not _passes[id(config)]:
                    del _passes[id(config)]
                    config._attn_implementation = "sdpa"


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
    ours = current_pass()
    if ours is None and not torch.compiler.is_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    if ours is None or ours.packing is None:
        return _attend(ours, module, query, key, value, attention_mask, *args, **kwargs), None
    query = ours.packing.unpack(query.transpose(1, 2)).transpose(1, 2)
    return ours.packing.pack(_attend(ours, module, query, key, value, attention_mask, *args, **kwargs)), None


def _attend(ours, module, query, key, value, mask, dropout=0.0, scaling=None, **kwargs) -> torch.Tensor:
    """[R, n, heads, head_dim]. Heads that share keys are laid side by side as more queries of one head: otherwise
    transformers copies the keys and values of the whole context for each of them."""
    groups, count = query.shape[1] // key.shape[1], query.shape[2]
    unusual = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if groups == 1 or count > MOST_GROUPED or mask.shape[1] != 1 or unusual:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)[0]
    grouped = query.reshape(len(query), -1, groups * count, query.shape[3])
    if count > 1:
        # A compiler sees for itself that all layers repeat the same.
        mask = mask.repeat(1, 1, groups, 1) if ours is None else ours.mask_of_groups(mask, groups)
    mixed = scaled_dot_product_attention(grouped, key, value, mask, dropout, scale=scaling)
    return mixed.reshape(*query.shape[:3], -1).transpose(1, 2)
