"""What a user says of scheduling: the switch on a head's `generation_config`, or on a call's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import GenerationConfig

NAMES = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
SCHEDULES = ("load", "constant")


_asked: ContextVar[Mapping[str, Any]] = ContextVar("dspark_settings", default=MappingProxyType({}))


@contextmanager
def asked_of_the_call(settings: dict[str, Any]) -> Iterator[None]:
    """Within this context `settings`, by their names in a generation config, count instead of the head's."""
    token = _asked.set(settings)
    try:
        yield
    finally:
        _asked.reset(token)


@dataclass(frozen=True)
class Settings:
    """The switch, as a call or else the head's `generation_config` has it.

    most: positions to draft at most. schedule: "load" or "constant". threshold: drafts whose survival is lower are not
    verified; `None` for no such limit.
    """

    most: int
    schedule: str
    threshold: float | None

    @classmethod
    def read(cls, config: GenerationConfig, block_size: int) -> "Settings":
        """Raises ValueError for values that mean nothing to a DSpark head."""
        most, schedule, threshold = (_asked.get().get(name, getattr(config, name)) for name in NAMES)
        most = block_size if most is None else most
        schedule = schedule or "load"
        if not isinstance(most, int) or most < 1:
            raise ValueError(
                f"`num_assistant_tokens` must be 1 or more, got {most!r}. To decode without "
                "drafts leave out `assistant_model`."
            )
        if schedule not in SCHEDULES:
            raise ValueError(
                f"`num_assistant_tokens_schedule` must be one of {', '.join(SCHEDULES)}, got {schedule!r}."
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"`assistant_confidence_threshold` must be between 0 and 1, got {threshold!r}.")
        return cls(min(most, block_size), schedule, threshold)
