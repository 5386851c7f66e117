"""The decoding rounds of DSpark: draft, schedule, verify, accept, commit.

Every row of the batch decodes at its own pace. Between rounds a row is its committed tokens; the last of them, the
anchor, is not yet in the target's cache. The host waits for the device once a round, in `commit`.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..modeling_dspark import DraftBlock, DSparkHead
from .acceptance import Verdict, accept_greedy, accept_sampled
from .batch import Row, read_rows
from .cache import on_device
from .compatibility import check_inputs, check_positions, check_prompt
from .drafting import Drafter
from .outputs import Recorder
from .past import Continuation, with_unseen
from .processors import BlockProcessors
from .stats import DSparkGenerateOutput, DSparkStats, Stopwatch
from .stopping import Stopping
from .target import Target, TargetPass


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
    past_key_values: Cache | None = None,
    position_ids: torch.Tensor | None = None,
    **model_kwargs,
) -> torch.Tensor | DSparkGenerateOutput:
    """The decoding method that `model.generate(..., assistant_model=head)` runs; see [`Rounds`].

    Args:
        input_ids: [R, P], left-padded where prompts differ in length. attention_mask: [R, P], `None` for no padding.
        position_ids: [R, P]; only those that count the tokens are taken.
        past_key_values: a cache to continue, which is brought up to date; `generate` passes an empty one otherwise.

    Returns:
        sequences [R, P + new tokens], right-padded where rows ended early, or with `return_dict_in_generate` a
        [`DSparkGenerateOutput`] around them.
    """
    check_inputs(model_kwargs)
    rounds = Rounds(
        model,
        assistant_model,
        input_ids,
        attention_mask,
        position_ids,
        past_key_values,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
    )
    sequences = rounds.run()
    cache = rounds.past.store(rounds.all_rows, rounds.target.config, assistant_model)
    if not generation_config.return_dict_in_generate:
        return sequences
    recorded = rounds.recorder.collect()
    return DSparkGenerateOutput(sequences=sequences, past_key_values=cache, dspark=rounds.stats, **recorded)


class Rounds:
    """The state of one call and the steps of a round. Tensors hold the active rows only, in the order of `rows`."""

    def __init__(
        self, model, head, input_ids, attention_mask, positions, given, processors, criteria, config, streamer
    ):
        size = len(input_ids)
        self.recorder = Recorder(config, size)
        wants = self.recorder.wants
        self.target = Target(model, head.config.target_layer_ids, wants("hidden_states"), wants("attentions"))
        self.drafter = Drafter(head, model, size)
        self.processors = BlockProcessors(processors, config.do_sample, size)
        self.stopping = Stopping(criteria)
        # Without an end-of-sequence token, plain generate goes on with every row until all have ended. To end where it
        # does, rows then move together, a token a round.
        self.lockstep = size > 1 and bool(self.stopping.others) and not self.stopping.eos_ids
        self.streamer = streamer
        self.pad = config._pad_token_tensor.item() if config._pad_token_tensor is not None else 0
        self.stats = DSparkStats.empty(size, head.config.block_size)
        self.stopwatch = Stopwatch(self.target.device)

        self.input_ids = input_ids
        self.past = Continuation(given, config)
        if not self.past.cached:
            check_positions(positions, attention_mask)
        width = self.past.width(input_ids, attention_mask)
        self.all_rows = self.rows = read_rows(input_ids, attention_mask, self.past.cached, width)
        check_prompt(model, max(len(row.prompt_columns) for row in self.rows))
        self.cache = self.target.new_cache(size)
        # Target states of the tokens committed since the last draft, [R, C, m*d]; row r has counts[r] of them.
        self.features: torch.Tensor
        self.counts: list[int]
        self.anchors: torch.Tensor
        self.passed: TargetPass

    def run(self) -> torch.Tensor:
        with self.stopwatch.part("prefill"):
            verdict, logits = self.prefill()
        self.commit(verdict, logits)
        while self.rows:
            with self.stopwatch.part("draft"):
                block = self.draft()
            lengths = self.schedule(block)
            with self.stopwatch.part("verify"):
                logits = self.verify(block, lengths)
            with self.stopwatch.part("other"):
                verdict = self.accept(block, lengths, logits)
                self.commit(verdict, logits, block, lengths)
        if self.streamer is not None:
            self.streamer.end()
        self._finish_stats()
        return self._sequences()

    # -- The steps ----------------------------------------------------------------------------------------------

    def prefill(self) -> tuple[Verdict, torch.Tensor]:
        """A round without a draft: the whole prompts, right-padded inside; only their last logits are computed."""
        remembered = self.past.load(self.rows, self.cache, self.drafter)
        counts = [len(row.prompt) for row in self.rows]
        longest, device = max(counts), self.target.device
        tokens = on_device([row.prompt + [self.pad] * (longest - len(row.prompt)) for row in self.rows], device)
        keep = sorted({count - 1 for count in counts})
        self.passed = self.target.forward(tokens, self.cache, on_device(keep, device))
        self.cache.commit(counts)
        self.features, self.counts = self.passed.features, counts
        if remembered is not None:
            self.features, self.counts = with_unseen(remembered, self.features, counts)
        columns = on_device([keep.index(count - 1) for count in counts], device)
        last = self.passed.logits[torch.arange(len(counts), device=device), columns][:, None]
        self.passed = replace(self.passed, logits=last)
        logits = self._processed(last, None)
        nothing = torch.zeros(len(counts), dtype=torch.long, device=device)
        return Verdict(nothing, self.processors.choose(logits[:, 0])), logits

    def draft(self) -> DraftBlock | None:
        """A block for every row, no longer than any row can still use; `None` when one token is all that is left."""
        length = min(self.stats.block_size, max(map(self._room, self.rows)))
        if length == 0:
            if self.past.is_kept:
                self.drafter.absorb(self.anchors, self.features, self.counts)
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
        self.passed = self.target.forward(tokens, self.cache)
        self.features = self.passed.features
        return self._processed(self.passed.logits, tokens[:, 1:])

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

    def commit(
        self,
        verdict: Verdict,
        logits: torch.Tensor,
        block: DraftBlock | None = None,
        lengths: list[int] | None = None,
    ) -> None:
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
        news = [drafts[r][: accepted[r]] + [next_tokens[r]] for r in range(len(self.rows))]
        stops = [
            self.stopping.kept(row.sequence, new, self.input_ids.device)
            for row, new in zip(self.rows, news, strict=True)
        ]
        if self.lockstep:
            stops = self._together(stops)
        for r, (row, (kept, ended)) in enumerate(zip(self.rows, stops, strict=True)):
            if lengths is not None:
                self.stats.record(row.index, len(drafts[r]), lengths[r], min(accepted[r], len(kept)), len(kept))
            if self.recorder.active:
                self._record(r, row, len(kept), logits)
            row.committed += kept
            if self.streamer is not None:
                self.streamer.put(torch.tensor(kept))
            if not ended:
                active.append(r)
            else:
                self.past.keep_row(r, row, self.cache, self.drafter, self.features)
        self._keep(active)

    def _together(self, stops: list[tuple[list[int], bool]]) -> list[tuple[list[int], bool]]:
        """The same tokens, with rows that end only when every row has been told to."""
        for row, (_, ended) in zip(self.rows, stops, strict=True):
            row.told_to_end |= ended
        all_told = all(row.told_to_end for row in self.rows)
        return [(kept, all_told) for kept, _ in stops]

    # -- Helpers ------------------------------------------------------------------------------------------------

    def _room(self, row: Row) -> int:
        """Drafts that row could commit before its length limit, with one place left for the target's own token."""
        if self.lockstep:
            return 0
        if self.stopping.max_length is None:
            return self.stats.block_size
        return self.stopping.max_length - len(row.given) - len(row.committed) - 1

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
        self.drafter.keep(active)

    def _record(self, r: int, row: Row, count: int, logits: torch.Tensor) -> None:
        if not row.committed:
            width = row.width - self.past.cached
            self.recorder.record_prefill(row.index, r, self.passed, logits, row.prompt_columns, len(row.prompt), width)
            return
        drafts = range(row.columns[-1] + 1, row.columns[-1] + self.passed.features.shape[1])
        self.recorder.record(row.index, r, count, self.passed, logits, [*row.columns, *drafts])

    def _finish_stats(self) -> None:
        for name, seconds in self.stopwatch.read().items():
            setattr(self.stats, f"{name}_seconds", seconds)

    def _sequences(self) -> torch.Tensor:
        longest = max(len(row.committed) for row in self.all_rows)
        new = [row.committed + [self.pad] * (longest - len(row.committed)) for row in self.all_rows]
        return torch.cat([self.input_ids, torch.tensor(new, device=self.input_ids.device)], dim=1)
