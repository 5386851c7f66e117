"""SlotCache: one fixed slot of keys and values a row, so that rows of a batch can accept different counts.

Token i of a row lies at index i of the row's slot, whatever its neighbours hold. New tokens are written behind the
row's length; committing them raises the length, rejecting them leaves it as it is, and what lies behind a length is
never seen and later overwritten. So a rollback costs nothing.

Layers that keep something else hide behind the same methods; see [`Slots`] and `states`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .packing import Packing, filled_places
from .placement import Placement

SMALLEST_CAPACITY = 256


def on_device(values: list | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of host values, without making the host wait for what the device has queued."""
    tensor = values if torch.is_tensor(values) else torch.tensor(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def capacity_for(tokens: int) -> int:
    """Tokens that a slot has room for, of which so many are needed: a power of two, see `SlotLayer`."""
    return max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())


def compact(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """x [R, ...] with only the given rows, in place: row `rows[i]` becomes row i.

    Args:
        rows: where `rows[i]` is not i, it is none of the places that stay: what ends is replaced from the end of the
            batch, so that a row that ends costs one row's copy.
    """
    for place, row in enumerate(rows):
        if place != row:
            x[place] = x[row]
    return x[: len(rows)]


@dataclass(frozen=True)
class Kept:
    """What becomes of a pass over n tokens a row.

    rows: those that took part. counts: of its tokens each of them keeps the first so many. width: n. device: of what
    is made of these.
    """

    rows: Sequence[int]
    counts: Sequence[int]
    width: int
    device: torch.device

    @property
    def is_whole(self) -> bool:
        """Whether all rows keep all tokens."""
        return min(self.counts) == self.width

    @cached_property
    def ends(self) -> torch.Tensor:
        """[R], the counts."""
        return on_device(list(self.counts), self.device)

    @cached_property
    def mask(self) -> torch.Tensor:
        """[R, n], which tokens are kept."""
        return torch.arange(self.width, device=self.device) < self.ends[:, None]


class Slots:
    """What a layer of a model keeps of every row, the first `rows` of its slots.

    A pass is announced by `place`, and ends with `commit`, which says how many of its tokens each row keeps.
    """

    # Tensors [slots, ...], allocated when they are first written.
    whole: tuple[torch.Tensor, ...] = ()
    placement: Placement | None = None
    expected: int | None = None
    is_static = False

    def __init__(self, rows: int, slots: int):
        super().__init__()
        self.rows, self.slots = rows, slots

    def place(self, placement: Placement) -> None:
        """The next pass is laid out like this."""
        self.placement = placement

    def commit(self, kept: Kept) -> None:
        """What rows keep of the last pass is this."""

    def take(self, row: int, length: int) -> tuple[torch.Tensor, ...]:
        """What is kept of a row of `length` tokens, as `put` takes it."""
        raise NotImplementedError

    def put(self, row: int, *tensors: torch.Tensor) -> None:
        """Take over what was kept of a row."""
        raise NotImplementedError

    def fill(self, *tensors: torch.Tensor) -> None:
        """The same of all rows, [R, ...]."""
        raise NotImplementedError

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and move those kept; see `compact`."""
        for x in self.whole:
            compact(x, rows)
        self.resize(len(rows))

    def resize(self, rows: int) -> None:
        """Give the first `rows` slots to rows."""
        self.rows = rows

    def erase(self, row: int) -> None:
        """Make zeros of what a row's slot holds."""
        for x in self.whole:
            x[row] = 0

    def clear(self) -> None:
        """Make zeros of what all slots hold."""
        for x in self.whole:
            x.zero_()


class SlotLayer(Slots, CacheLayerMixin):
    """Keys and values of one model layer: [R, heads, capacity, head_dim], the first R of all slots; allocated at the
    first write."""

    is_croppable = True
    # Tokens that a slot is given room for at most; any number when `None`.
    most: int | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        capacity = self._capacity_for(self.placement.kv_len)
        self._hold(*(x.new_zeros(self.slots, x.shape[1], capacity, x.shape[3]) for x in (key_states, value_states)))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [R, heads, n, head_dim] ([1, heads, B, head_dim] in a packed pass) at the placement's slots; return
        keys and values of slots 0..view-1."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        placement = self.placement
        self._reserve(placement.kv_len)
        device, rows = key_states.device, placement.rows
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if placement.uniform_start is not None:
                stored[:, :, placement.uniform_start : placement.uniform_start + new.shape[2]] = new
            else:
                stored[placement.row_index.to(device), :, placement.slot_mapping.to(device)] = new.transpose(1, 2)
        views = (self.keys[:, :, : placement.kv_len], self.values[:, :, : placement.kv_len])
        return views if rows is None else tuple(view[rows.to(device)] for view in views)

    def _reserve(self, view: int) -> None:
        if view <= self.keys.shape[2]:
            return
        larger = self._capacity_for(view) - self.keys.shape[2]
        self._hold(*(torch.nn.functional.pad(x, (0, 0, 0, larger)) for x in self.whole))

    def take(self, row: int, length: int) -> tuple[torch.Tensor, ...]:
        """Keys and values [heads, length, head_dim] of a row; nothing where the layer keeps none."""
        return (self.keys[row, :, :length], self.values[row, :, :length]) if self.is_initialized else ()

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over [R, heads, n, head_dim] as the first n tokens of every row."""
        room, free = self._capacity_for(max(keys.shape[2], 1)) - keys.shape[2], self.slots - len(keys)
        self._hold(*(torch.nn.functional.pad(x, (0, 0, 0, room, 0, 0, 0, free)) for x in (keys, values)))

    def put(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over [heads, n, head_dim] as the first n tokens of a row."""
        count = keys.shape[1]
        if not self.is_initialized:
            capacity = self._capacity_for(count)
            self._hold(*(x.new_zeros(self.slots, len(x), capacity, x.shape[2]) for x in (keys, values)))
        self._reserve(count)
        for stored, new in zip(self.whole, (keys, values), strict=True):
            stored[row, :, :count] = new

    def resize(self, rows: int) -> None:
        super().resize(rows)
        if self.is_initialized:
            self._hold(*self.whole)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over [slots, heads, capacity, head_dim]."""
        self.whole = keys, values
        self.keys, self.values = keys[: self.rows], values[: self.rows]
        self.is_initialized = True
        if self.is_static and keys.is_cuda:
            # So that CUDA graphs write to them where they are.
            for x in (self.keys, self.values):
                torch._dynamo.mark_static_address(x, guard=False)

    def _capacity_for(self, view: int) -> int:
        """What is expected, when that is near or said to be fixed: growing later would cost a copy. Else a power of
        two, so that shapes stay the same for many rounds and growing costs little overall."""
        capacity = capacity_for(view) if self.most is None else min(capacity_for(view), self.most)
        near = self.expected is not None and view <= self.expected and (self.is_static or self.expected <= 2 * capacity)
        return self.expected if near else capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.placement.kv_len, 0

    def get_seq_length(self) -> int:
        # What models add to their own position count; ours are always passed explicitly.
        return max(self.placement.kv_len - self.placement.slot_mapping.shape[1], 0) if self.placement else 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A transformers `Cache` whose rows have their own lengths.

    Args:
        num_layers: layers of the model that writes into it.
        rows: sequences that it holds.
        device: where masks and slot indices are built.
        slots: sequences that it has memory for; as many as rows by default.
        kinds: of every layer what makes its [`Slots`] of (rows, slots); keys and values by default.
        most: slots of a row that are ever used, where something bounds them; of layers of keys and values.

    Attributes:
        lengths: committed tokens of every row; where all layers keep keys and values the only thing a commit or a
            rollback changes. Replaced, never changed in place.
        offsets: of every row how far positions lie from slots, as pictures before a text bring it about.
    """

    def __init__(
        self,
        num_layers: int,
        rows: int,
        device: torch.device,
        slots: int | None = None,
        kinds: Sequence[Callable[[int, int], Slots]] | None = None,
        most: int | None = None,
    ):
        slots = rows if slots is None else slots
        super().__init__(layers=[kind(rows, slots) for kind in kinds or [SlotLayer] * num_layers])
        self.device, self.most = device, most
        self.lengths, self.offsets = [0] * rows, [0] * rows
        for layer in self.layers:
            layer.most = most
        self.all_lines = torch.arange(slots, device=device)[:, None]
        self.lines = self.all_lines[:rows]

    @property
    def lengths(self) -> list[int]:
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: list[int]) -> None:
        self._lengths, self._starts = lengths, None

    @property
    def starts(self) -> torch.Tensor:
        """[R] int64, the lengths on the device, where the next pass writes. What a round commits the device has added
        itself; other changes are sent to it when they are first asked for."""
        if self._starts is None:
            self._starts = on_device(self._lengths, self.device)
        return self._starts

    def expect(self, tokens: int, is_static: bool = False) -> None:
        """Make room for so many tokens a row, `is_static` from the start; more come in all the same, for the price of
        a copy."""
        tokens = tokens if self.most is None else min(tokens, self.most)
        for layer in self.layers:
            layer.expected, layer.is_static = tokens, is_static

    def place(self, count: int, rows: list[int] | None = None) -> Placement:
        """The next pass appends `count` tokens to every row, or to the given ones. Returns where."""
        if rows is not None:
            starts, index = [self.lengths[row] for row in rows], on_device(rows, self.device)
            slots = self.starts[index][:, None] + torch.arange(count, device=self.device)
            fields = {"rows": index, "positions": self._positions(slots, rows)}
            return self.place_at(slots, max(starts) + count, continues=any(starts), **fields)
        starts = self.lengths
        if len(set(starts)) == 1:
            row, start = torch.arange(starts[0], starts[0] + count, device=self.device), starts[0]
            slots = row.expand(len(starts), -1)
            positions = self._positions(slots)
            return self.place_at(slots, start + count, start, continues=start > 0, positions=positions)
        slots = self.starts[:, None] + torch.arange(count, device=self.device)
        return self.place_at(slots, max(starts) + count, continues=any(starts), positions=self._positions(slots))

    def packing(self, counts: torch.Tensor, width: int, size: int, first: int = 0) -> Packing:
        """Of a packed pass the part in which row first + r brings the first counts[r] of `width` tokens, `size` in
        all."""
        places = slice(first, first + len(counts))
        index, view = filled_places(counts, width, size), max(self.lengths[places]) + width
        return Packing(counts, width, index, size, first, self.starts[places], view)

    def place_packed(self, packings: Sequence[Packing]) -> Placement:
        """The next pass holds these parts, one behind the other, and appends to every row what it brings."""
        slots, lines, positions = [], [], []
        for packing in packings:
            own = packing.starts[:, None] + torch.arange(packing.width, device=self.device)
            slots.append(packing.pack(own))
            lines.append(packing.pack(self.all_lines[packing.places].expand_as(own)))
            at = self._positions(own, range(*packing.places.indices(len(self.lengths))))
            positions += [] if at is None else [packing.pack(at)]
        fields = {"positions": torch.cat(positions, dim=1) if positions else None, "continues": any(self.lengths)}
        view = max(packing.view for packing in packings)
        return self.place_at(torch.cat(slots, dim=1), view, lines=torch.cat(lines, dim=1), **fields)

    def _positions(self, slots: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor | None:
        """[R, n], of tokens that go to these slots of all or the given rows; `None` where they are the same."""
        if not any(self.offsets):
            return None
        offsets = self.offsets if rows is None else [self.offsets[row] for row in rows]
        return slots + on_device(offsets, self.device)[:, None]

    def place_at(self, slots: torch.Tensor, view: int, start: int | None = None, **fields) -> Placement:
        """The next pass writes to the given slots; see [`Placement`]."""
        rows, lines = fields.get("rows"), fields.pop("lines", None)
        # Compiled passes show more slots than there are rows.
        self.show(len(slots) if rows is None and lines is None else len(self.lengths))
        if lines is None:
            lines = self.lines if rows is None else rows[:, None]
        placement = Placement(slots, start, view, row_index=lines, **fields)
        for layer in self.layers:
            layer.place(placement)
        return placement

    def show(self, slots: int) -> None:
        """Let passes see the first so many slots."""
        if len(self.lines) != slots:
            self.lines = self.all_lines[:slots]
        for layer in self.layers:
            if layer.rows != slots:
                layer.resize(slots)

    def commit(self, counts: list[int], rows: list[int] | None = None, starts: torch.Tensor | None = None) -> None:
        """Make the first `counts[r]` tokens of the last pass part of row r, or of the given ones.

        Args:
            starts: [R], see there, of all rows that go on from here, where the device knows it already.
        """
        rows = list(range(len(self.lengths))) if rows is None else rows
        placement = self.layers[0].placement
        width = max(counts) if placement is None else placement.slot_mapping.shape[1]
        kept = Kept(rows, counts, width, self.device)
        for layer in self.layers:
            layer.commit(kept)
        lengths = list(self.lengths)
        for row, count in zip(rows, counts, strict=True):
            lengths[row] += count
        self.lengths, self._starts = lengths, starts

    def put(self, row: int, states: list[tuple[torch.Tensor, ...]], count: int) -> None:
        """Take over what every layer keeps of a row's first `count` tokens: keys and values [heads, n, head_dim]."""
        for layer, own in zip(self.layers, states, strict=False):
            if own:
                layer.put(row, *own)
        self.set_length(row, count)

    def set_length(self, row: int, length: int) -> None:
        """Let a row have so many tokens."""
        self.lengths = [*self.lengths[:row], length, *self.lengths[row + 1 :]]

    def erase(self, row: int) -> None:
        """Make zeros of what a row's slot holds: what nobody looks at still must not be NaN."""
        for layer in self.layers:
            layer.erase(row)

    def clear(self) -> None:
        """Forget all rows and what their slots hold: what nobody looks at still must not be NaN."""
        self.lengths, self.offsets = [], []
        for layer in self.layers:
            layer.clear()
        self.show(0)

    def add(self, rows: int) -> None:
        """Give so many further rows a slot, without tokens."""
        self.lengths, self.offsets = self.lengths + [0] * rows, self.offsets + [0] * rows
        self.show(len(self.lengths))

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and move those kept; see `compact`."""
        for layer in self.layers:
            layer.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]
        self.offsets = [self.offsets[row] for row in rows]
