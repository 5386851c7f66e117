"""What a user says of scheduling: the switch on a head's `generation_config`."""

from dataclasses import dataclass

from transformers import GenerationConfig

SCHEDULES = ("load", "constant")


@dataclass(frozen=True)
class Settings:
    """The switch, as a head's `generation_config` has it.

    most: positions to draft at most. schedule: "load" or "constant". threshold: drafts whose survival is lower are not
    verified; `None` for no such limit.
    """

    most: int
    schedule: str
    threshold: float | None

    @classmethod
    def read(cls, config: GenerationConfig, block_size: int) -> "Settings":
        """Raises ValueError for values that mean nothing to a DSpark head."""
        most = block_size if config.num_assistant_tokens is None else config.num_assistant_tokens
        schedule = config.num_assistant_tokens_schedule or "load"
        threshold = config.assistant_confidence_threshold
        if not isinstance(most, int) or most < 1:
            raise ValueError(
                f"`head.generation_config.num_assistant_tokens` must be 1 or more, got {most!r}. To decode without "
                "drafts leave out `assistant_model`."
            )
        if schedule not in SCHEDULES:
            raise ValueError(
                f"`head.generation_config.num_assistant_tokens_schedule` must be one of {', '.join(SCHEDULES)}, got "
                f"{schedule!r}."
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(
                f"`head.generation_config.assistant_confidence_threshold` must be between 0 and 1, got {threshold!r}."
            )
        return cls(min(most, block_size), schedule, threshold)
