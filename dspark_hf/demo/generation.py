"""A generation that has the model to itself: what is measured is then its own."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

from ..generation.stats import DSparkStats, synchronize
from .session import DemoSession, Streamer, ticks


@dataclass(frozen=True)
class Committed:
    """New tokens of a round, or the one of a plain step. seconds: since the generation began."""

    seconds: float
    tokens: list[int]


@dataclass(frozen=True, eq=False)
class Finished:
    """The end of a generation. stats: `None` for plain decoding."""

    seconds: float
    stats: DSparkStats | None


@dataclass(frozen=True)
class Generation:
    """Work: decode one prompt with `generate`, while no request goes on. settings: as it takes them."""

    input_ids: list[int]
    draft: bool
    settings: dict[str, Any]

    def __call__(self, session: DemoSession) -> Iterator[Committed | Finished | None]:
        events, stop = queue.SimpleQueue(), threading.Event()
        threading.Thread(target=self._run, args=(session, events.put, stop), daemon=True).start()
        try:
            for event in ticks(events):
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            stop.set()

    def _run(self, session: DemoSession, emit: Callable[[Any], None], stop: threading.Event) -> None:
        try:
            session.measured_step()
            with session.manager.pause():
                if not stop.is_set():
                    self._generate(session, emit, stop)
        except Exception as error:
            emit(error)

    def _generate(self, session: DemoSession, emit: Callable[[Any], None], stop: threading.Event) -> None:
        started = time.perf_counter()
        output = session.generate(
            self.input_ids,
            head=session.head if self.draft else None,
            streamer=Streamer(lambda tokens: emit(Committed(time.perf_counter() - started, tokens))),
            stopping_criteria=[Ended(stop.is_set)],
            **self.settings,
        )
        synchronize(session.model.device)
        emit(Finished(time.perf_counter() - started, getattr(output, "dspark", None)))


class Ended(StoppingCriteria):
    """Ends every row once a condition holds."""

    def __init__(self, condition: Callable[[], bool]):
        self.condition = condition

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.condition(), dtype=torch.bool, device=input_ids.device)
