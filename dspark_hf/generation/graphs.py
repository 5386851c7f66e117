"""Graphs: what of a round is captured, for which shapes, and how long that is kept; see `compiled`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..modeling_dspark import DraftSampler, DSparkHead
from . import round as rounds
from .cache import SlotCache
from .drafting import Drafter, block_masks, laid_out
from .processors import BlockProcessors
from .target import Target, at_most_float32

# A graph of a longer view serves, unless attention would look at more than so many times what a call can need.
MOST_VIEW = 4


def draft_tiers(gamma: int) -> list[int]:
    """Drafts a row that captured rounds verify: none, half a block, a block."""
    return sorted({0, gamma // 2, gamma})


def power_of_two(number: int) -> int:
    """The smallest that is not below a number."""
    return 1 << (number - 1).bit_length()


# -- What is captured ---------------------------------------------------------------------------------------------


def draft_pass(
    drafter: Drafter,
    anchors: torch.Tensor,
    features: torch.Tensor,
    table: torch.Tensor,
    sampler: DraftSampler,
    view: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Tokens [T, gamma] of a whole block, the logits that they were sampled from, and those of confidence.

    Args:
        anchors: [T]. features: [T, C, m*d], target states that the head has not read.
        table: [3, T], tokens in the draft cache, tokens with those of `features`, and the first token that the head
            knows. view: slots.
    """
    head, cache, size = drafter.head, drafter.cache, drafter.head.config.block_size
    start, end, first = table[:, :, None].unbind()
    positions, places = laid_out(start, end, features.shape[1], size, view - 1, drafter.ring)
    cache.place_at(places, view)
    hidden = head.backbone(
        head.embed_block(anchors, drafter.embeddings),
        head.project_context(features),
        positions,
        block_masks(head, end, first, view, drafter.window, drafter.ring),
        cache,
    )
    drafted = head.sample_block(hidden, anchors, drafter.embeddings, head.config.gamma, sampler)
    return drafted.tokens, drafted.logits, drafted.confidence_logits


def verify_pass(
    target: Target,
    cache: Any,
    anchors: torch.Tensor,
    drafts: torch.Tensor | None,
    sampled_from: torch.Tensor | None,
    table: torch.Tensor,
    processors: BlockProcessors,
    width: int,
    view: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drafts accepted [T], the next anchors [T], the states [T, width, m*d] for the head, and the tokens in the cache
    [T] once what was accepted is committed.

    Args:
        anchors: [T]. drafts: [T, gamma]. sampled_from: [T, gamma, V], `None` when they are the argmax.
        table: [2, T], tokens in the cache, and drafts to verify. width: tokens a row. view: slots.
    """
    tokens = anchors[:, None] if drafts is None else torch.cat([anchors[:, None], drafts[:, : width - 1]], dim=1)
    drafted, tokens = tokens[:, 1:], tokens.clamp(min=0)
    placement = cache.place_at(table[0][:, None] + torch.arange(width, device=table.device), view)
    outputs = target.run(tokens, placement.slot_mapping, placement, cache)
    logits = processors(at_most_float32(outputs.logits), None)
    if drafts is None:
        accepted, following = torch.zeros_like(table[0]), processors.choose(logits[:, 0])
    else:
        verdict = rounds.verdict_of(logits, drafted, sampled_from, table[1])
        accepted, following = verdict.accepted, verdict.next_tokens
    return accepted, following, target.features_of(outputs), table[0] + 1 + accepted


# -- Graphs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What captured passes are for.

    rows: lines of their tensors.
    view: slots that attention sees.
    choice: how tokens are chosen, see `choice_of`.
    options: of the compiler and of every pass of the target, types, device.
    """

    rows: int
    view: int
    choice: tuple
    options: str


@dataclass(frozen=True)
class Passes:
    """The captured passes of a shape. rows: their lines. draft: of a whole block. verify: of so many tokens a row."""

    rows: int
    draft: Callable
    verify: dict[int, Callable]


class Graphs:
    """The captured passes of a pair.

    Attributes:
        made: of every shape. caches: those of target and head that no call uses, by their shape: CUDA graphs want them
            where they were. refused: why the pair cannot be captured, `None` if it can.
    """

    def __init__(self):
        self.made: dict[Shape, Passes] = {}
        self.caches: dict[Shape, tuple[SlotCache, SlotCache]] = {}
        self.refused: str | None = None
        self.structure: tuple | None = None

    def check(self, structure: tuple) -> None:
        """Drop what is known of models that have changed since; see there."""
        if self.structure != structure:
            self.made, self.caches, self.refused = {}, {}, None

    @property
    def count(self) -> int:
        return sum(1 + len(passes.verify) for passes in self.made.values())

    def fitting(self, shape: Shape) -> Shape:
        """The shape, or one with a longer view that is there."""
        longer = (own for own in self.made if shape.view <= own.view <= MOST_VIEW * shape.view)
        same = (own for own in longer if replace(own, view=shape.view) == shape)
        return min(same, key=lambda own: own.view, default=shape)

    def serving(self, rows: int, shape: Shape) -> Passes:
        """The passes of the fewest lines, of those of `shape` at most, that are enough for so many rows."""
        enough = (own for own in self.made if rows <= own.rows <= shape.rows and replace(own, rows=shape.rows) == shape)
        return self.made[min(enough, key=lambda own: own.rows)]


def captured(body: Callable, options: dict[str, Any], name: str) -> Callable:
    """What runs `body` compiled, without a break, for the one shape of its first call.

    The compiler keeps, and counts, what it made by code: every pass has code of its own.
    """
    own = FunctionType(body.__code__.replace(co_name=name), body.__globals__)
    # The compiler takes out of the dictionary what is not for its backend.
    settings = dict(options["options"])
    return torch.compile(own, fullgraph=True, dynamic=False, backend=options["backend"], options=settings)


def few_guards(entries: Sequence[Any]) -> list[bool]:
    """Which of a compiler's guards are looked at before every pass: torch's global state, autocast for one, and the
    tensors that a pass is given. All else that a graph depends on is in its `Shape` and in `structure`."""
    given = [entry.guard_type == "TENSOR_MATCH" and "." not in entry.name for entry in entries]
    return [own or entry.guard_type == "GLOBAL_STATE" for own, entry in zip(given, entries, strict=True)]


_graphs: WeakKeyDictionary[DSparkHead, WeakKeyDictionary[PreTrainedModel, Graphs]] = WeakKeyDictionary()


def graphs_of(head: DSparkHead, target: PreTrainedModel) -> Graphs:
    """The captured passes of a pair, which are kept as long as both models."""
    by_target = _graphs.setdefault(head, WeakKeyDictionary())
    if target not in by_target:
        by_target[target] = Graphs()
    return by_target[target]
