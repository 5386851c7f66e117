"""The decoding rounds of DSpark: draft, schedule, verify, accept, commit.

Every row of the batch decodes at its own pace. Between rounds a row is its committed tokens; the last of them, the
anchor, is not yet in the target's cache. The host waits for the device once a round, in `commit`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..modeling_dspark import DraftBlock, DSparkHead
from .acceptance import Verdict, accept_greedy, accept_sampled
from .cache import on_device
from .compatibility import check_inputs, check_pair, check_prompt
from .drafting import Drafter
from .processors import BlockProcessors
from .stats import DSparkGenerateOutput, DSparkStats, Stopwatch
from .stopping import Stopping
from .target import Target


@dataclass
class Row:
    """One sequence: its place in the batch, the prompt as given (padding included) and the committed tokens."""

    index: int
    prompt: list[int]
    committed: list[int] = field(default_factory=list)

    @property
    def sequence(self) -> list[int]:
        return self.prompt + self.committed


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    assistant_model: DSparkHead,
    streamer: Any = None,
    attention_mask: torch.Tensor | None = None,
    **model_kwargs,
) -> torch.Tensor | DSparkGenerateOutput:
    """The decoding method that `model.generate(..., assistant_model=head)` runs; see [`Rounds`].

    Args:
        input_ids: [R, P], left-padded where prompts differ in length. attention_mask: [R, P], `None` for no padding.

    Returns:
        sequences [R, P + new tokens], right-padded where rows ended early, or with `return_dict_in_generate` a
        [`DSparkGenerateOutput`] around them.
    """
    check_pair(model, assistant_model)
    check_inputs(model_kwargs)
    rounds = Rounds(
        model,
        assistant_model,
        input_ids,
        attention_mask,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
    )
    sequences = rounds.run()
    if not generation_config.return_dict_in_generate:
        return sequences
    return DSparkGenerateOutput(sequences=sequences, dspark=rounds.stats)


class Rounds:
    """The state of one call and the steps of a round. Tensors hold the active rows only, in the order of `rows`."""

    def __init__(self, model, head, input_ids, attention_mask, processors, criteria, config, streamer):
        self.target = Target(model, head.config.target_layer_ids)
        self.drafter = Drafter(head, model, len(input_ids))
        self.processors = BlockProcessors(processors, config.do_sample, len(input_ids))
        self.stopping = Stopping(criteria)
        self.streamer = streamer
        self.pad = config._pad_token_tensor.item() if config._pad_token_tensor is not None else 0
        self.stats = DSparkStats.empty(len(input_ids), head.config.block_size)
        self.stopwatch = Stopwatch(self.target.device)

        self.input_ids = input_ids
        self.prompts = _without_padding(input_ids, attention_mask)
        check_prompt(model, max(map(len, self.prompts)))
        self.all_rows = [Row(r, ids) for r, ids in enumerate(input_ids.tolist())]
        self.rows = self.all_rows
        self.cache = self.target.new_cache(len(self.rows))
        # Target states of the tokens committed last, [R, C, m*d]; row r has counts[r] of them.
        self.features: torch.Tensor
        self.counts: list[int]
        self.anchors: torch.Tensor

    def run(self) -> torch.Tensor:
        with self.stopwatch.part("prefill"):
            verdict = self.prefill()
        self.commit(verdict)
        while self.rows:
            with self.stopwatch.part("draft"):
                block = self.draft()
            lengths = self.schedule(block)
            with self.stopwatch.part("verify"):
                logits = self.verify(block, lengths)
            with self.stopwatch.part("other"):
                verdict = self.accept(block, lengths, logits)
                self.commit(verdict, block, lengths)
        if self.streamer is not None:
            self.streamer.end()
        self._finish_stats()
        return self._sequences()

    # -- The steps ----------------------------------------------------------------------------------------------

    def prefill(self) -> Verdict:
        """A round without a draft: the whole prompts, right-padded inside; only their last logits are computed."""
        longest = max(map(len, self.prompts))
        device = self.target.device
        tokens = on_device([ids + [self.pad] * (longest - len(ids)) for ids in self.prompts], device)
        last = [len(ids) - 1 for ids in self.prompts]
        keep = sorted(set(last))
        logits, self.features = self.target.forward(tokens, self.cache, on_device(keep, device))
        columns = on_device([keep.index(position) for position in last], device)
        logits = logits[torch.arange(len(last), device=device), columns][:, None]
        self.counts = [len(ids) for ids in self.prompts]
        nothing = torch.zeros(len(last), dtype=torch.long, device=device)
        return Verdict(nothing, self.processors.choose(self._processed(logits, None)[:, 0]))

    def draft(self) -> DraftBlock | None:
        """A block for every row, no longer than any row can still use; `None` when one token is all that is left."""
        length = min(self.stats.block_size, max(map(self._room, self.rows)))
        if length == 0:
            return None
        select = self.processors.drafting(self._prefixes(), self._row_indices())
        return self.drafter.draft(self.anchors, self.features, self.counts, length, select)

    def schedule(self, block: DraftBlock | None) -> list[int]:
        """How many drafts of each row to verify: all, as far as the length limit leaves room for."""
        drafted = block.tokens.shape[1] if block is not None else 0
        return [min(drafted, self._room(row)) for row in self.rows]

    def verify(self, block: DraftBlock | None, lengths: list[int]) -> torch.Tensor:
        """Processed target logits [R, L+1, V] of the anchor and the drafts behind it, L = max(lengths)."""
        tokens = self.anchors[:, None]
        if max(lengths):
            tokens = torch.cat([tokens, block.tokens[:, : max(lengths)].to(tokens.device)], dim=1)
        logits, self.features = self.target.forward(tokens, self.cache)
        return self._processed(logits, tokens[:, 1:])

    def accept(self, block: DraftBlock | None, lengths: list[int], logits: torch.Tensor) -> Verdict:
        longest, device = max(lengths), logits.device
        if longest == 0:
            nothing = torch.zeros(len(lengths), dtype=torch.long, device=device)
            return Verdict(nothing, self.processors.choose(logits[:, 0]))
        drafts = block.tokens[:, :longest].to(device)
        limits = on_device(lengths, device)
        if block.logits is None:
            return accept_greedy(logits, drafts, limits)
        return accept_sampled(logits, drafts, block.logits[:, :longest].to(device), limits)

    def commit(self, verdict: Verdict, block: DraftBlock | None = None, lengths: list[int] | None = None) -> None:
        """Append accepted drafts and the target's own token; lengthen the cache; stream; drop rows that ended.

        Without `lengths` the token is the prefill's, which belongs to no round.
        """
        accepted, next_tokens, drafts = self._to_host(block, verdict)
        if lengths is not None:
            self.stats.rounds += 1
            self.counts = [count + 1 for count in accepted]
        self.cache.commit(self.counts)
        self.anchors = verdict.next_tokens
        active = []
        for r, row in enumerate(self.rows):
            new = drafts[r][: accepted[r]] + [next_tokens[r]]
            kept, ended = self.stopping.kept(row.sequence, new, self.input_ids.device)
            if lengths is not None:
                self.stats.record(row.index, len(drafts[r]), lengths[r], min(accepted[r], len(kept)), len(kept))
            row.committed += kept
            if self.streamer is not None:
                self.streamer.put(torch.tensor(kept))
            if not ended:
                active.append(r)
        self._keep(active)

    # -- Helpers ------------------------------------------------------------------------------------------------

    def _room(self, row: Row) -> int:
        """Drafts that row could commit before its length limit, with one place left for the target's own token."""
        if self.stopping.max_length is None:
            return self.stats.block_size
        return self.stopping.max_length - len(row.prompt) - len(row.committed) - 1

    def _processed(self, logits: torch.Tensor, drafts: torch.Tensor | None) -> torch.Tensor:
        return self.processors.on_target(logits, self._prefixes(drafts), self._row_indices())

    def _prefixes(self, drafts: torch.Tensor | None = None) -> list[torch.Tensor] | None:
        """Tokens of every row as plain generate holds them, with drafts behind; `None` when no processor looks."""
        if not self.processors.needs_prefix:
            return None
        prefixes = [on_device(row.sequence, self.target.device) for row in self.rows]
        if drafts is None:
            return prefixes
        return [torch.cat([prefix, tokens]) for prefix, tokens in zip(prefixes, drafts, strict=True)]

    def _row_indices(self) -> list[int]:
        return [row.index for row in self.rows]

    def _to_host(self, block: DraftBlock | None, verdict: Verdict) -> tuple[list[int], list[int], list[list[int]]]:
        """The one transfer of a round: accepted counts, next tokens and drafts in a single tensor."""
        columns = [verdict.accepted[:, None], verdict.next_tokens[:, None]]
        if block is not None:
            columns.append(block.tokens.to(verdict.accepted.device))
        table = torch.cat(columns, dim=1).tolist()
        return [line[0] for line in table], [line[1] for line in table], [line[2:] for line in table]

    def _keep(self, active: list[int]) -> None:
        """Go on with the given rows only; their neighbours' slots are freed."""
        if len(active) == len(self.rows):
            return
        self.rows = [self.rows[r] for r in active]
        if not active:
            return
        index = on_device(active, self.anchors.device)
        self.anchors, self.features = self.anchors[index], self.features[index]
        self.counts = [self.counts[r] for r in active]
        self.cache.keep(active)
        self.drafter.cache.keep(active)

    def _finish_stats(self) -> None:
        for name, seconds in self.stopwatch.read().items():
            setattr(self.stats, f"{name}_seconds", seconds)

    def _sequences(self) -> torch.Tensor:
        longest = max(len(row.committed) for row in self.all_rows)
        new = [row.committed + [self.pad] * (longest - len(row.committed)) for row in self.all_rows]
        return torch.cat([self.input_ids, torch.tensor(new, device=self.input_ids.device)], dim=1)


def _without_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The tokens of every prompt that the attention mask lets through."""
    if attention_mask is None:
        return input_ids.tolist()
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    for row, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"Prompt {row} of the batch has no tokens that its attention mask lets through.")
    return prompts
