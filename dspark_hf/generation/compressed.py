"""What the layers of DeepSeek V4 keep: the last tokens of a window, and entries that sum up those before.

transformers has cache layers for that, in which all rows are at one place of their texts; so every row has its own, and
goes through the model alone. A pass is given to a copy of them, which costs nothing, as their tensors are replaced and
never changed. What the model hands to a layer is noted: a row that keeps only the first tokens of a pass goes on from
what it had before, to which the layer adds these alone, out of what was noted. No token is computed twice.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .cache import Kept, SlotCache, Slots

# Text configs of the models whose layers these are.
FAMILIES = {"deepseek_v4"}
# How the model hands a layer what it makes of tokens: keys, what entries are made of, what a window leaves to the next,
# and entries.
METHODS = ("update", "store_compression_weights", "update_overlap_state", "update_compressor_states")


class PassedLayer:
    """A layer of transformers' cache of one row in a pass, and what the model hands to it."""

    def __init__(self, layer: CacheLayerMixin):
        self.layer = layer
        self.handed: list[tuple[str, tuple]] = []
        for name in METHODS:
            if hasattr(layer, name):
                setattr(layer, name, partial(self._note, name, getattr(layer, name)))

    def _note(self, name: str, method: Callable, *args, **kwargs) -> Any:
        self.handed.append((name, args))
        return method(*args, **kwargs)

    def whole(self) -> CacheLayerMixin:
        """The layer behind the pass."""
        for name in METHODS:
            vars(self.layer).pop(name, None)
        return self.layer

    def first(self, count: int, before: CacheLayerMixin) -> CacheLayerMixin:
        """The layer of `before` the pass, with the first `count` of its tokens added."""
        # Of each kind of entries those that the tokens complete.
        windows: dict[str, int] = {}
        for method, (first, *others) in self.handed:
            if method == "update":
                before.update(first[:, :, :count], others[0][:, :, :count])
            elif method == "store_compression_weights":
                whole, _, _ = before.store_compression_weights(first, *(x[:, :count] for x in others))
                windows[first] = whole.shape[1] // before.compress_rate
            elif method == "update_compressor_states":
                before.update_compressor_states(first, others[0][:, : windows[first]])
            elif windows[first]:
                kv, gate, head_dim = others
                before.update_overlap_state(first, kv[:, : windows[first]], gate[:, : windows[first]], head_dim)
        return before


class RowLayers(Slots):
    """One layer of the model: what each row has of it in transformers' cache.

    Args:
        fresh: the layer of a row without tokens.
    """

    def __init__(self, fresh: CacheLayerMixin, rows: int, slots: int):
        super().__init__(rows, slots)
        self.fresh = fresh
        self.held = [copied(fresh) for _ in range(slots)]
        self.passes: dict[int, PassedLayer] = {}

    def begin(self, row: int) -> CacheLayerMixin:
        """The layer that a pass over tokens of the row is given."""
        self.passes[row] = PassedLayer(copied(self.held[row]))
        return self.passes[row].layer

    def commit(self, kept: Kept) -> None:
        for row, count in zip(kept.rows, kept.counts, strict=True):
            passed = self.passes.pop(row)
            self.held[row] = passed.whole() if count == kept.width else passed.first(count, self.held[row])

    def take(self, row: int, length: int) -> tuple["HeldLayer"]:
        """The layer of a row, for another cache of ours."""
        return (HeldLayer(self.held[row]),)

    def put(self, row: int, *tensors: "HeldLayer") -> None:
        self.held[row] = copied(tensors[0].layer)

    def keep(self, rows: list[int]) -> None:
        self.held[: len(rows)] = [self.held[row] for row in rows]
        self.resize(len(rows))

    def resize(self, rows: int) -> None:
        """Rows that come begin with nothing, and of those that went nothing stays."""
        for row in range(min(self.rows, rows), self.slots):
            self.erase(row)
        super().resize(rows)

    def erase(self, row: int) -> None:
        """Forget a row's tokens."""
        self.held[row] = copied(self.fresh)

    def clear(self) -> None:
        for row in range(self.slots):
            self.erase(row)


@dataclass(frozen=True)
class HeldLayer:
    """A layer of a row where others have tensors of it."""

    layer: CacheLayerMixin

    def clone(self) -> "HeldLayer":
        """Itself: nothing changes it."""
        return self


def copied(layer: CacheLayerMixin) -> CacheLayerMixin:
    """The layer of which nothing shows in the other one. Tensors are the same ones; see above."""
    own = copy.copy(layer)
    for name, value in vars(own).items():
        if isinstance(value, dict):
            setattr(own, name, dict(value))
    return own


def kinds_of_rows(config: PreTrainedConfig) -> list[partial]:
    """What makes the [`RowLayers`] of every layer."""
    return [partial(RowLayers, layer) for layer in DynamicCache(config=config).layers]


def cache_of_row(cache: SlotCache, row: int) -> Cache:
    """What the model is given as its cache in a pass over tokens of one row."""
    return Cache(layers=[layer.begin(row) for layer in cache.layers])
