"""Rounds that a compiler has captured: `generate(..., assistant_model=head, cache_implementation="static")`.

Run eagerly, a small layer costs the host more than the device. Captured, a round is two calls: `draft_pass` is the
context projection, the backbone, the whole sequential chain and the confidence; `verify_pass` is the target, the
processors, acceptance and the choice of the next anchor. What a row is, and how long, stays with the engine, so that a
round that cannot be captured is run eagerly in between.

There are few shapes. Rows come in powers of two, drafts are whole blocks, verify widths have three tiers, and a call
has one view, a power of two that holds its longest row at its end. Each shape is captured when a call first needs it,
unless a larger one is there, which then serves: no call waits for a compiler in the middle of its text twice.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process as stock
from transformers.utils import logging

from ..modeling_dspark import ContinueDrafting, DraftBlock, DSparkHead, Select
from ..scheduling.plan import Plan
from . import round as rounds
from .acceptance import Verdict
from .cache import SMALLEST_CAPACITY, on_device
from .drafting import Drafter, block_masks
from .processors import OF_LOGITS, BlockProcessors
from .round import RoundState, VerifyLayout
from .stopping import Stopping
from .target import Target, TargetPass

logger = logging.get_logger(__name__)

# Where transformers compiles by itself; elsewhere it wants to be asked.
COMPILING_DEVICES = ("cuda", "xpu", "neuron", "tpu")
# Processors of logits whose work depends on values: TopH searches, Eta builds a distribution that checks itself.
NOT_CAPTURED = {stock.EtaLogitsWarper, stock.TopHLogitsWarper}
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
    drafter: Drafter, anchors: torch.Tensor, features: torch.Tensor, table: torch.Tensor, select: Select, view: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Tokens [T, gamma] of a whole block, the logits that they were sampled from, and those of confidence.

    Args:
        anchors: [T]. features: [T, C, m*d], target states that the head has not read, of row r the first counts[r].
        table: [3, T], tokens in the draft cache, counts, and the first token that the head knows. view: slots.
    """
    head, cache, size = drafter.head, drafter.cache, drafter.head.config.block_size
    start, count, first = table[:, :, None].unbind()
    end, slots = start + count, torch.arange(view, device=table.device)
    context = start + slots[: features.shape[1]]
    block = end + slots[:size]
    # As in an eager draft, what lies beyond a row's count goes to a slot that nobody sees.
    places = torch.cat([context.where(context < end, view - 1), block], dim=1)
    cache.place_at(places, view)
    hidden = head.backbone(
        head.embed_block(anchors, drafter.tables),
        head.project_context(features),
        torch.cat([context, block], dim=1),
        block_masks(head, slots, end, slots >= first),
        cache,
    )
    drafted = head.sample_block(hidden, anchors, drafter.tables, head.config.gamma, select)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drafts accepted [T], the next anchors [T], and the states [T, width, m*d] for the head.

    Args:
        anchors: [T]. drafts: [T, gamma]. sampled_from: [T, gamma, V], `None` when they are the argmax.
        table: [2, T], tokens in the cache, and drafts to verify. width: tokens a row. view: slots.
    """
    tokens = anchors[:, None] if drafts is None else torch.cat([anchors[:, None], drafts[:, : width - 1]], dim=1)
    placement = cache.place_at(table[0][:, None] + torch.arange(width, device=table.device), view)
    outputs = target.run(tokens, placement.slots, placement, cache)
    logits = processors(outputs.logits.float(), None)
    if drafts is None:
        accepted, following = torch.zeros_like(table[0]), processors.choose(logits[:, 0])
    else:
        verdict = rounds.verdict_of(logits, tokens[:, 1:], sampled_from, table[1])
        accepted, following = verdict.accepted, verdict.next_tokens
    return accepted, following, target.features_of(outputs)


# -- Graphs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What a graph is for.

    kind: "draft" or "verify".
    rows: lines of its tensors.
    width: tokens of each.
    view: slots that attention sees.
    choice: how tokens are chosen, see `choice_of`.
    options: of the compiler.
    """

    kind: str
    rows: int
    width: int
    view: int
    choice: tuple
    options: str


class Graphs:
    """The captured passes of a pair.

    Attributes:
        made: of every shape what runs it. wished: shapes in whose place calls ran larger ones; the next one that could
            use them captures them before it begins. refused: why the pair cannot be captured, `None` if it can.
    """

    def __init__(self):
        self.made: dict[Shape, Callable] = {}
        self.wished: set[Shape] = set()
        self.refused: str | None = None

    def serving(self, wanted: Shape) -> Shape:
        """The smallest captured shape that does what is wanted, else this one itself."""
        larger = [
            shape
            for shape in self.made
            if (shape.kind, shape.view, shape.choice, shape.options)
            == (wanted.kind, wanted.view, wanted.choice, wanted.options)
            and shape.rows >= wanted.rows
            and shape.width >= wanted.width
        ]
        return min(larger, key=lambda shape: (shape.rows, shape.width), default=wanted)

    def view_for(self, tokens: int) -> int:
        """Slots for rows of so many tokens: those of graphs that are there, or else a power of two."""
        own = max(SMALLEST_CAPACITY, power_of_two(tokens))
        return min((shape.view for shape in self.made if own <= shape.view <= MOST_VIEW * own), default=own)

    def run(self, shape: Shape, body: Callable, options: dict[str, Any], *args: Any) -> tuple:
        """What `body` returns, captured if that was not done yet."""
        if shape in self.made:
            return self.made[shape](*args)
        # The compiler keeps, and counts, what it made by code: every shape has one of its own.
        own = FunctionType(body.__code__.replace(co_name=f"{shape.kind}_pass"), body.__globals__)
        graph, started = torch.compile(own, fullgraph=True, dynamic=False, **options), time.perf_counter()
        found = graph(*args)
        self.made[shape] = graph
        logger.info(
            f"Captured a {shape.kind} pass of {shape.rows} x {shape.width} tokens over {shape.view} slots in "
            f"{time.perf_counter() - started:.1f} s."
        )
        return found


_graphs: WeakKeyDictionary[DSparkHead, WeakKeyDictionary[PreTrainedModel, Graphs]] = WeakKeyDictionary()


def graphs_of(head: DSparkHead, target: PreTrainedModel) -> Graphs:
    """The captured passes of a pair, which are kept as long as both models."""
    by_target = _graphs.setdefault(head, WeakKeyDictionary())
    if target not in by_target:
        by_target[target] = Graphs()
    return by_target[target]


# -- Whether --------------------------------------------------------------------------------------------------------


def compile_options(config: GenerationConfig, device: torch.device) -> dict[str, Any] | None:
    """What the compiler is called with where a call asks for static caches, under the conditions under which plain
    `generate` compiles; `None` where it would not. On a CPU a `compile_config` that was passed asks for it."""
    given = config.compile_config
    if not getattr(config, "_dspark_static", False) or config.disable_compile:
        return None
    if given is None and device.type not in COMPILING_DEVICES:
        return None
    options = (given or CompileConfig()).to_dict()
    return {name: options[name] for name in ("backend", "mode", "options") if options.get(name) is not None}


def reason_for_eager(
    target: Target, drafter: Drafter, processors: LogitsProcessorList, lockstep: bool, records: bool, stopping: Stopping
) -> str | None:
    """Why the rounds of a call cannot be captured, a clause; `None` if they can.

    Args:
        lockstep: see there. records: whether outputs are recorded.
    """
    model, foreign = target.model, [type(p).__name__ for p in processors if type(p) not in OF_LOGITS - NOT_CAPTURED]
    quantizer, places = getattr(model, "hf_quantizer", None), set(getattr(model, "hf_device_map", {}).values())
    reasons = {
        "scores, logits, hidden states or attentions are returned": records,
        "processors or criteria must be called as plain decoding calls them": lockstep,
        f"{', '.join(foreign)} look at more than logits": bool(foreign),
        "there is no limit to the length of the text": stopping.max_length is None,
        "the rotary embedding goes by the length of the text": bool(target.growing),
        f"attention is {target.implementation!r}": target.implementation == "flex_attention",
        "the model is compiled already": model._compiled_call_impl is not None,
        "the model is split over processes": (model.tp_size or 1) > 1,
        "quantised weights cannot be compiled": quantizer is not None and not quantizer.is_compileable,
        "weights are offloaded": bool(places & {"cpu", "disk"}) and len(places) > 1,
        f"the head is on {drafter.device}, not {target.device}": drafter.device != target.device,
    }
    refused = graphs_of(drafter.head, model).refused
    return next((reason for reason, holds in reasons.items() if holds), refused)


def choice_of(processors: Sequence[LogitsProcessor], do_sample: bool) -> tuple:
    """What of the choice of tokens is part of a graph: all but the fractions among its settings, see `buffered`."""
    settings = [
        (type(own).__name__, *((k, v) for k, v in sorted(vars(own).items()) if isinstance(v, (bool, int, str))))
        for own in processors
    ]
    return do_sample, *settings


def buffered(processors: Sequence[LogitsProcessor], device: torch.device) -> LogitsProcessorList:
    """Processors whose fractions (temperature, top-p) are tensors, so that one graph serves all."""
    copies = LogitsProcessorList(map(copy.copy, processors))
    for own in copies:
        for name, value in vars(own).items():
            if isinstance(value, float):
                setattr(own, name, torch.tensor(value, device=device))
    return copies


# -- Passes ---------------------------------------------------------------------------------------------------------


class CompiledPasses:
    """Draft and verify as `round.draft` and `round.verify`, captured.

    Args:
        slots: rows of the call, at most. tokens: of its longest row at the end.

    Attributes:
        captured: whether the last pass, or the one before, was captured then, so that its time says nothing.
    """

    def __init__(
        self,
        options: dict[str, Any],
        target: Target,
        drafter: Drafter,
        processors: LogitsProcessorList,
        do_sample: bool,
        slots: int,
        tokens: int,
    ):
        self.graphs = graphs = graphs_of(drafter.head, target.model)
        self.options, self.target, self.slots, target.captured = options, target, power_of_two(slots), True
        # Behind a row there are a block, and the slot that nobody sees.
        self.view = graphs.view_for(tokens + drafter.head.config.block_size + 1)
        self.processors = BlockProcessors(buffered(processors, target.device), do_sample)
        self.processors.temperature = None
        self.select = self.processors.drafting(None)
        self.shape = Shape("", 0, 0, self.view, choice_of(processors, do_sample), repr(sorted(options.items())))
        self.tiers = [1 + drafts for drafts in draft_tiers(drafter.head.config.gamma)]
        self.wishes: set[Shape] = set()
        self.captured = self.began = False
        self.drafts: torch.Tensor | None = None
        self.sampled_from: torch.Tensor | None = None

    def draft(
        self, state: RoundState, plan: Plan, select: Select, continue_drafting: ContinueDrafting | None = None
    ) -> DraftBlock | None:
        """As `round.draft`; the block has drafts for every row."""
        self.captured, self.drafts = False, None
        if not plan.rows or self.graphs.refused:
            return rounds.draft(state, plan, select, continue_drafting)
        drafter, rows = state.drafter, len(state.anchors)
        shape = self._shape("draft", rows, drafter.head.config.gamma)
        features, counts = self._unread(drafter, shape.rows)
        values = [drafter.cache.lengths, counts, drafter.first]
        table = on_device([own + [0] * (shape.rows - rows) for own in values], drafter.device)
        drafter.cache.show(shape.rows)
        args = drafter, _padded(state.anchors, shape.rows), features, table, self.select, self.view
        found = self._run(shape, draft_pass, *args)
        if found is None:
            drafter.append(features[:rows], counts)
            return rounds.draft(state, plan, select, continue_drafting)
        drafter.cache.commit(counts)
        self.drafts, self.sampled_from, confidence = found
        parts = (None if x is None else x[:rows, : plan.length] for x in (self.drafts, self.sampled_from, confidence))
        return DraftBlock(*parts)

    def verify(
        self,
        state: RoundState,
        target: Target,
        block: DraftBlock | None,
        layout: VerifyLayout,
        read_at: torch.Tensor | None,
    ) -> tuple[TargetPass, torch.Tensor | None]:
        """As `round.verify`, with a verdict."""
        if self.graphs.refused or (layout.most and self.drafts is None):
            return rounds.verify(state, target, block, layout, read_at)
        rows, drafts = len(state.anchors), self.drafts if layout.most else None
        width = next(tier for tier in self.tiers if tier > layout.most)
        wanted = self._shape("verify", rows, width)
        self._capture_wishes(state, wanted)
        found = self._verify(state, wanted, drafts, layout.verify_lens)
        if found is None:
            return rounds.verify(state, target, block, layout, read_at)
        accepted, following, features = (x[:rows] for x in found)
        return TargetPass(None, features, verdict=Verdict(accepted, following)), None

    def close(self) -> None:
        """Tell the next calls what this one would have used."""
        self.graphs.wished |= self.wishes

    def _verify(self, state: RoundState, shape: Shape, drafts: torch.Tensor | None, lengths: torch.Tensor | None):
        rows, cache = len(state.anchors), state.cache
        known = on_device(cache.lengths + [0] * (shape.rows - rows), self.target.device)
        counts = torch.zeros_like(known) if lengths is None else _padded(lengths, shape.rows)
        drafts = None if drafts is None else _padded(drafts, shape.rows)
        sampled_from = None if drafts is None or self.sampled_from is None else _padded(self.sampled_from, shape.rows)
        cache.show(shape.rows)
        table, anchors = torch.stack([known, counts]), _padded(state.anchors, shape.rows)
        args = cache, anchors, drafts, sampled_from, table, self.processors, shape.width, self.view
        return self._run(shape, verify_pass, self.target, *args)

    def _shape(self, kind: str, rows: int, width: int) -> Shape:
        """What serves so many rows and tokens a row. Where nothing does yet it is captured for all rows of the call;
        where something wider does, the next call may have its own."""
        choice, options = self.shape.choice, self.shape.options
        wanted = Shape(kind, power_of_two(rows), width, self.view, choice, options)
        found = self.graphs.serving(wanted)
        if found not in self.graphs.made or found.rows > self.slots:
            return Shape(kind, self.slots, width, self.view, choice, options)
        if found.width > width:
            self.wishes.add(Shape(kind, self.slots, width, self.view, choice, options))
        return found

    def _capture_wishes(self, state: RoundState, shape: Shape) -> None:
        """Capture what earlier calls wished for, before the first round with drafts. Behind what is committed a pass
        changes nothing that is looked at."""
        if self.began or self.drafts is None:
            return
        self.began = True
        lengths = torch.zeros_like(state.anchors)
        for wish in [own for own in self.graphs.wished if own.rows == self.slots and _same_but_width(own, shape)]:
            self.graphs.wished.discard(wish)
            if wish not in self.graphs.made:
                self._verify(state, wish, self.drafts if wish.width > 1 else None, lengths)

    def _unread(self, drafter: Drafter, rows: int) -> tuple[torch.Tensor, list[int]]:
        """Target states that the head has not read, [rows, gamma + 1, m*d] with the counts. Longer ones, such as a
        prompt's, are read at once."""
        width, present = drafter.head.config.gamma + 1, len(drafter.num_pending)
        if max(drafter.num_pending) > width or not drafter.cache.layers[0].is_initialized:
            drafter.read(None, *drafter.take(None))
        if not drafter.pending:
            empty = torch.zeros(rows, width, drafter.head.fc.in_features, dtype=drafter.dtype, device=drafter.device)
            return empty, [0] * present
        features, counts = drafter.take(None)
        return pad(features, (0, 0, 0, width - features.shape[1], 0, rows - present)), counts

    def _run(self, shape: Shape, body: Callable, *args: Any) -> tuple | None:
        """What a captured pass returns; `None` where it cannot be captured, which is said once."""
        new = shape not in self.graphs.made
        try:
            with self.target.in_our_attention():
                if self.target.device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                found = self.graphs.run(shape, body, self.options, *args)
        except Exception as error:  # whatever a compiler may raise about somebody's model
            if not new:
                raise
            self.graphs.refused = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            logger.warning_once(
                f"The rounds of {type(self.target.model).__name__} cannot be compiled and run eagerly "
                f"({self.graphs.refused}). The text is the same."
            )
            return None
        self.captured |= new
        if self.target.device.type == "cuda":
            # The next replay writes to the same places.
            return tuple(None if x is None else x.clone() for x in found)
        return found


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """With zeros behind, up to so many rows."""
    return x[:rows] if len(x) >= rows else pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x)))


def _same_but_width(a: Shape, b: Shape) -> bool:
    return (a.kind, a.view, a.choice, a.options) == (b.kind, b.view, b.choice, b.options)
