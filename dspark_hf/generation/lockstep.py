"""Rows that move together, for processors and criteria that must be called as plain `generate` calls them.

An application's own processor may follow a grammar or count tokens, its own criterion may have a budget for every row
by its place: each such call moves a state on. So every call here is one that plain decoding makes: the whole batch, all
rows at one length, ended ones padded, each token once and in order, nothing that is rejected or lies behind an end.
"""

from collections.abc import Callable

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..modeling_dspark import DraftBlock
from .acceptance import Verdict
from .processors import is_pure
from .ranks import Ranks
from .round import VerifyLayout, verdict_of
from .stopping import Stopping


def is_needed(rows: int, processors: LogitsProcessorList, stopping: Stopping) -> bool:
    """Whether a call of so many rows must decode in lockstep. Beside foreign processors and criteria that is so where
    plain decoding goes on with rows that have ended until all have: without any end-of-sequence token."""
    together = rows > 1 and bool(stopping.others) and not stopping.eos_ids
    return together or bool(stopping.foreign) or not all(map(is_pure, processors))


class Lockstep:
    """The batch as plain `generate` holds it.

    Args:
        input_ids: [B, P]. processors, criteria: of the call. pad: what ended rows are filled with. pads_ended: whether
            rows that end leave; otherwise they go on until all have been told to. keeps_scores: whether the call
            returns scores, which criteria then see. ranks: the processes that must come to the same end.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        pad: int,
        pads_ended: bool,
        keeps_scores: bool,
        ranks: Ranks,
    ):
        self.input_ids, self.processors, self.criteria, self.ranks = input_ids, processors, criteria, ranks
        self.pad, self.pads_ended = pad, pads_ended
        self.stop_requested = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.scores: tuple[torch.Tensor, ...] | None = () if keeps_scores else None

    def accept(
        self,
        logits: torch.Tensor,
        drafts: torch.Tensor | None,
        block: DraftBlock | None,
        layout: VerifyLayout,
        rows: torch.Tensor,
        choose: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[Verdict, torch.Tensor, list[bool]]:
        """As `round.accept`, a token of all rows after the other, and which of them end. All commit as many.

        Args:
            rows: [R], places in the batch. choose: tokens [R] from processed logits [R, V].
        """
        logits = logits.float()
        limits = torch.zeros_like(rows) if layout.verify_lens is None else layout.verify_lens
        accepted, columns = torch.zeros_like(rows), []
        for j in range(logits.shape[1]):
            columns.append(self._process(logits[:, j], rows))
            if j < layout.most:
                sampled_from = None if block.logits is None else block.logits[:, j : j + 1]
                # What would come behind an accepted token is not asked yet.
                twice = torch.stack([columns[-1], columns[-1]], dim=1)
                verdict = verdict_of(twice, drafts[:, j : j + 1], sampled_from, (limits > j).to(limits.dtype))
                goes_on = verdict.accepted
                tokens = torch.where(goes_on > 0, drafts[:, j], verdict.next_tokens)
            else:
                goes_on, tokens = torch.zeros_like(rows), choose(columns[-1])
            accepted = accepted + goes_on
            ended = self._append(tokens, rows).tolist()
            ended = self.ranks.agreed(lambda own=ended: own)
            if any(ended) or not goes_on.all():
                break
        # A row whose last token was a draft has no token of the target's own behind it.
        return Verdict(accepted, tokens), torch.stack(columns, dim=1), ended

    def _process(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Processed logits [R, V] of the next token from logits [R, V] of the batch's rows [R]; in between, others are
        zeros."""
        whole = logits.new_zeros(len(self.input_ids), logits.shape[1]).index_copy_(0, rows, logits)
        whole = self.processors(self.input_ids, whole)
        if self.scores is not None:
            self.scores += (whole,)
        return whole[rows]

    def _append(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Take in a token [R] for each of the rows [R]; returns which of them end, [R] bool."""
        column = self.input_ids.new_full((len(self.input_ids),), self.pad).index_copy_(0, rows, tokens)
        self.input_ids = torch.cat([self.input_ids, column[:, None]], dim=1)
        self.stop_requested |= self.criteria(self.input_ids, self.scores).to(self.stop_requested.device)
        return self.stop_requested[rows] if self.pads_ended else self.stop_requested.all().expand(len(rows))
