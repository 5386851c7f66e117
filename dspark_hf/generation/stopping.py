"""Where a row ends: stopping criteria applied token by token inside a committed block."""

import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class Stopping:
    """Applies a `StoppingCriteriaList` to the tokens that a round commits to one row.

    Length and end-of-sequence are decided from the token itself; every other criterion is asked once a token, with
    the sequence it would have seen in plain decoding.
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

    def kept(self, sequence: list[int], committed: list[int], device: torch.device) -> tuple[list[int], bool]:
        """The committed tokens up to and including the one that ends the row, and whether one does.

        Args:
            sequence: the row so far as plain generate holds it, left padding included.
        """
        for count, token in enumerate(committed, start=1):
            if self._ends(sequence, committed[:count], token, device):
                return committed[:count], True
        return committed, False

    def _ends(self, sequence: list[int], new: list[int], token: int, device: torch.device) -> bool:
        ended = token in self.eos_ids
        ended |= self.max_length is not None and len(sequence) + len(new) >= self.max_length
        if self.others:
            # Asked at every token, ended or not: a criterion may count its calls.
            ended |= bool(self.others(torch.tensor([sequence + new], device=device), None).any())
        return ended
