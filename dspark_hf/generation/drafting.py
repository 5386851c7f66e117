"""The head as a decoding round sees it: target states of committed tokens in, a drafted block out."""

import copy

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..modeling_dspark import DraftBlock, DraftSampler, DSparkHead
from .cache import SlotCache, compact, on_device

# Tokens of a row, those of the last prompt or draft aside, whose target states may wait for a draft; more are taken
# into the cache without one.
LONGEST_WAIT = 512


class Drafter:
    """Drafts blocks for rows of a batch; keeps the projected context of every row cached.

    Target states of committed tokens wait until their row drafts again, so that a row without drafts costs nothing.

    Attributes:
        window: tokens of context that a block sees, the last ones; `None` for all. ring: slots of a row, where the
            window bounds them: a token's slot is its position modulo their number.
        first: of every row the first token that the head knows; those before came from a cache that was not ours.
    """

    def __init__(self, head: DSparkHead, target: PreTrainedModel, rows: int, slots: int | None = None):
        self.head = head
        self.embeddings = head.share_embeddings(target)
        self.device, self.dtype = head.fc.weight.device, head.fc.weight.dtype
        self.window, size = window_of(head), head.config.block_size
        # Room for the window, or what a round commits if that is more, and a block behind it.
        self.ring = None if self.window is None else max(self.window, size + 1) + size
        self._begin(rows, slots)

    def _begin(self, rows: int, slots: int | None) -> None:
        # One slot more takes what nobody is to see.
        most = None if self.ring is None else self.ring + 1
        self.cache = SlotCache(self.head.config.num_hidden_layers, rows, self.device, slots, most=most)
        self.first = [0] * rows
        # What waits: pieces [R, C, m*d], of which row r has the first counts[r] of each.
        self.pending: list[tuple[torch.Tensor, list[int]]] = []
        # Tokens of every row that wait.
        self.num_pending = [0] * rows

    def alone(self) -> "Drafter":
        """Another drafter of the pair, for one row."""
        other = copy.copy(self)
        other._begin(1, None)
        return other

    def add(self, rows: int) -> None:
        """Make room for so many rows behind the others."""
        self.first, self.num_pending = self.first + [0] * rows, self.num_pending + [0] * rows
        self.cache.add(rows)
        self.pending = [
            (torch.cat([own, own.new_zeros(rows, *own.shape[1:])]), known + [0] * rows) for own, known in self.pending
        ]

    def read(self, rows: list[int] | None, features: torch.Tensor, counts: list[int]) -> None:
        """Take target states of the given rows, all when `None`, into the cache without drafting.

        Args:
            features: [n, C, m*d], of each of the rows the first counts[i].
        """
        starts, ends = self._ends(rows, counts)
        features, starts = latest(features[:, : max(counts)], starts, ends, self.window)
        start, end = (on_device(own, self.device)[:, None] for own in (starts, ends))
        unseen = self._slot_behind(max(ends))
        positions, places = laid_out(start, end, features.shape[1], 0, unseen, self.ring)
        self.cache.place_at(places, unseen + 1, rows=None if rows is None else on_device(rows, self.device))
        self.head.read(self.head.project_context(features), positions, self.cache)
        self.cache.commit(counts, rows)

    def append(self, features: torch.Tensor, counts: list[int]) -> None:
        """Target states of the tokens that were committed last: features [R, C, m*d], of row r the first counts[r];
        nothing of rows behind these. They are the drafter's from then on, which may move rows in them."""
        more = len(self.num_pending) - len(counts)
        if more:
            features, counts = pad(features, (0, 0, 0, 0, 0, more)), counts + [0] * more
        self.pending.append((features, counts))
        self.num_pending = [waiting + count for waiting, count in zip(self.num_pending, counts, strict=True)]

    def draft(
        self,
        anchors: torch.Tensor,
        length: int,
        sampler: DraftSampler,
        rows: list[int] | None = None,
    ) -> DraftBlock:
        """Draft the tokens after the anchors, once the context has caught up with what was committed.

        Args:
            anchors: [R], last committed token of every row. length: draft tokens wanted, at most `config.gamma`.
            rows: those that draft, increasing; all when `None`. The block has a line for each of them.
            sampler: see `DSparkHead.sample_block`.
        """
        anchors = anchors.to(self.device)
        if rows is not None:
            anchors = anchors[on_device(rows, self.device)]
        hidden = self._hidden(anchors, rows, *self.take(rows))
        return self.head.sample_block(hidden, anchors, self.embeddings, length, sampler)

    def flush(self) -> None:
        """Take what waits into the cache without drafting, when it has become much."""
        if self.pending and max(self.num_pending) - max(self.pending[0][1]) > LONGEST_WAIT:
            self.read(None, *self.take(None))

    def unseen(self, row: int, count: int) -> torch.Tensor:
        """[count, m*d], the first target states of a row that wait."""
        pieces = [features[row, : counts[row]] for features, counts in self.pending]
        return torch.cat(pieces or [self.nothing(1)[0][0]])[:count].clone()

    def states(self, row: int, copy: bool) -> list[tuple[torch.Tensor, ...]]:
        """What every layer keeps of the last tokens of a row that the head has read, as many as it knows and still
        sees: keys and values [heads, n, head_dim], nothing where there are none.

        Args:
            copy: whether the slot goes.
        """
        length = self.cache.lengths[row]
        start = max(self.first[row], 0 if self.window is None else length - self.window)
        if start == length:
            return []
        if self.ring is None or length <= self.ring:
            kept = [tuple(x[:, start:] for x in layer.take(row, length)) for layer in self.cache.layers]
            return [tuple(x.clone() for x in own) for own in kept] if copy else kept
        slots = torch.arange(start, length, device=self.device) % self.ring
        return [tuple(x[:, slots] for x in layer.take(row, self.ring)) for layer in self.cache.layers]

    def put(self, row: int, states: list[tuple[torch.Tensor, ...]], length: int) -> None:
        """Take over a row of `length` tokens that the head has read; `states` of the last of them, as above."""
        if self.window is not None:
            states = [tuple(x[:, -self.window :] for x in own) for own in states]
        count = states[0][0].shape[1] if states else 0
        self.cache.set_length(row, length)
        self.first[row] = length - count
        if count == 0:
            return
        slots = torch.arange(length - count, length, device=self.device)
        slots = slots if self.ring is None else slots % self.ring
        self.cache.place_at(slots[None], self._slot_behind(length), rows=on_device([row], self.device))
        for index, own in enumerate(states):
            self.cache.update(*(x[None] for x in own), index)

    def start_at(self, lengths: list[int]) -> None:
        """Begin behind the first `lengths[r]` tokens of every row, without knowing them."""
        self.first = list(lengths)
        self.cache.lengths = list(lengths)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and move those kept; see `cache.compact`."""
        self.first = [self.first[row] for row in rows]
        self.cache.keep(rows)
        self.num_pending = [self.num_pending[row] for row in rows]
        self.pending = [(compact(features, rows), [counts[row] for row in rows]) for features, counts in self.pending]

    def take(self, rows: list[int] | None) -> tuple[torch.Tensor, list[int]]:
        """What waits for the given rows, [n, C, m*d] with the counts, which then no longer waits."""
        pieces, self.pending = self.pending, []
        if not pieces:
            return self.nothing(len(self.first) if rows is None else len(rows))
        if rows is None:
            counts, self.num_pending = self.num_pending, [0] * len(self.num_pending)
            return _joined(pieces, counts), counts
        counts, index = [self.num_pending[row] for row in rows], on_device(rows, pieces[0][0].device)
        for row in rows:
            self.num_pending[row] = 0
        taken = set(rows)
        for features, own in pieces:
            left = [0 if row in taken else count for row, count in enumerate(own)]
            if any(left):
                self.pending.append((features, left))
        pieces = [(features[index], [own[row] for row in rows]) for features, own in pieces]
        return _joined(pieces, counts), counts

    def nothing(self, rows: int) -> tuple[torch.Tensor, list[int]]:
        """What `take` gives where nothing waits, [rows, 0, m*d]."""
        return torch.zeros(rows, 0, self.head.fc.in_features, dtype=self.dtype, device=self.device), [0] * rows

    def _hidden(
        self, anchors: torch.Tensor, rows: list[int] | None, features: torch.Tensor, counts: list[int]
    ) -> torch.Tensor:
        """Backbone output [n, B, d] behind context features [n, C, m*d], of each row the first counts[r]. Context goes
        to the slots behind each row's length, the block behind it; only the context is committed, so the next draft
        overwrites the block."""
        size = self.head.config.block_size
        starts, ends = self._ends(rows, counts)
        features, starts = latest(features, starts, ends, self.window)
        width, view = features.shape[1], self._slot_behind(max(ends) + size) + 1
        end = on_device(ends, self.device)[:, None]
        is_even = rows is None and len(set(starts)) == 1 and set(ends) == {starts[0] + width}
        if is_even and (self.ring is None or ends[0] + size <= self.ring) and starts == self.cache.lengths:
            placement = self.cache.place(width + size)
            positions, view = placement.slot_mapping, placement.kv_len
        else:
            start = on_device(starts, self.device)[:, None]
            positions, places = laid_out(start, end, width, size, view - 1, self.ring)
            index = None if rows is None else on_device(rows, self.device)
            self.cache.place_at(places, view, rows=index)
        first = self.first if rows is None else [self.first[row] for row in rows]
        known = on_device(first, self.device)[:, None] if any(first) or self.ring is not None else None
        masks = block_masks(self.head, end, known, view, self.window, self.ring)
        context, block = self.head.project_context(features), self.head.embed_block(anchors, self.embeddings)
        hidden = self.head.backbone(block, context, positions, masks, self.cache)
        self.cache.commit(counts, rows, end[:, 0] if rows is None else None)
        return hidden

    def _ends(self, rows: list[int] | None, counts: list[int]) -> tuple[list[int], list[int]]:
        """Tokens in the cache of the given rows, and with so many further ones."""
        starts = self.cache.lengths if rows is None else [self.cache.lengths[row] for row in rows]
        return starts, [start + count for start, count in zip(starts, counts, strict=True)]

    def _slot_behind(self, end: int) -> int:
        """A slot that no row has which ends there or before."""
        return end if self.ring is None else min(end, self.ring)


def window_of(head: DSparkHead) -> int | None:
    """Tokens of context that a block sees at most, `None` for all: `draft_window` of the head's generation config,
    and where all its layers slide no more than their window.

    Raises:
        ValueError: for a `draft_window` that is no whole number from 1 on.
    """
    asked, kinds = getattr(head.generation_config, "draft_window", None), set(head.config.layer_types)
    if asked is not None and (type(asked) is not int or asked < 1):
        raise ValueError(
            f"`draft_window` must be a number of tokens, 1 or more, got {asked!r}. Set it to None for a head that sees "
            "all of the context."
        )
    own = head.config.sliding_window if kinds == {"sliding_attention"} else None
    return min((window for window in (asked, own) if window is not None), default=None)


def latest(
    features: torch.Tensor, starts: list[int], ends: list[int], window: int | None
) -> tuple[torch.Tensor, list[int]]:
    """Of features [n, C, m*d], which are those of row r from starts[r] to ends[r], the ones within the window before
    the end [n, up to window, m*d], and where they start."""
    if window is None or features.shape[1] <= window:
        return features, starts
    first = [max(start, end - window) for start, end in zip(starts, ends, strict=True)]
    skipped = [after - before for after, before in zip(first, starts, strict=True)]
    if len(set(skipped)) == 1:
        return features[:, skipped[0] : skipped[0] + window], first
    index = on_device(skipped, features.device)[:, None] + torch.arange(window, device=features.device)
    return features.take_along_dim(index.clamp(max=features.shape[1] - 1)[..., None], dim=1), first


def laid_out(
    start: torch.Tensor, end: torch.Tensor, width: int, size: int, unseen: int, ring: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of `width` context tokens from start [n, 1] on and of a block behind end [n, 1], and their slots, both
    [n, width + size]: context beyond a row's end must not land where its block goes, but in a slot that nobody sees."""
    context = start + torch.arange(width, device=start.device)
    block = end + torch.arange(size, device=start.device)
    positions = torch.cat([context, block], dim=1)
    slots = positions if ring is None else positions % ring
    beyond = torch.cat([context >= end, torch.zeros_like(block, dtype=torch.bool)], dim=1)
    return positions, slots.masked_fill(beyond, unseen)


def block_masks(
    head: DSparkHead,
    end: torch.Tensor,
    first: torch.Tensor | None,
    view: int,
    window: int | None = None,
    ring: int | None = None,
) -> dict[str, torch.Tensor]:
    """What a block behind the first `end[r]` [n, 1] tokens sees of slots 0..view-1, [n, 1, B or 1, view], for each type
    of layer.

    Args:
        first: [n, 1], tokens from there on are known; all when `None`. window, ring: see [`Drafter`].
    """
    positions = torch.arange(view, device=end.device)
    if ring is not None:
        # The last token that went to a slot, the block's among them; before the first one where none has.
        last = end + head.config.block_size - 1
        positions = (last - (last - positions) % ring).masked_fill(positions >= ring, -1)
        first = torch.maximum(first, end - window)
    known = None if first is None else (positions >= first)[:, None]
    masks = {kind: rule(positions, end) for kind, rule in head.mask_rules.items()}
    return {kind: (m if known is None else m & known)[:, None] for kind, m in masks.items()}


def _joined(pieces: list[tuple[torch.Tensor, list[int]]], counts: list[int]) -> torch.Tensor:
    """Pieces [R, C, m*d], of which row r has the first own[r] of each and counts[r] in all, as one, [R, max(counts),
    m*d], with the states of every row at the front."""
    joined = torch.cat([features for features, _ in pieces], dim=1)
    if len(pieces) == 1 or set(counts) == {joined.shape[1]}:
        return joined[:, : max(counts)]
    device = joined.device
    real = torch.cat(
        [torch.arange(features.shape[1], device=device) < on_device(own, device)[:, None] for features, own in pieces],
        dim=1,
    )
    front = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(counts)]
    return joined.gather(1, front[..., None].expand(-1, -1, joined.shape[2]))
