"""Requests to the engine that all visitors share."""

import queue
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ..serving.manager import DSparkBatchingManager
from ..serving.request import RequestOutput
from .session import ticks


class Requests:
    """Requests of a visitor, which decode beside those of others. What has not ended does when the context is left."""

    def __init__(self, manager: DSparkBatchingManager):
        self.manager = manager
        self.news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self.open: set[str] = set()

    def __enter__(self) -> "Requests":
        return self

    def __exit__(self, *exc: Any) -> None:
        for request_id in list(self.open):
            self.cancel(request_id)

    def ask(self, input_ids: Sequence[int], settings: dict[str, Any]) -> str:
        """Have a prompt continued, with settings as `generate` takes them. Returns the request's id."""
        request_id = uuid.uuid4().hex
        self.manager.register_result_handler(request_id, self.news.put)
        try:
            self.manager.add_request(input_ids, request_id, streaming=True, record_timestamps=True, **settings)
        except ValueError:
            self.manager.forget(request_id)
            raise
        self.open.add(request_id)
        return request_id

    def cancel(self, request_id: str) -> None:
        """End a request."""
        self.open.discard(request_id)
        self.manager.cancel_request(request_id)

    def results(self) -> Iterator[RequestOutput | None]:
        """News of open requests, and `None` every [`TICK`] seconds.

        Raises:
            RuntimeError: when one fails.
        """
        for output in ticks(self.news):
            if output is None:
                yield None
            elif output.request_id in self.open:
                if output.error is not None:
                    raise RuntimeError(output.error)
                if output.is_finished():
                    self.open.discard(output.request_id)
                yield output
