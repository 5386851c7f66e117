"""Where a row ends: stopping criteria applied token by token inside a committed block."""

from collections.abc import Callable

import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)


class Stopping:
    """Applies a `StoppingCriteriaList` to the tokens that a round commits to one row.

    Length and end-of-sequence are decided from the token itself; stop strings and the clock are asked once a token,
    with the sequence that they would have seen in plain decoding.

    Attributes:
        foreign: criteria of which nothing is known; those need `lockstep`.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        self.max_length: int | None = criteria.max_length
        self.eos_ids: set[int] = set()
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.eos_ids |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is not MaxLengthCriteria:
                self.others.append(criterion)
        self.foreign = [other for other in self.others if type(other) not in (MaxTimeCriteria, StopStringCriteria)]

    def kept(
        self, committed: list[int], length: int, sequence: Callable[[], list[int]], device: torch.device
    ) -> tuple[list[int], bool]:
        """The committed tokens of a row up to and including the one that ends it, and whether one does.

        Args:
            length: tokens that the row had before. sequence: gives those.
        """
        for count, token in enumerate(committed, start=1):
            ended = token in self.eos_ids
            ended |= self.max_length is not None and length + count >= self.max_length
            if self.others:
                ids = torch.tensor([sequence() + committed[:count]], device=device)
                ended |= bool(self.others(ids, None).any())
            if ended:
                return committed[:count], True
        return committed, False
