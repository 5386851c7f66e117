"""The host's side of rows: what each was given, what it has committed, and where its tokens lie in plain's layout."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .processors import BlockProcessors
from .releases import CACHE
from .stopping import Stopping


@dataclass(eq=False)
class Row:
    """One sequence.

    index: place in the batch.
    given: its `input_ids` as plain generate holds them, padding included.
    prompt: the tokens of it that are neither padding nor cached, or read ahead of the rest.
    prompt_columns: columns of cached and prompt tokens in plain's layout (one column a token, padding included).
    cached: how many of them are cached.
    width: columns of cache and prompt together.
    processors, stopping: how its tokens are chosen, and where it ends.
    seed: what its random numbers come from; torch's own generator when `None`.
    lag: how far its positions are behind those of the batch's longest row, column by column.
    committed: new tokens so far.
    ended: whether there will be no more.
    error: what went wrong with it.
    """

    index: int
    given: list[int]
    prompt: list[int]
    prompt_columns: list[int]
    cached: int
    width: int
    processors: BlockProcessors
    stopping: Stopping
    seed: int | None = None
    lag: int = 0
    committed: list[int] = field(default_factory=list)
    ended: bool = False
    error: str | None = None

    @property
    def sequence(self) -> list[int]:
        """The tokens as plain generate holds them."""
        return self.given + self.committed

    @property
    def length(self) -> int:
        """How many these are."""
        return len(self.given) + len(self.committed)

    def kept(self, committed: list[int], device: torch.device) -> tuple[list[int], bool]:
        """Of tokens behind its own those up to its end, and whether that is among them."""
        return self.stopping.kept(committed, self.length, lambda: self.sequence, device)

    @property
    def anchor_column(self) -> int:
        """Column of the last token."""
        return self.width + len(self.committed) - 1 if self.committed else self.prompt_columns[-1]

    @property
    def tokens(self) -> list[int]:
        """All its tokens without padding; needs them to have been given, cached ones too."""
        return [self.given[column] for column in self.prompt_columns] + self.committed

    @property
    def columns(self) -> list[int]:
        """Column of every token, new ones included."""
        return self.prompt_columns + list(range(self.width, self.width + len(self.committed)))


class Streaming:
    """Hands tokens to the caller's streamer: of a single row what each round commits, of a batch as plain `generate`
    does, one token of every row at a time, [R], ended rows padded."""

    def __init__(self, streamer: Any, rows: list[Row], pad: int):
        self.streamer, self.rows, self.pad = streamer, rows, pad
        self.given = 0

    @torch.inference_mode(False)
    def put(self) -> None:
        """Give what has become complete."""
        longest = max(len(row.committed) for row in self.rows)
        ready = min((len(row.committed) for row in self.rows if not row.ended), default=longest)
        tokens = [row.committed[self.given : ready] for row in self.rows]
        if len(self.rows) == 1:
            self.streamer.put(torch.tensor(tokens[0]))
        else:
            for column in itertools.islice(itertools.zip_longest(*tokens, fillvalue=self.pad), ready - self.given):
                self.streamer.put(torch.tensor(column))
        self.given = ready

    def end(self) -> None:
        self.streamer.end()


def read_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cached: int,
    width: int,
    processors: BlockProcessors,
    stopping: Stopping,
) -> list[Row]:
    """Rows of a `generate` call.

    Args:
        input_ids: [R, P]. attention_mask: [R, width], `None` when nothing is padding. cached: columns that a given
            cache holds. width: columns of cache and prompt together; equal to P unless only new tokens were passed.

    Raises:
        ValueError: when a row has no token to go on from, or that is not in the last column.
    """
    offset = width - input_ids.shape[1]
    masks: Sequence[list[int]] = [[1] * width] * len(input_ids) if attention_mask is None else attention_mask.tolist()
    rows = []
    for index, (given, mask) in enumerate(zip(input_ids.tolist(), masks, strict=True)):
        columns = [column for column, on in enumerate(mask) if on]
        known = sum(column < cached for column in columns)
        if known == len(columns):
            raise ValueError(
                f"Prompt {index} of the batch has no tokens to go on from: its attention mask lets through "
                f"{len(columns)}, of which {known} are in `{CACHE}` already."
            )
        if columns[-1] != width - 1:
            raise ValueError(
                f"Prompt {index} of the batch is padded on the right, and plain `generate` would go on behind the "
                'padding. Set `tokenizer.padding_side = "left"`.'
            )
        prompt = [given[c - offset] for c in columns[known:]]
        rows.append(Row(index, given, prompt, columns, known, width, processors, stopping))
    longest = max(len(row.prompt_columns) for row in rows)
    for row in rows:
        row.lag = longest - len(row.prompt_columns)
    return rows
