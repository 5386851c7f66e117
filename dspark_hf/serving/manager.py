"""Continuous batching with a draft head: what transformers' `ContinuousBatchingManager` is without one.

Requests join the engine between rounds, first come first served, as long as there are slots; one thread runs rounds.
There are as many slots as memory holds of the longest request that is taken.
"""

import asyncio
import itertools
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils import logging

from ..generation.cache import capacity_for
from ..generation.compatibility import check_pair, check_prompt
from ..generation.rope import growing_modules
from ..generation.states import is_stateful, kinds_of
from ..modeling_dspark import DSparkHead
from ..scheduling.settings import DRAFT_SETTINGS
from .loop import IDLE, BatchLoop
from .memory import tokens_that_fit
from .prefixes import KeptTexts
from .request import Kinds, Request, prepare, row_of

logger = logging.get_logger(__name__)

# Requests that decode at once, where `max_requests_per_batch` does not say.
SLOTS = 16
# Tokens of a prompt that are read at once, where `max_batch_tokens` does not say: what others wait for between rounds.
PIECE = 512
# Seeds that there are.
SEEDS = 2**64
# Share of the memory for tokens that texts of ended requests may take.
KEPT = 0.25
# Settings of a `ContinuousBatchingConfig` that are read here; see `DSparkBatchingManager`.
READ = {
    "max_requests_per_batch", "max_queue_size", "return_logprobs", "seed", "allow_block_sharing", "max_batch_tokens",
    "num_blocks", "page_size", "block_size", "max_memory_percent", "scheduler_type", "cpu_offload_space",
}  # fmt: skip


class DSparkBatchingManager:
    """Decodes requests that come and go, with a head; made by `model.init_continuous_batching(assistant_model=head)`.

    Args:
        generation_config: what requests do not say themselves; the model's own by default.
        config: of these count `max_requests_per_batch`, `max_queue_size`, `return_logprobs`, `seed` and
            `allow_block_sharing` (prompts that begin with an earlier text are read from there on); `max_batch_tokens`
            of a prompt are read between two rounds; and `num_blocks` pages, or `max_memory_percent` of the memory that
            is free, are for the tokens of all requests.
        drafting: `num_assistant_tokens`, `num_assistant_tokens_schedule` or `assistant_confidence_threshold`, for all.

    Raises:
        ValueError: for a head that cannot draft for the model, and settings that mean nothing here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: DSparkHead,
        generation_config: GenerationConfig | None = None,
        config: ContinuousBatchingConfig | None = None,
        **drafting: Any,
    ):
        unknown = set(drafting) - set(DRAFT_SETTINGS)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: settings of requests are for `add_request`.")
        check_pair(model, head)
        if (model.tp_size or 1) > 1:
            raise ValueError(
                "A model that is split over processes cannot serve requests that come and go with a DSpark head: use "
                "`generate` with batches, or leave out `assistant_model`."
            )
        self.model, self.head, self.generation_config = model.eval(), head, generation_config
        self.config = config or ContinuousBatchingConfig()
        if self.config.scheduler_type != "fifo" or self.config.cpu_offload_space:
            raise ValueError(
                "With a DSpark head requests are served first come first served, and nothing is offloaded: leave out "
                f"`scheduler_type` (got {self.config.scheduler_type!r}) and `cpu_offload_space`."
            )
        usual = vars(ContinuousBatchingConfig())
        unread = {k: v for k, v in vars(self.config).items() if k not in READ and v != usual.get(k)}
        if unread:
            given = ", ".join(f"{name}={value}" for name, value in sorted(unread.items()))
            logger.warning_once(f"{given}: does nothing with a DSpark head, whose rounds run eagerly in slots.")
        self.defaults = prepare(model, head, [0], generation_config, max_new_tokens=1, **drafting).config
        ends = self.defaults.eos_token_id
        self.ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        self.slots = self.config.max_requests_per_batch or SLOTS
        self.budget = tokens_that_fit(model, head, self.config)
        # Where keys depend on the length of the whole text, another text's are of no use, nor are those of a part.
        whole = bool(growing_modules(model))
        # A state sums up a whole text, and is none of its beginning.
        shares = self.config.allow_block_sharing and not (
            whole or is_stateful(kinds_of(model.config.get_text_config()))
        )
        texts = KeptTexts(int(KEPT * self.budget) if shares else 0)
        piece = None if whole else self.config.max_batch_tokens or PIECE
        self.kinds, self.counter = Kinds(), itertools.count()
        self.loop = BatchLoop(model, head, self.defaults, self.slots, texts, piece)

    # -- The thread -----------------------------------------------------------------------------------------------

    def is_running(self) -> bool:
        """Whether the thread that decodes is."""
        return self.loop.is_running()

    def start(self) -> None:
        """Begin to decode."""
        if self.is_running():
            logger.warning("The manager is running already.")
        else:
            self.loop.start()

    def warmup(self) -> None:
        """Nothing is made beforehand."""

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """End when all requests have. A manager that has ended can be started again.

        Args:
            block: wait for that, at most `timeout` seconds. keep_for_next_session: of no effect, as it is kept by
                whoever holds it. hard_stop: end now; requests that have not ended fail.
        """
        began = time.perf_counter()
        self.loop.stop(now=hard_stop)
        if block:
            self.join(began, timeout)

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        """Wait until it has ended, at most `timeout` seconds; by `time.perf_counter` it was told to at
        `stop_trigger_time`."""
        if self.loop.thread is None:
            return
        self.loop.thread.join(timeout)
        if self.is_running():
            logger.warning(f"Requests were still being decoded after {timeout} seconds.")
        else:
            logger.info(f"Rounds ended after {time.perf_counter() - stop_trigger_time:.2f} seconds.")

    def destroy(self) -> None:
        """End when all requests have, and forget the texts of those that have ended."""
        self.stop()
        self.loop.texts.texts.clear()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within this context no round runs, so that the model can be used or changed."""
        with self.loop.model_lock:
            yield

    @property
    def drafts(self) -> bool:
        """Whether rounds draft. May be set while they run: without drafts this is plain continuous batching."""
        return self.loop.drafts

    @drafts.setter
    def drafts(self, value: bool) -> None:
        self.loop.drafts = value

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return self.loop.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that have one."""
        return len(self.loop.active)

    # -- Requests ---------------------------------------------------------------------------------------------------

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        logprobs: bool | None = None,
        **settings: Any,
    ) -> str:
        """Queue a prompt. Returns the id of the request; with `num_return_sequences` others have ids of their own, see
        [`ids_of`].

        Args:
            seed: makes what is sampled reproducible, whatever else is decoded beside it, where head and schedule
                (`num_assistant_tokens_schedule="constant"`) are the same.
            logprobs: whether to say how likely the tokens were; by default as the config's `return_logprobs`.
            settings: of the request alone, as `generate` takes them: `do_sample`, `temperature`, `stop_strings` (with
                `tokenizer`) and so on.

        Raises:
            ValueError: for a prompt that is empty or too long, and for settings that mean nothing.
            queue.Full: when `max_queue_size` requests wait.
        """
        wrong = set(settings) & set(DRAFT_SETTINGS)
        if wrong:
            raise ValueError(f"{', '.join(sorted(wrong))}: said for all requests at once, where the manager is made.")
        given = {"max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id}
        settings |= {name: value for name, value in given.items() if value is not None}
        if not len(input_ids):
            raise ValueError("A request needs a prompt of one token or more, got none.")
        prepared = prepare(self.model, self.head, input_ids, self.generation_config, **settings)
        seed = self.config.seed if seed is None else seed
        if seed is not None and not 0 <= seed < SEEDS:
            raise ValueError(f"`seed` must be from 0 to {SEEDS - 1}, got {seed}.")
        request_id = f"req_{next(self.counter)}" if request_id is None else request_id
        requests = []
        for number, name in enumerate(ids_of(request_id, prepared.config.num_return_sequences)):
            row = row_of(input_ids, prepared, self.kinds, None if seed is None else (seed + number) % SEEDS)
            requests.append(Request(name, row, streaming, timestamps=[] if record_timestamps else None))
            requests[-1].logprobs = [] if (self.config.return_logprobs if logprobs is None else logprobs) else None
        check_prompt(self.model, self.loop.engine.target.positions, len(input_ids))
        self.check_room(len(input_ids), row.stopping.max_length)
        if 0 < self.config.max_queue_size <= self.num_waiting:
            raise queue.Full(f"{self.num_waiting} requests wait already.")
        for request in requests:
            self.loop.incoming.put_nowait(request)
        self.loop.wake_up.set()
        return request_id

    def add_requests(self, inputs: Sequence[Sequence[int]], **kwargs: Any) -> list[str]:
        """Queue prompts with the same settings, see `add_request`. Returns the ids of the requests."""
        return [self.add_request(input_ids, **kwargs) for input_ids in inputs]

    def cancel_request(self, request_id: str) -> None:
        """End a request; its caller is told what it came to. One that has ended, or is not known, is left alone."""
        self.loop.canceled.put(request_id)
        self.loop.wake_up.set()

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next result, of that request if one is named; `None` where none came within `timeout` seconds, or none
        will."""
        results = self.loop.router.output_queue
        if results.empty() and not self.is_running():
            return None
        try:
            result = results.get(timeout=timeout)
        except queue.Empty:
            return None
        if request_id is not None and result.request_id != request_id:
            results.put(result)
            return None
        return result

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, as long as the manager runs."""
        while self.is_running() or not self.loop.router.output_queue.empty():
            result = self.get_result(timeout=IDLE)
            if result is not None:
                yield result

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Results of one request, up to its end."""
        while self.is_running() or not self.loop.router.output_queue.empty():
            result = self.get_result(request_id, timeout=IDLE)
            if result is not None:
                yield result
                if result.is_finished():
                    return

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        """Call `callback` with every result of a request: in the event loop that is running here, or where none is, in
        the thread that decodes, which waits for it."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        self.loop.router.register(request_id, callback, loop)

    def forget(self, request_id: str) -> None:
        """Drop the handler of a request."""
        self.loop.router.forget(request_id)

    def check_room(self, prompt: int, tokens: int) -> None:
        """Raise for a request of so many tokens, prompt included, whose slot there is no memory for. All slots are as
        long as the longest row needs."""
        slot = capacity_for(tokens + self.head.config.block_size)
        room = int((1 - KEPT) * self.budget)
        if self.slots * slot > room:
            raise ValueError(
                f"A prompt of {prompt} tokens with up to {tokens - prompt} new ones needs {self.slots} slots of {slot} "
                f"tokens, but there is memory for {room}. Lower `max_new_tokens` or `max_requests_per_batch`, or raise "
                "`max_memory_percent`."
            )


def ids_of(request_id: str, sequences: int | None) -> list[str]:
    """The ids of all texts that are asked for with a request, as transformers names them; its own is the last."""
    return [f"{request_id}__child#{number}" for number in range((sequences or 1) - 1)] + [request_id]
