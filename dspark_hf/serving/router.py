"""Who is told of a request's results."""

import asyncio
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from transformers.generation.continuous_batching.requests import GenerationOutput

Handler = Callable[[GenerationOutput], None]


class Router:
    """Takes results to the handlers of their requests, and those of requests that have none to a queue."""

    def __init__(self):
        self.output_queue: queue.Queue[GenerationOutput] = queue.Queue()
        self.result_handlers: dict[str, tuple[Handler, asyncio.AbstractEventLoop | None]] = {}
        self._lock = threading.Lock()

    def register(self, request_id: str, handler: Handler, loop: asyncio.AbstractEventLoop | None) -> None:
        """Call `handler` in an event loop, or for `None` in the thread that delivers, up to the last result."""
        with self._lock:
            self.result_handlers[request_id] = handler, loop

    def forget(self, request_id: str) -> None:
        """Drop the handler of a request."""
        with self._lock:
            self.result_handlers.pop(request_id, None)

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: Sequence[GenerationOutput]) -> None:
        """Tell of all outputs; every event loop is woken once."""
        calls = defaultdict(list)
        with self._lock:
            for output in outputs:
                handler, loop = self.result_handlers.get(output.request_id, (self.output_queue.put, None))
                calls[loop].append(partial(handler, output))
                if output.is_finished():
                    self.result_handlers.pop(output.request_id, None)
        for loop, own in calls.items():
            if loop is None:
                _run(own)
            else:
                loop.call_soon_threadsafe(_run, own)


def _run(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
