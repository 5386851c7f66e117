"""How busy the device is: the rows that this call decodes, and those of everybody else."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch


class LoadSensor(Protocol):
    """What an embedding application may set as `head.load_sensor`; called once a round, so it should be quick.

    ```python
    head.load_sensor = lambda: server.requests_on_this_card()
    ```
    """

    def __call__(self) -> int:
        """Rows decoded on the device by others, beyond the `generate` calls of this process."""


@dataclass(frozen=True)
class Load:
    """rows: active in this call. others: active on the same device elsewhere, as far as known."""

    rows: int
    others: int

    @property
    def total(self) -> int:
        return self.rows + self.others


_rows_in_flight: Counter[torch.device] = Counter()
_lock = threading.Lock()


class Call:
    """A `generate` call in flight; `rows` may fall as rows end."""

    def __init__(self, device: torch.device, rows: int):
        self.device, self.rows = device, 0
        self.set_rows(rows)

    def set_rows(self, rows: int) -> None:
        with _lock:
            _rows_in_flight[self.device] += rows - self.rows
            self.rows = rows

    def load(self, sensor: LoadSensor | None) -> Load:
        """The load now.

        Raises:
            ValueError: when the sensor gives something other than a count.
        """
        others = _rows_in_flight[self.device] - self.rows
        if sensor is None:
            return Load(self.rows, others)
        external = sensor()
        if not isinstance(external, int) or external < 0:
            raise ValueError(f"`head.load_sensor` must return a number of rows, 0 or more; it returned {external!r}.")
        return Load(self.rows, others + external)


@contextmanager
def in_flight(device: torch.device, rows: int) -> Iterator[Call]:
    """Counts a call's rows on the device for as long as it runs."""
    call = Call(device, rows)
    try:
        yield call
    finally:
        call.set_rows(0)
