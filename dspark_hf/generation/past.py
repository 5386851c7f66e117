"""From a transformers cache to slots and back, so that a conversation can go on with or without a head.

A transformers cache has one column a token, the same for all rows, left padding included; a slot holds the tokens of
its row and nothing else. A cache that we return also remembers what the head knows of those tokens.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from ..modeling_dspark import DSparkHead
from .cache import SlotCache
from .drafting import Drafter
from .releases import CACHE
from .rows import Row

States = list[tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class RowPast:
    """What is cached of one row of n tokens.

    target: keys and values [heads, n, head_dim] of every target layer, or what else it keeps, see `Slots.take`.
    drafted: so many of the first tokens the head has read. draft: what its layers keep of the last of these, see
    `Drafter.states`. features: [t, m*d], target states of the other t tokens, which the head has not seen yet.
    """

    target: States
    draft: States
    features: torch.Tensor
    drafted: int = 0


@dataclass(frozen=True)
class DraftPast:
    """The head's side of a returned cache; `rows` as in [`RowPast`], without the target's part."""

    head: "weakref.ref[DSparkHead]"
    rows: list[RowPast]

    def fits(self, head: DSparkHead, lengths: Sequence[int]) -> bool:
        """Whether this is of the same head and covers exactly `lengths[r]` tokens of every row."""
        known = [row.drafted + len(row.features) for row in self.rows]
        return self.head() is head and known == list(lengths)


KNOWN_LAYERS = {
    "DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer",
    "DummyLayer",
}  # fmt: skip


def check_cache(past: Cache) -> None:
    """Raise for caches whose contents cannot be moved into slots."""
    for layer in past.layers:
        if type(layer).__name__ not in KNOWN_LAYERS and (
            type(layer).__name__ != "StaticLayer" or past.get_seq_length()
        ):
            raise ValueError(
                f"A DSpark head cannot continue from a {type(past).__name__} with {type(layer).__name__} layers. "
                f"Pass a DynamicCache, or leave out `{CACHE}`."
            )


def load(past: Cache, columns: list[list[int]], slots: SlotCache) -> None:
    """Fill `slots` with a transformers cache.

    Args:
        columns: for every row the columns of the cache that hold its tokens, in order.
    """
    length = past.get_seq_length()
    slots.lengths = [len(own) for own in columns]
    # Layers that share the keys of others come last, and caches of some releases have none for them.
    for source, layer in zip(past.layers, slots.layers, strict=False):
        tensors = []
        if getattr(source, "keys", None) is not None:
            stored = source.keys.shape[2]
            # A sliding layer has dropped its oldest columns; nobody looks at their slots.
            first = length - stored
            kept = [[(slot, c - first) for slot, c in enumerate(own) if c >= first] for own in columns]
            tensors += [_gathered(x, kept, max(slots.lengths)) for x in (source.keys, source.values)]
        if isinstance(source, LinearAttentionCacheLayerMixin):
            # Of the whole rows, whatever their columns.
            states = source.conv_states[0], source.recurrent_states[0]
            tensors += [x for x in states if x is not None]
        if tensors:
            layer.fill(*tensors)


def _gathered(x: torch.Tensor, pairs: list[list[tuple[int, int]]], width: int) -> torch.Tensor:
    """[R, heads, width, head_dim] with x[r, :, column] at every (slot, column) of row r."""
    moved = x.new_zeros(x.shape[0], x.shape[1], width, x.shape[3])
    for r, own in enumerate(pairs):
        if own:
            to, source = (torch.tensor(index, device=x.device) for index in zip(*own, strict=True))
            moved[r].index_copy_(1, to, x[r].index_select(1, source))
    return moved


def _right_padded(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The tensors, zero-padded at the end of `dim` to the longest of them, stacked."""
    shape = list(tensors[0].shape)
    shape[dim] = max(tensor.shape[dim] for tensor in tensors)
    stacked = tensors[0].new_zeros(len(tensors), *shape)
    for row, tensor in zip(stacked, tensors, strict=True):
        row.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return stacked


def take_row(slots: SlotCache, row: int, length: int, copy: bool) -> States:
    """The first `length` tokens of a row; copies, when its slot is to go."""
    if length == 0:
        return []
    states = [layer.take(row, length) for layer in slots.layers]
    return [tuple(x.clone() for x in own) for own in states] if copy else states


class Continuation:
    """The cache that a call was given, and the one that it returns.

    Args:
        given: the cache that `generate` passes on; continued when it came from the user.
        config: of the call; a cache is kept when it asks for outputs or a cache was given, unless `use_cache` is off.
        input_ids: [R, P], all tokens or only those that the cache does not hold. attention_mask: of all columns.
        rereads_at: see `rope.rereads_at`; plain decoding drops a cache that ends before it where the text does not.
        offsets: see `SlotCache`.
        by_column: whether the target's caches can have rows at different places, by padding; those of targets that go
            row by row are neither continued nor returned.

    Attributes:
        width: columns of cache and prompt together. cached: columns that the cache holds. given_in_part: whether
            `input_ids` lack those.

    Raises:
        ValueError: for a cache that cannot be continued.
    """

    def __init__(
        self,
        given: Cache | None,
        config: GenerationConfig,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rereads_at: int | None = None,
        offsets: list[int] | None = None,
        by_column: bool = True,
    ):
        self.offsets = offsets
        self.given = given if getattr(given, "_is_user_defined", False) else None
        if self.given is not None and not by_column:
            raise ValueError(
                f"A DSpark head cannot continue from a {type(self.given).__name__} where every row needs a cache of "
                f"its own. Leave out `{CACHE}`."
            )
        if self.given is not None:
            check_cache(self.given)
        # `generate` leaves the width of a mask that it dropped, as nothing in it was masked, here.
        width = getattr(config, "_mask_length", None) or input_ids.shape[1]
        self.width = width if attention_mask is None else attention_mask.shape[1]
        self.given_in_part = self.width > input_ids.shape[1]
        self.cached = self.given.get_seq_length() if self.given is not None else 0
        if rereads_at is not None and not self.given_in_part and self.cached <= rereads_at < self.width:
            self.cached = 0
        self.is_kept = by_column and config.use_cache and (config.return_dict_in_generate or self.given is not None)
        self.ended: dict[int, RowPast] = {}

    def load(self, rows: Sequence[Row], places: Sequence[int], slots: SlotCache, drafter: Drafter) -> None:
        """Fill the target's slots, and the head's with what it remembers if the cache is one that we returned. All rows
        of a call join at once."""
        if self.offsets is not None:
            slots.offsets = list(self.offsets)
        if self.cached == 0:
            return
        load(self.given, [row.prompt_columns[: row.cached] for row in rows], slots)
        memory = getattr(self.given, "dspark", None)
        if memory is None or not memory.fits(drafter.head, slots.lengths):
            drafter.start_at(slots.lengths)
            return
        for r, row in enumerate(memory.rows):
            drafter.put(r, row.draft, row.drafted)
        unseen = [row.features for row in memory.rows]
        drafter.append(_right_padded(unseen, dim=0), [len(features) for features in unseen])

    def keep_row(self, r: int, row: Row, slots: SlotCache, drafter: Drafter, copy: bool) -> None:
        """Remember a row that ends: all its tokens but the last, which the target has not seen.

        Args:
            r: place of the row in slots and drafter. copy: whether other rows go on, so that its slot goes.
        """
        if not self.is_kept:
            return
        length, drafted = len(row.columns) - 1, drafter.cache.lengths[r]
        states, unseen = take_row(slots, r, length, copy), drafter.unseen(r, length - drafted)
        self.ended[row.index] = RowPast(states, drafter.states(r, copy), unseen, drafted)

    def store(self, rows: Sequence[Row], config: PreTrainedConfig, head: DSparkHead) -> Cache | None:
        """The cache that plain generate would return, with what the head knows; the given one, brought up to date."""
        if not self.is_kept:
            return None
        width = rows[0].width + max(len(row.committed) for row in rows) - 1
        stored = KeptCache([self.ended[row.index] for row in rows], [row.columns[:-1] for row in rows], width, config)
        memory = DraftPast(
            weakref.ref(head),
            [replace(self.ended[index], target=[]) for index in range(len(rows))],
        )
        past = stored
        if self.given is not None:
            past = self.given
            past.layers = stored.layers
        past.dspark = memory
        return past


class KeptCache(DynamicCache):
    """A transformers cache of `width` columns that holds the rows' tokens at their columns; put together when somebody
    looks at it, as most callers that ask for outputs never do."""

    def __init__(self, rows: list[RowPast], columns: list[list[int]], width: int, config: PreTrainedConfig):
        self.parts: tuple | None = None
        super().__init__(config=config)
        self.parts = rows, columns, width

    @property
    def layers(self) -> list:
        if self.parts is not None:
            rows, columns, width = self.parts
            self.parts = None
            for i, layer in enumerate(self._layers):
                parts = list(zip(*(row.target[i] for row in rows), strict=True))
                if parts and isinstance(layer, CacheLayerMixin):
                    layer.update(*(_in_columns(part, columns, width) for part in parts[:2]))
                    parts = parts[2:]
                if parts:
                    layer.update_conv_state(torch.stack(parts[0]))
                for state in parts[1:]:
                    layer.update_recurrent_state(torch.stack(state))
        return self._layers

    @layers.setter
    def layers(self, layers: list) -> None:
        self._layers = layers


def _in_columns(states: Sequence[torch.Tensor], columns: list[list[int]], width: int) -> torch.Tensor:
    """[R, heads, width, head_dim] from the rows' [heads, n, head_dim]; zeros where no token is."""
    x = states[0].new_zeros(len(states), states[0].shape[0], width, states[0].shape[2])
    for r, (own, at) in enumerate(zip(states, columns, strict=True)):
        x[r].index_copy_(1, torch.tensor(at, device=x.device), own)
    return x
