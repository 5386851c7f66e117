"""A request: a row of the engine, and what its caller is told of it."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from ..generation.compatibility import check_mode
from ..generation.processors import OF_LOGITS, BlockProcessors, is_pure
from ..generation.rows import Row, read_rows
from ..generation.stopping import Stopping
from ..modeling_dspark import DSparkHead

logger = logging.get_logger(__name__)


@dataclass
class RequestOutput(GenerationOutput):
    """What transformers says of a request, and what became of its drafts.

    rounds: passes of the target after its prompt. drafted, verified, accepted: drafts.
    """

    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0


# Arguments of `generate` beside settings of a config that are in processors and criteria when it comes to decode.
IN_PROCESSORS = {
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "negative_prompt_ids",
    "negative_prompt_attention_mask", "use_model_defaults",
}  # fmt: skip


@dataclass(eq=False)
class Request:
    """What `add_request` was asked for.

    streaming: whether its caller is told of every round, and not only of its end.
    created, started, ended: by `time.perf_counter`, the latter two -1 before.
    timestamps, logprobs: of its tokens, `None` where they are not wanted.
    reported: tokens that its caller knows of. rounds, drafted, verified, accepted: see [`RequestOutput`].
    """

    id: str
    row: Row
    streaming: bool = False
    created: float = field(default_factory=time.perf_counter)
    started: float = -1
    ended: float = -1
    timestamps: list[float] | None = None
    logprobs: list[float] | None = None
    reported: int = 0
    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0

    @property
    def status(self) -> RequestStatus:
        if self.row.error is not None:
            return RequestStatus.FAILED
        if self.row.ended:
            return RequestStatus.FINISHED
        return RequestStatus.DECODING if self.started >= 0 else RequestStatus.PENDING

    def output(self) -> RequestOutput:
        """What its caller is told."""
        return RequestOutput(
            request_id=self.id,
            prompt_ids=self.row.given,
            generated_tokens=list(self.row.committed),
            logprobs=list(self.logprobs or []),
            error=self.row.error,
            status=self.status,
            created_time=self.created,
            lifespan=(self.started, self.ended),
            timestamps=None if self.timestamps is None else list(self.timestamps),
            rounds=self.rounds,
            drafted=self.drafted,
            verified=self.verified,
            accepted=self.accepted,
        )


@dataclass(frozen=True)
class Prepared:
    """What `generate` makes of the settings of a call before it decodes."""

    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList


def prepare(
    model: PreTrainedModel,
    head: DSparkHead,
    input_ids: Sequence[int],
    config: GenerationConfig | None = None,
    **settings: Any,
) -> Prepared:
    """What `model.generate(input_ids, config, **settings)` would decode with: the same defaults, and the same errors
    for settings that there are not.

    Raises:
        ValueError: also for settings that cannot be kept for each request of a batch alone.
    """
    # `generate` takes either a config or settings of one.
    config, tokenizer = copy.deepcopy(config or model.generation_config), settings.pop("tokenizer", None)
    settings = config.update(**settings)
    if config.stop_strings is not None and tokenizer is not None:
        # Which `generate` does itself, but for a decoding method that is passed.
        own = StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings)
        config.stop_strings, settings["stopping_criteria"] = None, [*settings.get("stopping_criteria", []), own]
    ids = torch.tensor([list(input_ids)], dtype=torch.long, device=model.device)
    prepared: Prepared = model.generate(ids, generation_config=config, custom_generate=_decoding, **settings)
    check_mode(prepared.config.get_generation_mode(head), prepared.config)
    if prepared.config.cache_implementation == "static" or prepared.config.compile_config is not None:
        logger.warning_once(
            "The rounds of requests that come and go run eagerly, as without `cache_implementation` and "
            "`compile_config`: what is captured is for the rows of one call. `generate` compiles its rounds."
        )
    unread = sorted(name for name, value in settings.items() if value is not None and name not in IN_PROCESSORS)
    if unread:
        raise ValueError(
            f"{', '.join(unread)}: a request is tokens, and settings of how to go on from them. Inputs of the model, "
            "such as masks and pictures, and streamers are for `generate`."
        )
    foreign = [type(own).__name__ for own in prepared.processors if not is_pure(own)]
    foreign += [type(own).__name__ for own in Stopping(prepared.criteria).foreign]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} cannot be used in a batch whose requests come and go, as plain decoding calls such "
            "processors and criteria with all rows at once. Use `generate` for this prompt, or leave them out."
        )
    return prepared


def _decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Prepared:
    return Prepared(generation_config, logits_processor, stopping_criteria)


class Kinds:
    """How requests choose their tokens; requests that do so alike share it, so that a round treats them as one."""

    def __init__(self) -> None:
        self.known: WeakValueDictionary[tuple, BlockProcessors] = WeakValueDictionary()

    def of(self, prepared: Prepared) -> BlockProcessors:
        own = prepared.processors, prepared.config.do_sample
        if any(type(processor) not in OF_LOGITS for processor in prepared.processors):
            return BlockProcessors(*own)
        settings = [(type(p), *((k, _value(v)) for k, v in sorted(vars(p).items()))) for p in prepared.processors]
        return self.known.setdefault((prepared.config.do_sample, *settings), BlockProcessors(*own))


def _value(setting: Any) -> str:
    return repr(setting.tolist() if torch.is_tensor(setting) else setting)


def row_of(input_ids: Sequence[int], prepared: Prepared, kinds: Kinds, seed: int | None) -> Row:
    """The row of a request."""
    ids = torch.tensor([list(input_ids)])
    (row,) = read_rows(ids, None, 0, ids.shape[1], kinds.of(prepared), Stopping(prepared.criteria))
    row.seed = seed
    return row
