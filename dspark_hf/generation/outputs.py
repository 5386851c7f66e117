"""Scores, logits, hidden states and attentions of a generation, one entry a token, as plain `generate` gives them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig

from .target import TargetOutput

Layers = tuple[torch.Tensor, ...]


@dataclass
class Recorder:
    """Collects what the generation config asks for. Entries of a row after its end are zeros.

    scores, logits: per row a list of [V]. hidden_states, attentions: per row a list of tuples over the layers, of
    [q, d] and [heads, q, keys]; q is the prompt's width for the first token and 1 for the others. active: whether
    anything is asked for.
    """

    config: GenerationConfig
    rows: int
    scores: list[list[torch.Tensor]] = field(init=False)
    logits: list[list[torch.Tensor]] = field(init=False)
    hidden_states: list[list[Layers]] = field(init=False)
    attentions: list[list[Layers]] = field(init=False)
    active: bool = field(init=False)

    def __post_init__(self):
        names = ("scores", "logits", "hidden_states", "attentions")
        for name in names:
            setattr(self, name, [[] for _ in range(self.rows)])
        self.active = any(map(self.wants, names))

    def wants(self, name: str) -> bool:
        return bool(self.config.return_dict_in_generate and getattr(self.config, f"output_{name}"))

    def record(
        self, row: int, r: int, count: int, passed: TargetOutput, processed: torch.Tensor, columns: Sequence[int]
    ) -> None:
        """Add `count` tokens of a row.

        Args:
            r: the row's place in the pass. processed: [R, n, V], the logits after processors.
            columns: where the row's cached tokens and the tokens of the pass lie in plain generate's layout.
        """
        for j in range(count):
            if self.wants("scores"):
                self.scores[row].append(_own(processed[r, j]))
            if self.wants("logits"):
                self.logits[row].append(_own(passed.logits[r, j]))
        tokens = passed.features.shape[1]
        if self.wants("hidden_states"):
            self.hidden_states[row] += [
                tuple(x[r, j : j + 1].clone() for x in passed.hidden_states) for j in range(count)
            ]
        if self.wants("attentions"):
            before = len(columns) - tokens
            self.attentions[row] += [
                tuple(
                    _spread(x[r, :, j : j + 1, : before + j + 1], columns[: before + j + 1]) for x in passed.attentions
                )
                for j in range(count)
            ]

    def record_prefill(
        self,
        row: int,
        r: int,
        passed: TargetOutput,
        processed: torch.Tensor,
        columns: Sequence[int],
        new: int,
        width: int,
    ) -> None:
        """Add the first token, whose hidden states and attentions are those of the whole prompt.

        Args:
            columns: of all tokens of the prompt, cached ones included; the last `new` were in the pass.
            width: of the prompt that was not cached, padding included.
        """
        if self.wants("scores"):
            self.scores[row].append(_own(processed[r, 0]))
        if self.wants("logits"):
            self.logits[row].append(_own(passed.logits[r, 0]))
        queries = torch.tensor(columns[-new:]) - (columns[-1] + 1 - width)
        if self.wants("hidden_states"):
            self.hidden_states[row].append(tuple(_placed(x[r, :new], queries, width, 0) for x in passed.hidden_states))
        if self.wants("attentions"):
            spread = (_spread(x[r, :, :new, : len(columns)], columns) for x in passed.attentions)
            self.attentions[row].append(tuple(_placed(x, queries, width, 1) for x in spread))

    def collect(self) -> dict[str, tuple]:
        """Fields of the output, each a tuple over tokens of tensors (or tuples over layers) of all rows."""
        found = {}
        for name in ("scores", "logits"):
            if self.wants(name):
                found[name] = tuple(torch.stack(entry) for entry in _by_token(getattr(self, name)))
        for name in ("hidden_states", "attentions"):
            if self.wants(name):
                found[name] = tuple(
                    tuple(map(torch.stack, zip(*entry, strict=True))) for entry in _by_token(getattr(self, name))
                )
        return found


def _by_token(rows: list[list]) -> Iterator[list]:
    """Entries of all rows, token by token; zeros where a row has ended."""
    for i in range(max(map(len, rows))):
        sample = next(row[i] for row in rows if i < len(row))
        nothing = tuple(map(torch.zeros_like, sample)) if isinstance(sample, tuple) else torch.zeros_like(sample)
        yield [row[i] if i < len(row) else nothing for row in rows]


def _own(logits: torch.Tensor) -> torch.Tensor:
    """A copy in float32: a view would keep what was rejected, and other rows', alive with it."""
    return logits.to(torch.float32, copy=True)


def _spread(x: torch.Tensor, columns: Sequence[int]) -> torch.Tensor:
    """[heads, q, keys] with keys in slots -> [heads, q, columns[-1] + 1] with keys at their columns."""
    if len(columns) == columns[-1] + 1:
        return x.clone()
    return _placed(x, torch.tensor(columns), columns[-1] + 1, 2)


def _placed(x: torch.Tensor, index: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = width
    return x.new_zeros(shape).index_copy_(dim, index.to(x.device), x)
