"""Prompts whose beginning is known: that of the text of an ended request, and long ones that are read in pieces."""

from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from ..generation.cache import SlotCache, on_device
from ..generation.drafting import Drafter
from ..generation.past import RowPast, States, take_row
from ..generation.rows import Row
from ..generation.target import Target


class KeptTexts:
    """What target and head know of texts that have ended, the latest last; and of those that begin with one, until they
    join.

    Args:
        room: tokens to keep at most.
    """

    # For the engine: all tokens of a row are known.
    given_in_part = False

    def __init__(self, room: int):
        self.room = room
        self.texts: OrderedDict[tuple[int, ...], RowPast] = OrderedDict()
        self.known: WeakKeyDictionary[Row, RowPast] = WeakKeyDictionary()

    def begin(self, row: Row) -> None:
        """Let a row go on from the kept text that it has most of its prompt in common with; its last token is read in
        any case, as the next one comes from there."""
        best, common = None, 0
        for text in self.texts:
            count = in_common(row.given[:-1], text)
            if count > common:
                best, common = text, count
        if best is not None:
            self.texts.move_to_end(best)
            self.know(row, beginning(self.texts[best], common), common)

    def know(self, row: Row, past: RowPast, count: int) -> None:
        """Let a row go on behind its first `count` tokens."""
        row.cached, row.prompt = count, row.given[count:]
        self.known[row] = past

    def load(self, rows: Sequence[Row], places: Sequence[int], slots: SlotCache, drafter: Drafter) -> None:
        """Give rows that join what is known of them."""
        for row, place in zip(rows, places, strict=True):
            past = self.known.pop(row, None)
            if past is not None:
                slots.put(place, past.target, row.cached)
                drafter.put(place, past.draft, past.drafted)
                if len(past.features):
                    drafter.read([place], past.features[None], [len(past.features)])

    def keep_row(self, r: int, row: Row, slots: SlotCache, drafter: Drafter, copy: bool) -> None:
        """Remember a row that ends: all its tokens but the last, which the target has not seen."""
        text = tuple(row.sequence[:-1])
        if row.error is not None or not text or len(text) > self.room:
            return
        drafted = drafter.cache.lengths[r]
        states, draft = take_row(slots, r, len(text), copy=True), drafter.states(r, copy=True)
        self.texts[text] = RowPast(states, draft, drafter.unseen(r, len(text) - drafted), drafted)
        self.texts.move_to_end(text)
        while sum(map(len, self.texts)) > self.room:
            self.texts.popitem(last=False)


class Reader:
    """Reads the prompt of a row in pieces, so that the rounds of others go on in between."""

    def __init__(self, target: Target, drafter: Drafter, row: Row, texts: KeptTexts):
        self.target, self.row, self.texts = target, row, texts
        self.cache, self.drafter = target.new_cache(1), drafter.alone()
        texts.load([row], [0], self.cache, self.drafter)

    def read(self, count: int) -> None:
        """The next `count` tokens, by target and head."""
        piece, device = self.row.prompt[:count], self.target.device
        passed = self.target.forward(on_device([piece], device), self.cache, on_device([0], device))
        self.cache.commit([len(piece)])
        self.drafter.read(None, passed.features, [len(piece)])
        read = self.row.cached + len(piece)
        states, draft = take_row(self.cache, 0, read, copy=False), self.drafter.states(0, copy=False)
        self.texts.know(self.row, RowPast(states, draft, passed.features[0, :0], read), read)


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def beginning(past: RowPast, count: int) -> RowPast:
    """What is known of the first `count` tokens."""
    drafted, features = min(count, past.drafted), past.features[: max(0, count - past.drafted)]
    # Of the last tokens that the head has read, some may be behind those.
    kept = past.draft[0][0].shape[1] - (past.drafted - drafted) if past.draft else 0
    return RowPast(_first(past.target, count), _first(past.draft, kept) if kept > 0 else [], features, drafted)


def _first(states: States, count: int) -> States:
    return [(keys[:, :count], values[:, :count]) for keys, values in states]
