"""How the queries of a pass are laid out for the target's attention.

Packing: rows that bring different numbers of tokens share a pass without padding. A rectangle of R rows and W columns
costs R * W tokens however few of them matter. A packed pass shows the model the tokens that matter as one sequence, so
that everything but attention costs what they are worth. Attention needs rows: its queries are spread over a rectangle
again, and each row looks at its own slot of the cache. Rows that verify drafts and rows whose prompts are read beside
them have a rectangle each.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
    """Which places of a [rows, width] rectangle are filled, and what its rows are.

    counts: [rows], of row r the first so many places are. index: [B], the flat index of all these, increasing; `None`
    where all places are. size: B. first: place of the first row in the cache; the others follow. starts: [rows], slot
    of each row's first token. view: slots that these rows look at.
    """

    counts: torch.Tensor
    width: int
    index: torch.Tensor | None
    size: int
    first: int
    starts: torch.Tensor
    view: int

    @property
    def rows(self) -> int:
        return len(self.counts)

    @property
    def places(self) -> slice:
        """Of its rows in the cache."""
        return slice(self.first, self.first + self.rows)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width, ...] -> [1, B, ...]"""
        flat = x.flatten(0, 1)
        return (flat if self.index is None else flat[self.index.to(x.device)])[None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[1, B, ...] -> [rows, width, ...], zeros where nothing is."""
        if self.index is None:
            return x[0].unflatten(0, (self.rows, self.width))
        spread = x.new_zeros(self.rows * self.width, *x.shape[2:])
        spread[self.index.to(x.device)] = x[0]
        return spread.unflatten(0, (self.rows, self.width))


def filled_places(counts: torch.Tensor, width: int, size: int) -> torch.Tensor | None:
    """`Packing.index` of the first counts[r] places of every row; `size` of them, which saves asking the device."""
    if size == len(counts) * width:
        return None
    empty = torch.arange(width, device=counts.device) >= counts[:, None]
    # A stable sort puts the filled places first and leaves them in order.
    return empty.flatten().to(torch.uint8).argsort(stable=True)[:size]


class ForwardContext:
    """A pass of the target by our rounds.

    starts: [R], slot of each row's first token. packings: when it is packed, its parts in their order. lengths: for
    targets whose rotary embedding goes by it, of every token the length of the text when plain decoding reads it,
    [R, n] ([1, B] packed).
    is_prompt: whether it reads tokens that plain decoding reads in one pass too, all of which rows keep.
    recurrence: the layer of the cache whose recurrence is run next; see `recurrences`.
    """

    recurrence: Any = None

    def __init__(
        self,
        starts: torch.Tensor,
        packings: Sequence[Packing] = (),
        lengths: torch.Tensor | None = None,
        is_prompt: bool = False,
    ):
        self.starts, self.packings, self.lengths, self.is_prompt = starts, packings, lengths, is_prompt
        # What was made of a mask, with the mask, so that no other has its id.
        self.masks: dict[tuple, tuple[torch.Tensor, Any]] = {}

    def counts(self, width: int) -> torch.Tensor:
        """[R], tokens of each row in a pass of `width` columns that is not packed."""
        return torch.full_like(self.starts, width)

    def masks_of_parts(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """What the mask [1, 1, B, view] of a packed pass says of each part, [rows, 1, width, view]; made once a
        pass."""

        def rectangles() -> list[torch.Tensor]:
            parts = zip(self.packings, self.split(mask[:, 0]), strict=True)
            return [packing.unpack(own)[:, None, :, : packing.view] for packing, own in parts]

        return self._made(("parts", id(mask)), mask, rectangles)

    def mask_of_groups(self, mask: torch.Tensor, groups: int) -> torch.Tensor:
        """The mask [R, 1, n, view] once for every head of a group, [R, 1, groups * n, view]; made once a pass."""
        return self._made((groups, id(mask)), mask, lambda: mask.repeat(1, 1, groups, 1))

    def split(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """[1, B, ...] of a packed pass -> what of it each part has."""
        return x.split([packing.size for packing in self.packings], dim=1)

    def _made(self, key: tuple, mask: torch.Tensor, make: Callable[[], Any]) -> Any:
        if key not in self.masks:
            self.masks[key] = mask, make()
        return self.masks[key][1]


_context: ContextVar[ForwardContext | None] = ContextVar("dspark_forward", default=None)
# Above so many queries attention is busy enough without the heads of a group side by side.
MOST_GROUPED = 16


@contextmanager
def forward_context(
    starts: torch.Tensor,
    packings: Sequence[Packing] = (),
    lengths: torch.Tensor | None = None,
    is_prompt: bool = False,
) -> Iterator[None]:
    """Within this context the attention of models takes its queries as our rounds lay them out; see
    [`ForwardContext`]."""
    token = _context.set(ForwardContext(starts, packings, lengths, is_prompt))
    try:
        yield
    finally:
        _context.reset(token)


def current_context() -> ForwardContext | None:
    """The pass that attention is part of; compiled passes are not packed, and a compiler need not look into the
    context."""
    return None if torch.compiler.is_compiling() else _context.get()


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
    [rows, kv_heads, view, head_dim], with a mask [1, 1, B, view]. Returns [1, B, heads, head_dim] then."""
    context = current_context()
    if context is None and not torch.compiler.is_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    if context is None or not context.packings:
        return attend_by_groups(context, module, query, key, value, attention_mask, *args, **kwargs), None

    def attend(packing: Packing, *tensors: torch.Tensor) -> torch.Tensor:
        return attend_by_groups(context, module, *tensors, *args, **kwargs)

    return by_parts(context, query, key, value, attention_mask, attend), None


def by_parts(
    context: ForwardContext,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    attend: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attention [1, B, heads, head_dim] of a packed pass: that of each part, as `attend` gives it for its packing,
    query [rows, heads, width, head_dim], key, value and mask."""
    mixed = []
    parts = zip(context.packings, context.split(query.transpose(1, 2)), context.masks_of_parts(mask), strict=True)
    for packing, own, seen in parts:
        keys, values = (x[packing.places, :, : packing.view] for x in (key, value))
        mixed.append(packing.pack(attend(packing, packing.unpack(own).transpose(1, 2), keys, values, seen)))
    return torch.cat(mixed, dim=1)


def attend_by_groups(context, module, query, key, value, mask, dropout=0.0, scaling=None, **kwargs) -> torch.Tensor:
    """[R, n, heads, head_dim]. Heads that share keys are laid side by side as more queries of one head: otherwise
    transformers copies the keys and values of the whole context for each of them."""
    groups, count = query.shape[1] // key.shape[1], query.shape[2]
    unusual = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if groups == 1 or count > MOST_GROUPED or mask.shape[1] != 1 or unusual:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)[0]
    grouped = query.reshape(len(query), -1, groups * count, query.shape[3])
    if count > 1:
        # A compiler sees for itself that all layers repeat the same.
        mask = mask.repeat(1, 1, groups, 1) if context is None else context.mask_of_groups(mask, groups)
    mixed = scaled_dot_product_attention(grouped, key, value, mask, dropout, scale=scaling)
    return mixed.reshape(*query.shape[:3], -1).transpose(1, 2)
