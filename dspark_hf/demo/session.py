"""The pair that all visitors share. Their requests decode together, in one engine where they join and leave between
rounds; what has to be measured alone has the model to itself for as long."""

import atexit
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Protocol

import gradio as gr
import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.prompts import sampling
from ..generation.cache import capacity_for
from ..generation.releases import PAGE_SIZE
from ..modeling_dspark import DSparkHead
from ..serving.manager import KEPT, DSparkBatchingManager
from ..serving.threads import release_pool

logger = logging.getLogger(__name__)

# Requests that decode at once; more wait for one of them to end.
SLOTS = 32
# Seconds between two looks at whether a visitor has stopped or left, and two pictures of what streams.
TICK = 0.2
# That what is being decoded has when the demo ends.
LAST_SECONDS = 5.0
MOST_PROMPT_TOKENS, MOST_NEW_TOKENS, FEWEST_NEW_TOKENS = 1024, 512, 2
# What the fields of a generation hold at first, and what counts where a visitor has emptied them.
DEFAULT_NEW_TOKENS, DEFAULT_TEMPERATURE, DEFAULT_TOP_P = 256, 0.0, 1.0
# No token is longer than this on average in text that a limit of tokens would let through.
CHARACTERS_A_TOKEN = 16
# Plain tokens from which the step time is taken, and answers from which the schedule learns what drafts are worth here.
MEASURED_TOKENS, LEARNED_ANSWERS = 64, 3
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
WARM_UP = "Tom has 3 boxes with 12 pencils each. He gives away 10 pencils. How many pencils are left?"


def on_gpu(work: Callable) -> Callable:
    """`work` with the decorator of ZeroGPU Spaces, where its package is there."""
    try:
        import spaces
    except ImportError:
        return work
    return spaces.GPU(work)


class Stop:
    """A visitor's request that what runs in a tab ends; kept in a `gr.State`."""

    requested = False


class Work(Protocol):
    """Something to do with the pair: its events, and `None` every [`TICK`] seconds. Whatever it has begun ends when the
    iterator is closed. It can be pickled, as ZeroGPU does it in another process."""

    def __call__(self, session: "DemoSession") -> Iterator[Any]: ...


class DemoSession:
    """A target, its head and its tokenizer.

    Attributes:
        most_prompt_tokens, most_new_tokens: the longest prompt and answer, which fit the target's positions together.

    Raises:
        ValueError: when they hold no answer.
    """

    def __init__(self, model: PreTrainedModel, head: DSparkHead, tokenizer: PreTrainedTokenizerBase):
        self.model, self.head, self.tokenizer = model, head, tokenizer
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        positions = positions or MOST_PROMPT_TOKENS + MOST_NEW_TOKENS + head.config.block_size
        self.most_prompt_tokens = min(MOST_PROMPT_TOKENS, positions // 2)
        self.most_new_tokens = min(MOST_NEW_TOKENS, positions - self.most_prompt_tokens - head.config.block_size)
        if self.most_new_tokens < FEWEST_NEW_TOKENS:
            raise ValueError(
                f"The target has {positions} positions: too few for a prompt, an answer and a block of "
                f"{head.config.block_size}."
            )
        self._plain_step: float | None = None
        self._manager: DSparkBatchingManager | None = None
        self._making = threading.Lock()
        self._events = on_gpu(self._events)

    @property
    def manager(self) -> DSparkBatchingManager:
        """Decodes the requests of all visitors, in the process that asks for it first: on ZeroGPU not the page's."""
        with self._making:
            if self._manager is None:
                slot = capacity_for(self.most_prompt_tokens + self.most_new_tokens + self.head.config.block_size)
                pages = {PAGE_SIZE: slot, "num_blocks": math.ceil(SLOTS / (1 - KEPT))}
                config = ContinuousBatchingConfig(max_requests_per_batch=SLOTS, **pages)
                self._manager = self.model.init_continuous_batching(
                    continuous_batching_config=config, assistant_model=self.head
                )
                self._manager.start()
                # A thread that is in the middle of a round when the interpreter ends takes the process down with it.
                atexit.register(self._manager.stop, timeout=LAST_SECONDS, hard_stop=True)
            return self._manager

    def stream(self, work: Work, stop: Stop) -> Iterator[Any]:
        """What `work` gives. It ends early when a stop is requested, and when the iterator is closed.

        Raises:
            gr.Error: when the work fails.
        """
        with closing(self._events(work)) as events:
            try:
                for event in events:
                    if stop.requested:
                        return
                    yield event
            except Exception as error:
                logger.exception("The demo's work failed.")
                raise gr.Error(
                    f"{type(error).__name__}: {error}", title="The model failed", print_exception=False
                ) from error

    def settings(
        self, most: float | None = None, temperature: float | None = None, top_p: float | None = None
    ) -> dict[str, Any]:
        """The settings of a generation that the fields of a tab ask for. One that is empty, `None`, counts as its
        default."""
        temperature = DEFAULT_TEMPERATURE if temperature is None else temperature
        settings = sampling(temperature) | {
            "max_new_tokens": int(min(DEFAULT_NEW_TOKENS, self.most_new_tokens) if most is None else most)
        }
        if temperature:
            settings["top_p"] = DEFAULT_TOP_P if top_p is None else top_p
        return settings

    def generate(self, input_ids: list[int], head: DSparkHead | None, **kwargs):
        """`model.generate` for one prompt, with its output class."""
        ids = torch.tensor([input_ids], device=self.model.device)
        kwargs |= {"assistant_model": head} if head is not None else {}
        return self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **kwargs
        )

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the answer.

        Raises:
            gr.Error: when there is nothing to answer, or it is too long.
        """
        if not messages[-1]["content"].strip():
            raise gr.Error("Write a prompt first.", title="Nothing to answer", print_exception=False)
        length = sum(len(message["content"]) for message in messages)
        if length > CHARACTERS_A_TOKEN * self.most_prompt_tokens:
            raise self._too_long(f"{length:,} characters")
        ids = self._tokens(messages)
        if len(ids) > self.most_prompt_tokens:
            raise self._too_long(f"{len(ids):,} tokens")
        return ids

    def own_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt of the demo's own, which measures speed: its end, where the target is too short for
        all of it."""
        return self._tokens([{"role": "user", "content": text}])[-self.most_prompt_tokens :]

    def decode(self, tokens: list[int], ended: bool = True) -> str:
        """The text of new tokens. Before it has ended, without a character at its end that is not whole yet."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if ended or not text.endswith(REPLACEMENT):
            return text
        # Tokenizers that fall back to bytes lose a whole run of them to its last character, which is at most 4 long.
        shorter = (self.tokenizer.decode(tokens[:-held], skip_special_tokens=True) for held in range(1, 4))
        return max((one.rstrip(REPLACEMENT) for one in (text, *shorter)), key=len)

    def warm_up(self) -> None:
        """Measure this machine in the background, so that the first visitor need not wait for it. Whoever calls this
        computes no more."""
        release_pool()
        threading.Thread(target=lambda: list(self.stream(measure, Stop())), daemon=True).start()

    def measured_step(self) -> float:
        """Seconds of a plain step. Before it is measured the schedule learns what the head is worth."""
        if self._plain_step is None:
            with self.manager.pause():
                self._plain_step = self._plain_step or self._measure()
        return self._plain_step

    def _measure(self) -> float:
        ids, count = self.own_prompt(WARM_UP), min(MEASURED_TOKENS, self.most_new_tokens)
        options = {"max_new_tokens": count, "do_sample": False}
        for _ in range(LEARNED_ANSWERS):
            self.generate(ids, self.head, **options)
        self.generate(ids, None, **options | {"max_new_tokens": min(4, count)})
        times: list[float] = []
        streamer = Streamer(lambda _: times.append(time.perf_counter()))
        self.generate(ids, None, streamer=streamer, min_new_tokens=count, **options)
        return (times[-1] - times[0]) / (len(times) - 1)

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _too_long(self, length: str) -> gr.Error:
        text = f"The prompt has {length} with what came before it; this demo takes {self.most_prompt_tokens:,} tokens."
        return gr.Error(f"{text} Shorten it, or begin anew.", title="Prompt too long", print_exception=False)

    def _events(self, work: Work) -> Iterator[Any]:
        yield from work(self)


def measure(session: DemoSession) -> Iterator[float]:
    """Work that only has the engine measure what it needs."""
    yield session.measured_step()


class Streamer:
    """Hands on the new tokens of every round; `generate` puts the prompt first."""

    def __init__(self, on_tokens: Callable[[list[int]], None]):
        self.on_tokens, self.past_prompt = on_tokens, False

    def put(self, value: torch.Tensor) -> None:
        if self.past_prompt:
            self.on_tokens(value.flatten().tolist())
        self.past_prompt = True

    def end(self) -> None:
        pass


def ticks(events: queue.SimpleQueue) -> Iterator[Any]:
    """What comes, without an end; `None` every [`TICK`] seconds, whether or not there is news."""
    next_tick = time.monotonic() + TICK
    while True:
        wait = next_tick - time.monotonic()
        if wait <= 0:
            next_tick = time.monotonic() + TICK
            yield None
            continue
        try:
            yield events.get(timeout=wait)
        except queue.Empty:
            continue
