"""Rounds that a compiler has captured: `generate(..., assistant_model=head, cache_implementation="static")`.

Run eagerly, a small layer costs the host more than the device. Captured, a round is two calls: `draft_pass` is the
context projection, the backbone, the whole sequential chain and the confidence; `verify_pass` is the target, the
processors, acceptance and the choice of the next anchor. What a row is, and how long, stays with the engine, so that a
round that cannot be captured is run eagerly in between.

There are few shapes. Rows come in powers of two, drafts are whole blocks, verify widths have three tiers, and a call
has one view, a power of two that holds its longest row at its end. A call whose rows and view are new captures all that
it may need before it begins to draft, so that no text waits for a compiler in its middle; calls with fewer rows left,
or shorter ones, use what is there.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as stock
from transformers.utils import logging

from ..modeling_dspark import DraftBlock, DraftSampler
from ..scheduling.plan import Plan
from . import round as rounds
from .acceptance import Verdict
from .cache import SMALLEST_CAPACITY, on_device
from .drafting import Drafter
from .graphs import (
    Passes,
    Shape,
    captured,
    draft_pass,
    draft_tiers,
    few_guards,
    graphs_of,
    power_of_two,
    verify_pass,
)
from .modules import is_stock, structure
from .processors import OF_LOGITS, BlockProcessors
from .round import RoundState, VerifyLayout
from .stopping import Stopping
from .target import Part, Target, TargetOutput

logger = logging.get_logger(__name__)

# Where transformers compiles by itself; elsewhere it wants to be asked.
COMPILING_DEVICES = ("cuda", "xpu", "neuron", "tpu")
# Processors of logits whose work depends on values: TopH searches, Eta builds a distribution that checks itself.
NOT_CAPTURED = {stock.EtaLogitsWarper, stock.TopHLogitsWarper}


# -- Whether --------------------------------------------------------------------------------------------------------


def compile_options(config: GenerationConfig, device: torch.device) -> dict[str, Any] | None:
    """What the compiler is called with where a call asks for static caches, under the conditions under which plain
    `generate` compiles; `None` where it would not. On a CPU a `compile_config` that was passed asks for it; of it
    backend, mode and options count, as every pass is one graph of fixed shapes in any case."""
    given = config.compile_config
    if not getattr(config, "_dspark_static", False) or config.disable_compile:
        return None
    if given is None and device.type not in COMPILING_DEVICES:
        return None
    options = (given or CompileConfig()).to_dict()
    mode, settings = options["mode"], dict(options["options"] or {})
    if mode is not None and options["backend"] == "inductor":
        # The compiler takes one or the other.
        settings |= torch._inductor.list_mode_options(mode)
    return {"backend": options["backend"], "options": settings}


def reason_for_eager(
    target: Target,
    drafter: Drafter,
    processors: LogitsProcessorList,
    stopping: Stopping,
    lockstep: bool,
    records: bool,
    pictures: bool,
) -> str | None:
    """Why the rounds of a call cannot be captured, a clause; `None` if they can.

    Args:
        lockstep: see there. records: whether outputs are recorded. pictures: whether the prompts hold any.
    """
    model, foreign = target.model, [type(p).__name__ for p in processors if type(p) not in OF_LOGITS - NOT_CAPTURED]
    quantizer, places = getattr(model, "hf_quantizer", None), set(getattr(model, "hf_device_map", {}).values())
    reasons = {
        "scores, logits, hidden states or attentions are returned": records,
        "processors or criteria must be called as plain decoding calls them": lockstep,
        f"{', '.join(foreign)} look at more than logits": bool(foreign),
        "there is no limit to the length of the text": stopping.max_length is None,
        "the rotary embedding goes by the length of the text": bool(target.growing),
        "its layers keep a recurrent state": target.is_stateful,
        "positions behind pictures do not count tokens": pictures,
        f"attention is {target.implementation!r}": target.implementation == "flex_attention",
        "the model is compiled already": model._compiled_call_impl is not None,
        "the model is split over processes": (model.tp_size or 1) > 1,
        "quantised weights cannot be compiled": quantizer is not None and not quantizer.is_compileable,
        "weights are offloaded": bool(places & {"cpu", "disk"}) and len(places) > 1,
        f"the head is on {drafter.device}, not {target.device}": drafter.device != target.device,
    }
    graphs = graphs_of(drafter.head, model)
    graphs.check(structure(drafter.head, model))
    return next((reason for reason, holds in reasons.items() if holds), graphs.refused)


def choice_of(processors: Sequence[LogitsProcessor], do_sample: bool) -> tuple:
    """What of the choice of tokens is part of a graph: all but the values of tensors among its settings, and of
    fractions, which become tensors; see `buffered`."""

    def part(value: Any) -> str:
        return str(tuple(value.shape)) if torch.is_tensor(value) else "" if isinstance(value, float) else repr(value)

    settings = ((type(own).__name__, *((k, part(v)) for k, v in sorted(vars(own).items()))) for own in processors)
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
        captured: whether that was done in the present round, so that its time says nothing. trusts: whether nobody
            looks before a pass at what its graph depends on.
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
        head, self.graphs = drafter.head, graphs_of(drafter.head, target.model)
        self.target, self.slots, target.captured = target, power_of_two(slots), True
        settings = target.implementation, target.dtype, drafter.dtype, target.device, drafter.window
        key = repr((sorted(options.items()), sorted(target.options.items()), settings))
        self.trusts = is_stock(head, target.model)
        if self.trusts:
            # Their modules are looked at once a call, by `structure`, and not before every pass, which takes longer
            # than all else that the host does.
            options = options | {"options": options["options"] | {"guard_filter_fn": few_guards}}
        self.options = options
        # Behind a row there are a block, and the slot that nobody sees.
        view = max(SMALLEST_CAPACITY, power_of_two(tokens + head.config.block_size + 1))
        self.processors = BlockProcessors(buffered(processors, target.device), do_sample)
        self.processors.temperature = None
        self.sampler = self.processors.draft_sampler(None)
        self.shape = self.graphs.fitting(Shape(self.slots, view, choice_of(processors, do_sample), key))
        self.view, self.captured = self.shape.view, False
        fresh = target.new_cache(0, self.slots), drafter.cache
        self.target_cache, drafter.cache = self.graphs.caches.pop(replace(self.shape, choice=()), fresh)
        # The last draft, of all lines.
        self.block: DraftBlock | None = None
        # A compiler does not follow a cached property that has not been asked before.
        head.mask_rules  # noqa: B018

    def draft(self, state: RoundState, plan: Plan, sampler: DraftSampler) -> DraftBlock | None:
        """As `round.draft`; the block has drafts for every row."""
        self.captured, self.block = False, None
        if self.shape not in self.graphs.made and self.graphs.refused is None:
            self._capture(state)
        if not plan.rows or self.graphs.refused is not None:
            return rounds.draft(state, plan, sampler)
        rows = len(state.anchors)
        self.block = self._draft(state, self.graphs.serving(rows, self.shape))
        parts = (self.block.tokens, self.block.logits, self.block.confidence_logits)
        return DraftBlock(*(None if x is None else x[:rows, : plan.length] for x in parts))

    def verify(
        self,
        state: RoundState,
        target: Target,
        block: DraftBlock | None,
        layout: VerifyLayout,
        read_at: torch.Tensor | None,
        joining: Part | None = None,
    ) -> tuple[TargetOutput, torch.Tensor | None]:
        """As `round.verify`, with a verdict. Passes that are captured read no prompts."""
        if self.graphs.refused is not None:
            return rounds.verify(state, target, block, layout, read_at, joining)
        rows = len(state.anchors)
        passes = self.graphs.serving(rows, self.shape)
        width = min(width for width in passes.verify if width > layout.most)
        found = self._verify(state, passes, width, layout.verify_lens)
        accepted, following, features, starts = (x[:rows] for x in found)
        return TargetOutput(None, features, verdict=Verdict(accepted, following), starts=starts), None

    def close(self, drafter: Drafter) -> None:
        """Keep the caches for the next call like this one."""
        for cache in (self.target_cache, drafter.cache):
            cache.clear()
        self.graphs.caches[replace(self.shape, choice=())] = self.target_cache, drafter.cache

    def _capture(self, state: RoundState) -> None:
        """Capture what the call may need, by running it: behind what is committed a pass changes nothing that anybody
        looks at. Where the compiler cannot follow, that is said, and the pair is run eagerly from then on."""
        started, head, rows = time.perf_counter(), state.drafter.head, self.slots
        self.graphs.structure = structure(head, self.target.model)
        draft = captured(draft_pass, self.options, f"draft_of_{rows}")
        widths = [1 + drafts for drafts in draft_tiers(head.config.gamma)]
        passes = Passes(rows, draft, {n: captured(verify_pass, self.options, f"verify_of_{rows}x{n}") for n in widths})
        try:
            self.block = self._draft(state, passes, commits=False)
            for width in widths:
                self._verify(state, passes, width, torch.zeros_like(state.anchors))
        except Exception as error:  # whatever a compiler may raise about somebody's model
            self.graphs.refused = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            logger.warning(
                f"The rounds of {type(self.target.model).__name__} cannot be compiled and run eagerly "
                f"({self.graphs.refused}). The text is the same."
            )
            return
        self.graphs.made[self.shape], self.captured = passes, True
        logger.info(
            f"Captured {1 + len(widths)} passes of {rows} rows over {self.view} slots in "
            f"{time.perf_counter() - started:.1f} s; the pair has {self.graphs.count}."
        )

    def _draft(self, state: RoundState, passes: Passes, commits: bool = True) -> DraftBlock:
        """A whole block of all lines. What the head had yet to read it has, unless the draft only captures."""
        drafter, present = state.drafter, len(state.anchors)
        width, lines = drafter.head.config.gamma + 1, passes.rows
        if max(drafter.num_pending) > width or not drafter.cache.layers[0].is_initialized:
            # Prompts, and what rounds without drafts have left.
            drafter.read(None, *drafter.take(None))
        features, counts = drafter.take(None) if commits else drafter.nothing(present)
        features = pad(features.to(self.target.dtype), (0, 0, 0, width - features.shape[1], 0, lines - present))
        starts, first = drafter.cache.starts, on_device(drafter.first, drafter.device)
        # What the head has yet to read is all that the target knows and it does not.
        ends = state.cache.starts if commits else starts
        table = torch.stack([_padded(own, lines) for own in (starts, ends, first)])
        drafter.cache.show(lines)
        anchors = _padded(state.anchors, lines)
        view = self.view if drafter.ring is None else min(self.view, drafter.ring + 1)
        found = self._run(passes.draft, drafter, anchors, features, table, self.sampler, view)
        if commits:
            drafter.cache.commit(counts, starts=ends)
        return DraftBlock(*found)

    def _verify(
        self, state: RoundState, passes: Passes, width: int, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """See `verify_pass`. lengths: [R], drafts to verify, `None` for none."""
        lines, cache = passes.rows, state.cache
        known = _padded(cache.starts, lines)
        counts = torch.zeros_like(known) if lengths is None else _padded(lengths, lines)
        drafts = sampled_from = None
        if width > 1:
            drafts = _padded(self.block.tokens, lines)
            sampled_from = None if self.block.logits is None else _padded(self.block.logits, lines)
        cache.show(lines)
        table, anchors = torch.stack([known, counts]), _padded(state.anchors, lines)
        args = cache, anchors, drafts, sampled_from, table, self.processors, width, self.view
        return self._run(passes.verify[width], self.target, *args)

    def _run(self, graph: Callable, *args: Any) -> tuple:
        on_cuda = self.target.device.type == "cuda"
        # A graph that nobody looks at again knows its attention.
        is_known = self.trusts and self.shape in self.graphs.made
        with nullcontext() if is_known else self.target.in_our_attention():
            if on_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            found = graph(*args)
        # The next replay writes to the same places.
        return tuple(None if x is None else x.clone() for x in found) if on_cuda else found


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """With zeros behind, up to so many rows."""
    return x[:rows] if len(x) >= rows else pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x)))
