"""What `model.generate(..., assistant_model=head)` runs: a batch as rows of an engine, and its output."""

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.utils import logging

from ..modeling_dspark import DSparkHead
from ..scheduling.scheduler import LoadSchedule
from .compatibility import check_inputs, check_padding, check_positions, check_prompt, has_pictures
from .compiled import CompiledPasses, compile_options, reason_for_eager
from .drafting import Drafter
from .engine import Engine, longest_of
from .experience import scheduler_for, store
from .graphs import power_of_two
from .lockstep import Lockstep, is_needed
from .modules import is_private
from .observers import Observer, OutputObserver, StatsObserver, StreamObserver, UseObserver
from .outputs import Recorder
from .past import Continuation
from .pictures import check_pictures, offsets_of, read_pictures
from .pieces import PIECE
from .processors import BlockProcessors
from .ranks import Ranks, any_busy
from .releases import CACHE
from .rows import Row, Streaming, read_rows
from .stats import DSparkGenerateOutput, DSparkStats
from .stopping import Stopping
from .target import Target

logger = logging.get_logger(__name__)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    assistant_model: DSparkHead,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs,
) -> torch.Tensor | DSparkGenerateOutput:
    """The decoding method that `model.generate(..., assistant_model=head)` runs; see [`Engine`].

    Args:
        input_ids: [R, P], left-padded where prompts differ in length.
        model_kwargs: of these `attention_mask` [R, P], `None` for no padding; `position_ids` [R, P], which must count
            the tokens; the cache to continue, which is brought up to date (`generate` passes an empty one otherwise);
            pictures, see there; and scalars, which every pass of the target is given. Anything else is refused.

    Returns:
        sequences [R, P + new tokens], right-padded where rows ended early, or with `return_dict_in_generate` a
        [`DSparkGenerateOutput`] around them.
    """
    config, head, size = generation_config, assistant_model, len(input_ids)
    recorder, options = Recorder(config, size), check_inputs(model_kwargs)
    ids, wants = head.config.target_layer_ids, recorder.wants
    target = Target(model, ids, wants("hidden_states"), wants("attentions"), options)
    attention_mask, pictures = model_kwargs.get("attention_mask"), has_pictures(model_kwargs)
    if pictures:
        check_pictures(config, model_kwargs)
        model_kwargs[CACHE] = read_pictures(target, head, input_ids, model_kwargs)
    given, offsets, by_column = model_kwargs.get(CACHE), offsets_of(model_kwargs), not target.row_by_row
    past = Continuation(given, config, input_ids, attention_mask, target.rereads_at, offsets, by_column)
    if not past.cached:
        check_positions(model_kwargs.get("position_ids"), attention_mask)
        if target.is_stateful:
            check_padding(model, attention_mask)
    processors, stopping = BlockProcessors(logits_processor, config.do_sample), Stopping(stopping_criteria)
    rows = read_rows(input_ids, attention_mask, past.cached, past.width, processors, stopping)
    check_prompt(model, target.positions, max(len(row.prompt_columns) for row in rows))
    pad = config._pad_token_tensor.item() if config._pad_token_tensor is not None else 0
    stats = DSparkStats.empty(size, head.config.gamma)
    lockstep = None
    if is_needed(size, logits_processor, stopping):
        ends, ranks = bool(stopping.eos_ids), Ranks(model)
        lockstep = Lockstep(input_ids, logits_processor, stopping_criteria, pad, ends, wants("scores"), ranks)
    options = compile_options(config, target.device)
    drafter = Drafter(head, model, size, None if options is None else power_of_two(size))
    compiled = None
    if options is not None:
        others = lockstep is not None, recorder.active, pictures
        reason = reason_for_eager(target, drafter, logits_processor, stopping, *others)
        if reason is None:
            longest = max(longest_of(rows), getattr(config, "max_cache_len", None) or 0)
            compiled = CompiledPasses(options, target, drafter, logits_processor, config.do_sample, size, longest)
        else:
            logger.warning_once(f"The rounds run eagerly, as without `cache_implementation`: {reason}.")
    scheduler = scheduler_for(target, drafter, size, config, synced_gpus)
    observers: list[Observer] = [UseObserver()]
    if config.return_dict_in_generate:
        observers.append(StatsObserver(stats))
    if recorder.active:
        observers.append(OutputObserver(recorder, past.cached))
    if streamer is not None:
        observers.append(StreamObserver(Streaming(streamer, rows, pad)))
    private = compiled is None and lockstep is None and not recorder.active and is_private(target.model, drafter.head)
    # Processes that wait for each other in every pass must make as many; what is recorded is of whole prompts.
    whole = synced_gpus or wants("hidden_states") or wants("attentions")
    piece = None if whole else getattr(config, "prefill_chunk_size", None) or PIECE
    engine = Engine(target, drafter, scheduler, size, lockstep, past, compiled, observers, private, piece=piece)
    engine.add(rows)
    _run(engine, synced_gpus)
    if streamer is not None:
        streamer.end()
    if engine.planner.ranks.leads and isinstance(scheduler, LoadSchedule):
        store(head, target, config.do_sample)
    sequences = torch.cat([input_ids, _new_tokens(rows, pad).to(input_ids.device)], dim=1)
    cache = past.store(rows, target.config, head)
    if not config.return_dict_in_generate:
        return sequences
    for name, seconds in engine.clock.totals().items():
        setattr(stats, f"{name}_seconds", seconds)
    return DSparkGenerateOutput(sequences=sequences, dspark=stats, **recorder.collect(), **{CACHE: cache})


def _run(engine: Engine, synced: bool) -> None:
    """All rounds. Where processes wait for each other in every pass, `synced`, until all of them are through."""
    try:
        while any_busy(engine.busy, engine.target.device) if synced else engine.busy:
            if engine.busy:
                engine.step()
            else:
                _idle(engine)
    finally:
        engine.close()


def _new_tokens(rows: list[Row], pad: int) -> torch.Tensor:
    """[R, longest], right-padded."""
    longest = max(len(row.committed) for row in rows)
    return torch.tensor([row.committed + [pad] * (longest - len(row.committed)) for row in rows])


def _idle(engine: Engine) -> None:
    """The passes of a round that writes nothing, as other processes wait for ours in theirs."""
    target, head = engine.target, engine.drafter.head
    drafter = Drafter(head, target.model, 1)
    drafter.append(torch.zeros(1, 1, head.fc.in_features, device=target.device), [1])
    anchors = torch.zeros(1, dtype=torch.int64, device=target.device)
    sampler = BlockProcessors(LogitsProcessorList(), do_sample=False).draft_sampler(None)
    drafter.draft(anchors, engine.planner.scheduler.settings.most, sampler)
    target.forward(anchors[:, None], target.new_cache(1))
