"""What a user says of scheduling: the switch on a head's `generation_config`, or on a call's."""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

DRAFT_SETTINGS = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
# Those of a head alone: a call has no name for what it keeps of the context.
HEAD_SETTINGS = (*DRAFT_SETTINGS, "draft_window")
SCHEDULES = ("load", "constant")


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
    def read(cls, head: GenerationConfig, gamma: int, call: GenerationConfig | None = None) -> "Settings":
        """Of a head's generation config, and what a call says instead, as the hook has noted it on the call's.

        Raises:
            ValueError: for values that mean nothing to a DSpark head.
        """
        asked: dict[str, Any] = getattr(call, "_dspark_asked", {})
        most, schedule, threshold = (asked.get(name, getattr(head, name)) for name in DRAFT_SETTINGS)
        most = gamma if most is None else most
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
        if most > gamma:
            logger.warning_once(
                f"`num_assistant_tokens={most}`: the head's block holds {gamma} drafts, no more are made."
            )
        return cls(min(most, gamma), schedule, threshold)
