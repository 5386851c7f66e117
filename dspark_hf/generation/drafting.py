"""The head as a decoding round sees it: target states of committed tokens in, a drafted block out."""

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..modeling_dspark import DraftBlock, DSparkHead, Select
from .cache import SlotCache, compact, on_device

# Tokens of a row, those of the last prompt or draft aside, whose target states may wait for a draft; more are taken
# into the cache without one.
LONGEST_WAIT = 512


class Drafter:
    """Drafts blocks for rows of a batch; keeps the projected context of every row cached.

    Target states of committed tokens wait until their row drafts again, so that a row without drafts costs nothing.
    """

    def __init__(self, head: DSparkHead, target: PreTrainedModel, rows: int, slots: int | None = None):
        self.head = head
        self.tables = head.share_tables(target)
        self.device, self.dtype = head.fc.weight.device, head.fc.weight.dtype
        self.cache = SlotCache(head.config.num_hidden_layers, rows, self.device, slots)
        # First token of every row that the head knows; those before came from a cache that was not ours.
        self.first = [0] * rows
        # What waits: pieces [R, C, m*d], of which row r has the first counts[r] of each.
        self.pending: list[tuple[torch.Tensor, list[int]]] = []
        # Tokens of every row that wait.
        self.num_pending = [0] * rows

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
        features = features[:, : max(counts)]
        positions = on_device(starts, self.device)[:, None] + torch.arange(features.shape[1], device=self.device)
        # What lies beyond a row's count goes to a slot that nobody sees.
        places = positions.where(positions < on_device(ends, self.device)[:, None], max(ends))
        self.cache.place_at(places, max(ends) + 1, rows=None if rows is None else on_device(rows, self.device))
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
        select: Select,
        rows: list[int] | None = None,
    ) -> DraftBlock:
        """Draft the tokens after the anchors, once the context has caught up with what was committed.

        Args:
            anchors: [R], last committed token of every row. length: draft tokens wanted, at most `config.gamma`.
            rows: those that draft, increasing; all when `None`. The block has a line for each of them.
            select: see `DSparkHead.sample_block`.
        """
        anchors = anchors.to(self.device)
        if rows is not None:
            anchors = anchors[on_device(rows, self.device)]
        hidden = self._hidden(anchors, rows, *self.take(rows))
        return self.head.sample_block(hidden, anchors, self.tables, length, select)

    def flush(self) -> None:
        """Take what waits into the cache without drafting, when it has become much."""
        if self.pending and max(self.num_pending) - max(self.pending[0][1]) > LONGEST_WAIT:
            self.read(None, *self.take(None))

    def unseen(self, row: int, count: int) -> torch.Tensor:
        """[count, m*d], the first target states of a row that wait."""
        pieces = [features[row, : counts[row]] for features, counts in self.pending]
        return torch.cat(pieces or [self.nothing(1)[0][0]])[:count].clone()

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
        size, width = self.head.config.block_size, features.shape[1]
        starts, ends = self._ends(rows, counts)
        end = on_device(ends, self.device)[:, None]
        if rows is None and len(set(starts)) == 1 and set(counts) == {width}:
            placement = self.cache.place(width + size)
            positions = placement.slots
        else:
            start, unseen = on_device(starts, self.device)[:, None], max(ends) + size
            positions, places = laid_out(start, end, width, size, unseen)
            index = None if rows is None else on_device(rows, self.device)
            placement = self.cache.place_at(places, unseen + 1, rows=index)
        slots = torch.arange(placement.view, device=self.device)
        first = self.first if rows is None else [self.first[row] for row in rows]
        known = slots >= on_device(first, self.device)[:, None] if any(first) else None
        masks = block_masks(self.head, slots, end, known)
        context, block = self.head.project_context(features), self.head.embed_block(anchors, self.tables)
        hidden = self.head.backbone(block, context, positions, masks, self.cache)
        self.cache.commit(counts, rows)
        return hidden

    def _ends(self, rows: list[int] | None, counts: list[int]) -> tuple[list[int], list[int]]:
        """Tokens in the cache of the given rows, and with so many further ones."""
        starts = self.cache.lengths if rows is None else [self.cache.lengths[row] for row in rows]
        return starts, [start + count for start, count in zip(starts, counts, strict=True)]


def laid_out(
    start: torch.Tensor, end: torch.Tensor, width: int, size: int, unseen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of `width` context tokens from start [n, 1] on and of a block behind end [n, 1], and their slots, both
    [n, width + size]: context beyond a row's end must not land where its block goes, but in a slot that nobody sees."""
    context = start + torch.arange(width, device=start.device)
    block = end + torch.arange(size, device=start.device)
    return torch.cat([context, block], dim=1), torch.cat([context.where(context < end, unseen), block], dim=1)


def block_masks(
    head: DSparkHead, slots: torch.Tensor, end: torch.Tensor, known: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What a block behind the first `end[r]` [n, 1] slots sees, [n, 1, B or 1, view], for each type of layer.

    Args:
        slots: [view]. known: [n, view], slots that hold something; all when `None`.
    """
    masks = {kind: rule(slots, end) for kind, rule in head.mask_rules.items()}
    return {kind: (m if known is None else m & known[:, None])[:, None] for kind, m in masks.items()}


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
