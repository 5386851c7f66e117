"""The rounds of a batch whose requests come and go, in a thread of their own."""

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..generation.drafting import Drafter
from ..generation.engine import Engine
from ..generation.experience import scheduler_for, store
from ..generation.modules import is_private
from ..generation.observers import CommittedRound, Observer, UseObserver
from ..generation.target import Target
from ..modeling_dspark import DSparkHead
from ..scheduling.scheduler import LoadSchedule
from .memory import give_back
from .prefixes import KeptTexts, Reader
from .request import Request
from .router import Router
from .threads import release_pool

logger = logging.get_logger(__name__)

# Seconds between looks at the queue when nothing is to be done, and between those at which a host gets memory back.
IDLE = 0.1
TIDY = 5.0


class BatchLoop:
    """Decodes what is put into its queues, until it is told to stop; what it brings goes to a router.

    Args:
        defaults: what the schedule goes by. slots: requests that decode at once. texts: of ended requests.
        piece: tokens of a prompt that are read between two rounds, `None` for all.

    Attributes:
        incoming, canceled: requests to decode, ids of those to end. waiting: those without a slot. active: the others.
        drafts: whether rounds draft; may be set while they run. router: tells callers. model_lock: held by whoever uses
            the model, the rounds or a caller that has paused them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: DSparkHead,
        defaults: GenerationConfig,
        slots: int,
        texts: KeptTexts,
        piece: int | None,
    ):
        self.model, self.head, self.defaults = model, head, defaults
        self.slots, self.texts, self.piece = slots, texts, piece
        self.incoming: queue.Queue[Request] = queue.Queue()
        self.canceled: queue.Queue[str] = queue.Queue()
        self.waiting: deque[Request] = deque()
        self.reading: deque[Reader] = deque()
        self.active: list[Request] = []
        self.router, self.drafts = Router(), True
        self.model_lock, self.wake_up = threading.Lock(), threading.Event()
        self.engine = self._new_engine()
        self.tidied = time.monotonic()
        self.thread: threading.Thread | None = None
        self.is_stopping = self.is_aborting = False

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return self.incoming.qsize() + len(self.waiting)

    def is_running(self) -> bool:
        """Whether the thread is."""
        return self.thread is not None and self.thread.is_alive()

    def start(self) -> None:
        """Begin to decode."""
        self.is_stopping = self.is_aborting = False
        # Whoever has loaded the model has most likely computed, and waits from now on.
        release_pool()
        self.thread = threading.Thread(target=self._run, name="dspark-batching", daemon=True)
        self.thread.start()

    def stop(self, now: bool) -> None:
        """End when all requests have, or `now`; requests that have not ended fail then."""
        self.is_aborting |= now
        self.is_stopping = True
        self.wake_up.set()

    def _run(self) -> None:
        device = self.model.device
        try:
            # Which device is the present one is a matter of each thread.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                while not self.is_aborting and self._turn():
                    pass
        finally:
            self.is_stopping = True
            self._fail([*self.active, *self.waiting, *_drained(self.incoming)], "The manager was stopped.")
            self.active, self.waiting = [], deque()
            self.engine.close()
            if isinstance(self.engine.planner.scheduler, LoadSchedule):
                store(self.head, self.engine.target, self.defaults.do_sample)

    def _turn(self) -> bool:
        """A round, or a wait for requests. Returns whether to go on."""
        self.waiting.extend(_drained(self.incoming))
        for request_id in _drained(self.canceled):
            self._cancel(request_id)
        self._admit()
        if not self.active:
            if self.is_stopping and not self.waiting and self.incoming.empty():
                return False
            release_pool()
            self.wake_up.wait(IDLE)
            self.wake_up.clear()
            return True
        try:
            with self.model_lock:
                self._read()
                self.engine.planner.drafts = self.drafts
                if self.engine.busy:
                    self.engine.step()
        except Exception as error:
            # What a round leaves behind is not known; the requests that wait go on with a new engine.
            logger.error(f"A round failed, and the requests in it with it: {error}", exc_info=True)
            self._fail(self.active, f"{type(error).__name__}: {error}")
            self.active, self.reading = [], deque()
            self.engine.close()
            self.engine = self._new_engine()
            return True
        self._tell()
        if self.model.device.type == "cpu" and time.monotonic() - self.tidied > TIDY:
            give_back()
            self.tidied = time.monotonic()
        return True

    def _admit(self) -> None:
        """Let requests in that wait, in their order, as long as there are slots."""
        while self.waiting and len(self.active) < self.slots:
            request = self.waiting.popleft()
            request.started = time.perf_counter()
            self.active.append(request)
            self.texts.begin(request.row)
            if self.piece is not None and len(request.row.prompt) > self.piece:
                self.reading.append(Reader(self.engine.target, self.engine.drafter, request.row, self.texts))
            else:
                self.engine.add([request.row])

    def _read(self) -> None:
        """A piece of the prompt that has been read longest; what is left of it is read as it joins."""
        if not self.reading:
            return
        reader = self.reading[0]
        with self.engine.mode():
            reader.read(self.piece)
        if len(reader.row.prompt) <= self.piece:
            self.engine.add([self.reading.popleft().row])

    def _tell(self) -> None:
        """Tell callers what the round brought."""
        now, outputs = time.perf_counter(), []
        for request in self.active:
            row = request.row
            if request.timestamps is not None:
                request.timestamps += [now] * (len(row.committed) - request.reported)
            if row.ended:
                request.ended = now
            if row.ended or (request.streaming and len(row.committed) > request.reported):
                outputs.append(request.output())
            request.reported = len(row.committed)
        self.active = [request for request in self.active if not request.row.ended]
        self.router.deliver_batch(outputs)

    def _cancel(self, request_id: str) -> None:
        for place in (self.waiting, self.active):
            for request in [own for own in place if own.id == request_id]:
                place.remove(request)
                self.reading = deque(reader for reader in self.reading if reader.row is not request.row)
                self.engine.drop(request.row)
                request.ended = time.perf_counter()
                self.router.deliver(request.output())

    def _fail(self, requests: Sequence[Request], error: str) -> None:
        for request in requests:
            request.row.error, request.row.ended, request.ended = error, True, time.perf_counter()
            self.router.deliver(request.output())

    def _new_engine(self) -> Engine:
        target = Target(self.model, self.head.config.target_layer_ids)
        drafter = Drafter(self.head, self.model, self.slots, self.slots)
        scheduler = scheduler_for(target, drafter, self.slots, self.defaults)
        observers = [RequestObserver(self), UseObserver()]
        private = is_private(self.model, self.head)
        return Engine(target, drafter, scheduler, self.slots, None, self.texts, None, observers, private, isolates=True)


class RequestObserver(Observer):
    """Notes of requests what becomes of their drafts, and where it is wanted how likely their tokens were, after
    processors."""

    def __init__(self, loop: BatchLoop):
        self.loop = loop

    def on_round(self, done: CommittedRound) -> None:
        requests = {id(request.row): request for request in self.loop.active}
        drafting = set() if done.plan is None else set(done.plan.rows)
        for r, row in enumerate(done.rows):
            request, kept = requests[id(row)], done.kept[r]
            if done.plan is not None:
                request.rounds += 1
                request.drafted += len(done.host.drafts[r]) if r in drafting else 0
                request.verified += int(done.host.verified[r])
                request.accepted += min(int(done.host.accepted[r]), len(kept))
            if kept and request.logprobs is not None:
                logprobs = done.logits[r, : len(kept)].float().log_softmax(dim=-1)
                tokens = torch.tensor(kept, device=logprobs.device)
                request.logprobs += logprobs.gather(1, tokens[:, None])[:, 0].tolist()


def _drained(items: queue.Queue) -> list:
    found = []
    while not items.empty():
        found.append(items.get_nowait())
    return found
