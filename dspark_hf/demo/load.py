"""Load: concurrent requests with the head and without it, in turn, and what each way writes a second."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import pandas as pd

from ..evaluation.prompts import DEFAULT_PROMPTS
from ..generation.stats import DSparkStats
from . import parts
from .engine import Ended, Engine, Stop, Streamer

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
        over = threading.Event()
        clients = [Client(self, i, lambda: over.is_set() or stop.is_set()) for i in range(self.requests)]
        with ThreadPoolExecutor(self.requests) as pool:
            running = [pool.submit(client.run, engine) for client in clients]
            try:
                # The clock starts when everybody has got the first token.
                while not all(c.counts or r.done() for c, r in zip(clients, running, strict=True)):
                    if stop.wait(0.01):
                        return
                begun = time.perf_counter()
                stop.wait(self.seconds)
                seconds = time.perf_counter() - begun
            finally:
                over.set()
        for future in running:
            future.result()
        counts = [count for client in clients for moment, count in client.counts if 0 < moment - begun <= seconds]
        emit(Measured(self, sum(counts) / seconds, _verified([s for client in clients for s in client.stats])))


@dataclass
class Client:
    """A client of a slice. counts: when tokens were committed, and how many. stats: of its requests, with the head."""

    of: Slice
    index: int
    over: Callable[[], bool]
    counts: list[tuple[float, int]] = field(default_factory=list)
    stats: list[DSparkStats] = field(default_factory=list)

    def run(self, engine: Engine) -> None:
        for number in itertools.count(self.index):
            if self.over():
                return
            output = engine.generate(
                self.of.prompts[number % len(self.of.prompts)],
                engine.head if self.of.draft else None,
                streamer=Streamer(lambda tokens: self.counts.append((time.perf_counter(), len(tokens)))),
                stopping_criteria=[Ended(self.over)],
                max_new_tokens=min(REQUEST_TOKENS, engine.most_new_tokens),
                do_sample=False,
            )
            if self.of.draft:
                self.stats.append(output.dspark)


@dataclass(frozen=True)
class Measured:
    """What a slice gave: tokens a second of all requests together, and mean drafts verified in a round."""

    slice: Slice
    speed: float
    verified: float


@dataclass
class Level:
    """How many requests a visitor wants; updated while they run. Kept in a `gr.State`."""

    requests: int = 4

    __hash__ = object.__hash__


def _verified(stats: list[DSparkStats]) -> float:
    lengths = [length for one in stats for length in one.verified_lengths[0]]
    return sum(lengths) / len(lengths) if lengths else 0.0


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
        "drafts verified": f"{ours.verified:.1f}" if ours else "-",
    }


# -- The tab --------------------------------------------------------------------------------------------------------


def tab(engine: Engine) -> None:
    """The tab's components and what they do."""
    gr.Markdown(
        "Requests of many users at once: the busier the machine, the more a draft costs that is thrown away, so the "
        "schedule verifies fewer of them. Move the slider while it runs; both ways take turns at the same load."
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
