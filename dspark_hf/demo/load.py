"""Load: concurrent requests, on one engine with the head and beside each other without it, in turn."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd
from transformers import ContinuousBatchingConfig

from ..evaluation.prompts import DEFAULT_PROMPTS
from ..serving.request import RequestOutput
from . import parts
from .engine import TICK, Ended, Engine, Stop, Streamer

MOST_REQUESTS = 32
SLICE_SECONDS, LONGEST_SECONDS = 1.5, 60.0
# A request asks for so many tokens at most; the next one follows at once.
REQUEST_TOKENS = 128
PLAIN, DSPARK = "plain", "DSpark"
COLUMNS = ["seconds", "tokens a second", "decoding", "requests", "drafts verified"]


@dataclass(frozen=True)
class Slice:
    """Work: so many clients for a while, each with one request after another, all with the head or all without."""

    requests: int
    draft: bool
    prompts: tuple[list[int], ...]
    seconds: float

    def __call__(self, engine: Engine, emit: Callable[[Any], None], stop: threading.Event) -> None:
        clients = Together(self, engine) if self.draft else Beside(self, engine)
        with clients:
            # The clock starts when everybody has got the first token.
            while not clients.all_begun():
                if stop.wait(0.01):
                    return
            begun = time.perf_counter()
            stop.wait(self.seconds)
            seconds = time.perf_counter() - begun
        count = sum(count for moment, count in clients.counts if 0 < moment - begun <= seconds)
        emit(Measured(self, count / seconds, clients.verified, clients.tau, clients.ended))

    def prompt(self, number: int) -> list[int]:
        """Of the request of that number."""
        return self.prompts[number % len(self.prompts)]

    def settings(self, engine: Engine) -> dict[str, Any]:
        """Of every request."""
        return {"max_new_tokens": min(REQUEST_TOKENS, engine.most_new_tokens), "do_sample": False}


class Together:
    """Clients whose requests share one engine, where they join and leave between rounds.

    Attributes:
        counts: when tokens were committed, and how many.
    """

    def __init__(self, of: Slice, engine: Engine):
        self.of, self.settings = of, of.settings(engine)
        config = ContinuousBatchingConfig(max_requests_per_batch=MOST_REQUESTS)
        self.manager = engine.model.init_continuous_batching(
            continuous_batching_config=config, assistant_model=engine.head
        )
        self.counts: list[tuple[float, int]] = []
        # Of every request its last news, and how many of its tokens were counted.
        self.news: dict[str, RequestOutput] = {}
        self.told: dict[str, int] = {}
        self.over, self.reader = threading.Event(), ThreadPoolExecutor(1)
        self.reading: Future | None = None

    def __enter__(self) -> "Together":
        self.manager.start()
        self.reading = self.reader.submit(self._read)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.over.set()
        self.reader.shutdown()
        self.manager.stop(hard_stop=True)
        self.reading.result()

    def all_begun(self) -> bool:
        """Whether everybody has got the first token."""
        return len(self.news) >= self.of.requests or self.reading.done()

    @property
    def verified(self) -> float:
        """Mean drafts verified in a round of a request."""
        news = list(self.news.values())
        return sum(one.verified for one in news) / max(1, sum(one.rounds for one in news))

    @property
    def tau(self) -> float:
        """Mean tokens of a round of a request."""
        news = list(self.news.values())
        return 1 + sum(one.accepted for one in news) / max(1, sum(one.rounds for one in news))

    @property
    def ended(self) -> int:
        """Requests that have left the batch."""
        return sum(one.is_finished() for one in list(self.news.values()))

    def _read(self) -> None:
        numbers = itertools.count()
        for _ in range(self.of.requests):
            self._ask(next(numbers))
        while not self.over.is_set():
            result = self.manager.get_result(timeout=TICK)
            if result is None:
                continue
            if result.error is not None:
                raise RuntimeError(result.error)
            request, count = result.request_id, len(result.generated_tokens)
            self.counts.append((time.perf_counter(), count - self.told[request]))
            self.told[request], self.news[request] = count, result
            if result.is_finished():
                self._ask(next(numbers))

    def _ask(self, number: int) -> None:
        request = self.manager.add_request(self.of.prompt(number), streaming=True, **self.settings)
        self.told[request] = 0


class Beside:
    """Clients whose requests are calls of plain `generate`, which decode beside each other.

    Attributes:
        counts: when tokens were committed, and how many. verified, tau: of rounds without drafts. ended: requests.
    """

    verified, tau = 0.0, 1.0

    def __init__(self, of: Slice, engine: Engine):
        self.of, self.engine, self.settings = of, engine, of.settings(engine)
        self.counts: list[tuple[float, int]] = []
        self.begun: set[int] = set()
        self.ended = 0
        self.over = threading.Event()
        self.pool = ThreadPoolExecutor(of.requests)
        self.running: list[Future] = []

    def __enter__(self) -> "Beside":
        self.running = [self.pool.submit(self._run, index) for index in range(self.of.requests)]
        return self

    def __exit__(self, *exc: Any) -> None:
        self.over.set()
        self.pool.shutdown()
        for future in self.running:
            future.result()

    def all_begun(self) -> bool:
        """Whether everybody has got the first token."""
        return len(self.begun) >= self.of.requests or any(future.done() for future in self.running)

    def _run(self, index: int) -> None:
        def told(tokens: list[int]) -> None:
            self.counts.append((time.perf_counter(), len(tokens)))
            self.begun.add(index)

        for number in itertools.count(index):
            if self.over.is_set():
                return
            criteria, streamer = [Ended(self.over.is_set)], Streamer(told)
            self.engine.generate(
                self.of.prompt(number), None, streamer=streamer, stopping_criteria=criteria, **self.settings
            )
            self.ended += 1


@dataclass(frozen=True)
class Measured:
    """What a slice gave.

    speed: tokens a second of all requests together. verified, tau: mean drafts verified, and tokens, in a round of a
    request. ended: requests that came to their end, each of which another followed.
    """

    slice: Slice
    speed: float
    verified: float
    tau: float
    ended: int


@dataclass
class Level:
    """How many requests a visitor wants; updated while they run. Kept in a `gr.State`."""

    requests: int = 4

    __hash__ = object.__hash__


def run(engine: Engine, level: Level, stop: Stop) -> Iterator[tuple[float, Measured] | None]:
    """Slices in turn with the head and without it, each with the seconds since the start; `None` every tick."""
    prompts = tuple(engine.own_prompt(prompt) for prompt in DEFAULT_PROMPTS)
    started = time.monotonic()
    for draft in itertools.cycle((True, False)):
        if time.monotonic() - started > LONGEST_SECONDS:
            return
        for event in engine.stream(Slice(level.requests, draft, prompts, SLICE_SECONDS), stop):
            if isinstance(event, Measured):
                yield time.monotonic() - started, event
            elif event is None:
                yield None
        if stop.requested:
            return


def frame(points: list[list]) -> pd.DataFrame | None:
    """What the plot shows, a row a slice. It keeps the lines that its first value has, so it gets none before both
    ways have been measured."""
    return pd.DataFrame(points, columns=COLUMNS) if len(points) > 1 else None


def figures(last: dict[bool, Measured], requests: int) -> dict[str, str]:
    """The newest numbers of both ways. The speed-up is shown where both were measured at the same load."""
    plain, ours = last.get(False), last.get(True)
    same = plain and ours and plain.slice.requests == ours.slice.requests == requests
    return {
        "requests": str(requests),
        "DSpark tokens/s": f"{ours.speed:.0f}" if ours else "-",
        "plain tokens/s": f"{plain.speed:.0f}" if plain else "-",
        "speed-up": parts.times(ours.speed / plain.speed if same and plain.speed else None),
        "tau": f"{ours.tau:.2f}" if ours else "-",
        "drafts verified": f"{ours.verified:.1f}" if ours else "-",
        "ended": str(ours.ended) if ours else "-",
    }


# -- The tab --------------------------------------------------------------------------------------------------------


def tab(engine: Engine) -> None:
    """The tab's components and what they do."""
    gr.Markdown(
        "Requests of many users at once. With the head they share one engine, where they join and leave between "
        "rounds; without it they are calls of plain `generate` beside each other. The busier the machine, the more a "
        "draft costs that is thrown away, so the schedule verifies fewer of them. Move the slider while it runs; both "
        "ways take turns at the same load."
    )
    requests = parts.slider(1, MOST_REQUESTS, Level.requests, step=1, label="Requests at once", elem_id="load-level")
    with gr.Row():
        start = gr.Button("Start", variant="primary", elem_id="load-start")
        halt = gr.Button("Stop", elem_id="load-stop")
    numbers = gr.HTML(parts.figures(figures({}, Level.requests)), elem_id="load-numbers")
    gr.Markdown("#### Throughput of all requests")
    plot = gr.LinePlot(
        x="seconds",
        x_axis_format="~g",
        y="tokens a second",
        color="decoding",
        color_map={DSPARK: "#12a150", PLAIN: "#8b95a5"},
        color_title=" ",
        y_lim=[0, None],
        x_lim=[0, None],
        tooltip="all",
        height=340,
        elem_id="load-plot",
    )
    stop, level = gr.State(Stop()), gr.State(Level())

    def show(level: Level, stop: Stop):
        points, last = [], {}
        yield parts.figures(figures(last, level.requests)), frame(points)
        for news in run(engine, level, stop):
            if news is None:
                continue
            seconds, new = news
            last[new.slice.draft] = new
            name = DSPARK if new.slice.draft else PLAIN
            points.append([round(seconds, 1), round(new.speed, 1), name, new.slice.requests, round(new.verified, 1)])
            yield parts.figures(figures(last, new.slice.requests)), frame(points)

    parts.clear(stop, [start.click])
    start.click(show, [level, stop], [numbers, plot], **parts.MODEL, show_progress_on=numbers)
    parts.request(stop, halt)
    requests.change(
        lambda level, count: setattr(level, "requests", int(count or Level.requests)),
        [level, requests],
        None,
        **parts.AT_ONCE,
    )
