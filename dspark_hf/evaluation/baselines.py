"""What a head is measured against beside plain decoding: other ways to draft, of transformers and of other heads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from ..modeling_dspark import DSparkHead

# `mtp`: the target's own layers that predict several tokens, by `use_mtp`. `lookup`: n-grams of the text so far.
# `assistant`: a small model. `baseline-head`: another head, a DFlash one for instance, in our rounds.
BASELINES = ("mtp", "lookup", "assistant", "baseline-head")
# Those that run in transformers' assisted loop, as `stock` does: one row only.
ONE_ROW = ("stock", "mtp", "lookup", "assistant")
# Tokens that are looked up at most, as in transformers' own examples.
LOOKED_UP = 10


@dataclass(frozen=True)
class Others:
    """What the baselines draft with, where that is not the target itself."""

    assistant: PreTrainedModel | None = None
    head: DSparkHead | None = None

    @property
    def methods(self) -> list[str]:
        """The baselines that are there for it."""
        given = {"assistant": self.assistant, "baseline-head": self.head}
        return [method for method, drafter in given.items() if drafter is not None]

    def check(self, model: PreTrainedModel, methods: list[str]) -> None:
        """Raise a `ValueError`, before anything is measured, for a baseline that there is not for a target."""
        if "mtp" in methods and not hasattr(GenerationConfig(), "use_mtp"):
            raise ValueError(f"transformers {transformers.__version__} has no `use_mtp`: leave out the method mtp.")
        if "mtp" in methods and not getattr(model.config.get_text_config(decoder=True), "num_mtp_layers", None):
            raise ValueError(
                f"{type(model).__name__} has no MTP layers that transformers decodes with (`num_mtp_layers` in its "
                "config): leave out the method mtp."
            )
        missing = [
            method for method in ("assistant", "baseline-head") if method in methods and method not in self.methods
        ]
        if missing:
            raise ValueError(f"The method {missing[0]} needs what drafts for it: give --{missing[0]}.")

    def arguments(self, method: str) -> dict[str, Any]:
        """Of `generate`, for a baseline."""
        return {
            "mtp": {"use_mtp": True},
            "lookup": {"prompt_lookup_num_tokens": LOOKED_UP},
            "assistant": {"assistant_model": self.assistant},
            "baseline-head": {"assistant_model": self.head},
        }[method]


class RoundCounter:
    """A streamer that notes how many tokens each round of transformers' assisted loop commits. The prompt's own pass
    and what it commits are no round, as in ours.

    Attributes:
        committed: tokens of every round.
    """

    def __init__(self):
        self.given: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.given.append(tokens.numel())

    def end(self) -> None:
        pass

    @property
    def committed(self) -> list[int]:
        # First the prompt, then what its pass brought.
        return self.given[2:]


@contextmanager
def keeping_mtp() -> Iterator[None]:
    """Within this context a target's MTP layers are read from its checkpoint once and kept with it: transformers reads
    them in every call, which would be measured as decoding."""
    try:
        from transformers.modeling_layers import MtpModel
    except ImportError:
        yield
        return
    load = MtpModel.__dict__["from_pretrained"]

    def kept(model: PreTrainedModel, *args, **kwargs) -> torch.nn.Module:
        # Not as an attribute that the target would take for one of its modules.
        if "_dspark_mtp" not in vars(model):
            vars(model)["_dspark_mtp"] = load.__get__(None, MtpModel)(model, *args, **kwargs)
        return vars(model)["_dspark_mtp"]

    MtpModel.from_pretrained = staticmethod(kept)
    try:
        yield
    finally:
        MtpModel.from_pretrained = load
