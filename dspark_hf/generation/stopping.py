"""Where a row ends: stopping criteria applied token by token inside a committed block."""

import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from .rows import Row


class Stopping:
    """Applies a `StoppingCriteriaList` to the tokens that a round commits to one row.

    Length and end-of-sequence are decided from the token itself; stop strings and the clock are asked once a token,
    with the sequence that they would have seen in plain decoding.

    Attributes:
        has_foreign: whether there are criteria of which nothing is known; those need `lockstep`.
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
        self.has_foreign = any(type(other) not in (MaxTimeCriteria, StopStringCriteria) for other in self.others)

    def kept(self, row: Row, committed: list[int], device: torch.device) -> tuple[list[int], bool]:
        """The committed tokens of a row up to and including the one that ends it, and whether one does."""
        for count, token in enumerate(committed, start=1):
            ended = token in self.eos_ids
            ended |= self.max_length is not None and row.length + count >= self.max_length
            if self.others:
                ids = torch.tensor([row.sequence + committed[:count]], device=device)
                ended |= bool(self.others(ids, None).any())
            if ended:
                return committed[:count], True
        return committed, False
