"""The head as a decoding round sees it: target states of committed tokens in, a drafted block out."""

import torch
from transformers import PreTrainedModel

from ..modeling_dspark import DraftBlock, DSparkHead, Select
from .cache import SlotCache, on_device


class Drafter:
    """Drafts blocks for the rows of a batch; keeps the projected context of every row cached."""

    def __init__(self, head: DSparkHead, target: PreTrainedModel, rows: int):
        self.head = head
        self.tables = head.share_tables(target)
        self.device = head.fc.weight.device
        self.cache = SlotCache(head.config.num_hidden_layers, rows, self.device)
        # First token of every row that the head knows; those before came from a cache that was not ours.
        self.first = [0] * rows

    def draft(
        self, anchors: torch.Tensor, features: torch.Tensor, counts: list[int], length: int, select: Select
    ) -> DraftBlock:
        """Draft the tokens after the anchors and remember the context.

        Args:
            anchors: [R], last committed token of every row.
            features: [R, C, m*d], target states of the tokens committed since the last draft; row r has counts[r].
            length: draft tokens wanted, at most the block size.
            select: see `DSparkHead.sample_block`.
        """
        hidden = self._hidden(anchors.to(self.device), features, counts)
        return self.head.sample_block(
            hidden[:, :length],
            self.head.base_logits(hidden[:, :length], self.tables),
            anchors.to(self.device),
            select,
        )

    def absorb(self, anchors: torch.Tensor, features: torch.Tensor, counts: list[int]) -> None:
        """Remember the context without drafting from it."""
        self._hidden(anchors.to(self.device), features, counts)

    def start_at(self, lengths: list[int]) -> None:
        """Begin behind the first `lengths[r]` tokens of every row, without knowing them."""
        self.first = list(lengths)
        self.cache.lengths = list(lengths)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.first = [self.first[row] for row in rows]
        self.cache.keep(rows)

    def _hidden(self, anchors: torch.Tensor, features: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Backbone output [R, B, d]. Context goes to the slots behind each row's length, the block behind it; only
        the context is committed, so the next draft overwrites the block."""
        size, width = self.head.config.block_size, features.shape[1]
        starts = self.cache.lengths
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        end = on_device(ends, self.device)[:, None]
        if len(set(starts)) == 1 and set(counts) == {width}:
            placement = self.cache.place(width + size)
            positions = placement.slots
        else:
            start = on_device(starts, self.device)[:, None]
            context = start + torch.arange(width, device=self.device)
            block = end + torch.arange(size, device=self.device)
            positions = torch.cat([context, block], dim=1)
            # What lies beyond a row's count must not land where its block goes: it gets a slot that nobody sees.
            unseen = max(ends) + size
            places = torch.cat([context.where(context < end, unseen), block], dim=1)
            placement = self.cache.place_at(places, unseen + 1)
        slots = torch.arange(placement.view, device=self.device)
        seen = slots < end + size
        if any(self.first):
            seen &= slots >= on_device(self.first, self.device)[:, None]
        hidden = self.head.backbone(
            self.head.embed_block(anchors, self.tables),
            self.head.project_context(features),
            positions,
            seen[:, None, None, :],
            self.cache,
        )
        self.cache.commit(counts)
        return hidden
