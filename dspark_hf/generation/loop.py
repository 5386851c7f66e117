"""The decoding rounds of DSpark: draft, schedule, verify, accept, commit.

Every row of the batch decodes at its own pace. Between rounds a row is its committed tokens; the last of them, the
anchor, is not yet in the target's cache. The host waits for the device once a round, in `accept`.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from dspark_kernels import INVALID
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..modeling_dspark import DraftBlock, DSparkHead, GoesOn
from ..scheduling.estimates import corrected
from ..scheduling.load import Call, in_flight
from ..scheduling.plan import Plan, Step
from ..scheduling.scheduler import LoadSchedule
from .acceptance import Verdict, accept_greedy, accept_sampled
from .batch import Row, Streaming, read_rows
from .cache import on_device
from .compatibility import check_inputs, check_positions, check_prompt
from .drafting import Drafter
from .experience import scheduler_for, store
from .lockstep import Lockstep, is_needed
from .outputs import Recorder
from .packing import Packing
from .past import Continuation
from .processors import BlockProcessors, Prefixes
from .ranks import Ranks, any_busy
from .releases import CACHE
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
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs,
) -> torch.Tensor | DSparkGenerateOutput:
    """The decoding method that `model.generate(..., assistant_model=head)` runs; see [`Rounds`].

    Args:
        input_ids: [R, P], left-padded where prompts differ in length.
        model_kwargs: of these `attention_mask` [R, P], `None` for no padding; `position_ids` [R, P], which must count
            the tokens; the cache to continue, which is brought up to date (`generate` passes an empty one otherwise);
            and scalars, which every pass of the target is given. Anything else is refused.

    Returns:
        sequences [R, P + new tokens], right-padded where rows ended early, or with `return_dict_in_generate` a
        [`DSparkGenerateOutput`] around them.
    """
    options = check_inputs(model_kwargs)
    rounds = Rounds(
        model,
        assistant_model,
        input_ids,
        model_kwargs.get("attention_mask"),
        model_kwargs.get("position_ids"),
        model_kwargs.get(CACHE),
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
        options=options,
        synced=synced_gpus,
    )
    with in_flight(rounds.target.device, len(input_ids)) as rounds.call:
        sequences = rounds.run()
    if rounds.ranks.leads and isinstance(rounds.scheduler, LoadSchedule):
        store(assistant_model, rounds.target)
    cache = rounds.past.store(rounds.all_rows, rounds.target.config, assistant_model)
    if not generation_config.return_dict_in_generate:
        return sequences
    recorded, stats = rounds.recorder.collect(), rounds.finished_stats()
    return DSparkGenerateOutput(sequences=sequences, dspark=stats, **recorded, **{CACHE: cache})


def runs_ahead(device: torch.device) -> bool:
    """Whether the host queues work for the device; it then does not wait to see a round's confidence."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Lengths:
    """What a round verifies. of_rows: [R] drafts of each row, `None` when nothing was drafted. most: drafts that a row
    can have at most. total: tokens that count, anchors included. packed: whether the pass holds only those. drafted:
    positions drafted. survival: [R, drafted], 0 for rows that did not draft; `None` where the host does not wait for
    it."""

    of_rows: torch.Tensor | None
    most: int
    total: int
    packed: bool
    drafted: int
    survival: np.ndarray | None


NOTHING_DRAFTED = Lengths(None, 0, 0, False, 0, None)


@dataclass(frozen=True)
class Outcome:
    """What a round came to, on the host but for `next_tokens` [R], the anchors of the next round.

    counts: of each row, tokens committed. accepted: drafts accepted. tokens: [R, 1 + G], the last one committed, and
    the drafts. lengths: drafts verified. confidence: [R, G]. ended: which rows end, where that is decided already.
    """

    next_tokens: torch.Tensor
    counts: list[int]
    accepted: np.ndarray
    tokens: list[list[int]]
    lengths: np.ndarray
    confidence: np.ndarray
    ended: list[bool] | None = None

    @property
    def committed(self) -> list[list[int]]:
        """Tokens committed to each row."""
        return [[*drafts[: count - 1], last] for count, (last, *drafts) in zip(self.counts, self.tokens, strict=True)]

    @classmethod
    def undrafted(cls, next_tokens: torch.Tensor, ended: list[bool] | None = None) -> "Outcome":
        """Of a round without drafts."""
        rows = len(next_tokens)
        nothing = np.zeros(rows, dtype=int)
        tokens = next_tokens[:, None].tolist()
        return cls(next_tokens, [1] * rows, nothing, tokens, nothing, nothing[:, None][:, :0], ended)


@dataclass(frozen=True)
class Past:
    """A round that is over, for the statistics. rows: indices of its rows. drafting: which of them drafted.
    corrections: [R], of their confidence then."""

    rows: list[int]
    drafting: list[int] | slice
    lengths: Lengths
    outcome: Outcome
    corrections: np.ndarray

    def drafted_and_expected(self) -> tuple[list[int], list[float]]:
        """Of each row drafts made, and tokens expected to be committed."""
        drafted, expected = np.zeros(len(self.rows), dtype=int), np.ones(len(self.rows))
        if self.lengths.drafted:
            survival = self.lengths.survival
            if survival is None:
                survival = corrected(self.outcome.confidence, self.corrections)
            verified = np.arange(self.lengths.drafted) < self.outcome.lengths[:, None]
            expected[self.drafting] += (survival * verified).sum(axis=1)[self.drafting]
            drafted[self.drafting] = self.lengths.drafted
        return drafted.tolist(), expected.tolist()


class Rounds:
    """The state of one call and the steps of a round. Tensors hold the active rows only, in the order of `rows`."""

    def __init__(
        self,
        model,
        head,
        input_ids,
        attention_mask,
        positions,
        given,
        processors,
        criteria,
        config,
        streamer,
        scheduler=None,
        options=None,
        synced=False,
    ):
        size = len(input_ids)
        self.recorder = Recorder(config, size)
        wants = self.recorder.wants
        ids = head.config.target_layer_ids
        self.target = Target(model, ids, wants("hidden_states"), wants("attentions"), options)
        self.ranks, self.synced = Ranks(model), synced
        self.drafter = Drafter(head, model, size)
        self.processors = BlockProcessors(processors, config.do_sample)
        self.stopping = Stopping(criteria)
        self.pad = config._pad_token_tensor.item() if config._pad_token_tensor is not None else 0
        self.lockstep: Lockstep | None = None
        if is_needed(size, processors, self.stopping):
            ends = bool(self.stopping.eos_ids)
            self.lockstep = Lockstep(input_ids, processors, criteria, self.pad, ends, wants("scores"))
        self.stats = DSparkStats.empty(size, head.config.gamma)
        self.stopwatch = Stopwatch(self.target.device)
        self.call: Call

        self.input_ids = input_ids
        self.past = Continuation(given, config, input_ids, attention_mask, self.target.rereads_at)
        if not self.past.cached:
            check_positions(positions, attention_mask)
        self.all_rows = self.rows = read_rows(input_ids, attention_mask, self.past.cached, self.past.width)
        self.streaming = None if streamer is None else Streaming(streamer, self.all_rows, self.pad)
        # Position of the longest row's token in the same column.
        self.longest = max(len(row.prompt_columns) for row in self.rows)
        check_prompt(model, self.target.positions, self.longest)
        self.cache = self.target.new_cache(size)
        self._expect_tokens()
        self.anchors: torch.Tensor
        self.passed: TargetPass
        self.runs_ahead = runs_ahead(self.target.device)
        self.scheduler = scheduler or scheduler_for(self.target, self.drafter, size, config, self.runs_ahead, synced)
        self.step: Step | None = None
        self.rooms: list[int]
        # Tokens of a row that this round's draft had to read first, see `_waiting`.
        self.waiting = 0
        self.history: list[Past] = []

    def run(self) -> torch.Tensor:
        with self.stopwatch.part("prefill"):
            outcome, logits = self.prefill()
        self.commit(outcome, logits)
        while self._is_busy():
            if not self.rows:
                self.idle()
                continue
            self.reread()
            with self.stopwatch.part("schedule"):
                plan = self.plan()
            with self.stopwatch.part("draft"):
                block = self.draft(plan)
            with self.stopwatch.part("schedule"):
                lengths = self.schedule(plan, block)
            with self.stopwatch.part("verify"):
                logits, drafts = self.verify(block, lengths)
            with self.stopwatch.part("other"):
                outcome, logits = self.accept(block, lengths, logits, drafts)
            with self.stopwatch.part("schedule"):
                self.learn(plan, lengths, outcome)
            with self.stopwatch.part("other"):
                self.commit(outcome, logits, lengths)
        if self.streaming is not None:
            self.streaming.end()
        return self._sequences()

    def _is_busy(self) -> bool:
        return any_busy(bool(self.rows), self.target.device) if self.synced else bool(self.rows)

    def idle(self) -> None:
        """The passes of a round that writes nothing, as other processes wait for ours in theirs."""
        head, device = self.drafter.head, self.target.device
        drafter = Drafter(head, self.target.model, 1)
        drafter.remember(torch.zeros(1, 1, head.fc.in_features, device=device), [1])
        anchors = torch.zeros(1, dtype=torch.int64, device=device)
        select = BlockProcessors(LogitsProcessorList(), do_sample=False).drafting(None)
        drafter.draft(anchors, self.scheduler.settings.most, select)
        self.target.forward(anchors[:, None], self.target.new_cache(1))

    def finished_stats(self) -> DSparkStats:
        """The statistics of a call that is over."""
        stats = self.stats
        for past in self.history:
            drafted, expected = past.drafted_and_expected()
            verified, confidence = past.outcome.lengths.tolist(), past.outcome.confidence.tolist()
            for i, index in enumerate(past.rows):
                stats.drafted_lengths[index].append(drafted[i])
                stats.verified_lengths[index].append(verified[i])
                stats.expected_lengths[index].append(expected[i])
                stats.draft_tokens[index].append(past.outcome.tokens[i][1 : 1 + drafted[i]])
                stats.confidence[index].append(confidence[i][: drafted[i]])
        self.stopwatch.collect(wait=True)
        for name, seconds in self.stopwatch.seconds.items():
            setattr(stats, f"{name}_seconds", seconds)
        return stats

    # -- The steps ----------------------------------------------------------------------------------------------

    def prefill(self) -> tuple[Outcome, torch.Tensor]:
        """A round without a draft: the whole prompts, right-padded inside; only their last logits are computed."""
        self.past.load(self.rows, self.cache, self.drafter)
        counts = [len(row.prompt) for row in self.rows]
        longest, device = max(counts), self.target.device
        # Filled with a token that any target knows; what padding is called may be none.
        tokens = on_device([row.prompt + [0] * (longest - len(row.prompt)) for row in self.rows], device)
        # Plain decoding reads the prompts in one pass.
        lengths = torch.full_like(tokens, self.longest) if self.target.growing else None
        if self.target.packs and len(set(counts)) > 1:
            packing = Packing.of(on_device(counts, device) - 1, longest, sum(counts))
            last = on_device([end - 1 for end in itertools.accumulate(counts)], device)
            self.passed = self.target.forward_packed(tokens, self.cache, packing, last, lengths)
        else:
            keep = sorted({count - 1 for count in counts})
            self.passed = self.target.forward(tokens, self.cache, on_device(keep, device), lengths)
            columns = on_device([keep.index(count - 1) for count in counts], device)
            last = self.passed.logits[torch.arange(len(counts), device=device), columns][:, None]
            self.passed = replace(self.passed, logits=last)
        self.cache.commit(counts)
        self.drafter.remember(self.passed.features, counts)
        return self.accept(None, NOTHING_DRAFTED, self.passed.logits, None)

    def reread(self) -> None:
        """Where plain decoding would read a text anew with other frequencies, see `rope.rereads_at`, so do we."""
        border = self.target.rereads_at
        if border is None or self.past.given_in_part:
            return
        crossing = [r for r, row in enumerate(self.rows) if row.anchor_column == border and row.width <= border]
        if not crossing:
            return
        texts = [self.rows[r].tokens[:-1] for r in crossing]
        longest, device = max(map(len, texts)), self.target.device
        tokens = on_device([text + [0] * (longest - len(text)) for text in texts], device)
        lengths = on_device(
            [len(text) + 1 + self._lag(self.rows[r]) for r, text in zip(crossing, texts, strict=True)], device
        )
        lengths = lengths[:, None].expand_as(tokens)
        self.target.reread(tokens, self.cache, on_device(crossing, device), lengths)

    def plan(self) -> Plan:
        """Which rows draft, and how many positions."""
        times = self.stopwatch.collect()
        load = self.call.load(self.drafter.head.load_sensor)
        if self.step is not None and self.ranks.leads:
            deciding = times.get("draft", 0.0) + times.get("schedule", 0.0)
            self.scheduler.observe(self.step, load, deciding, times["verify"] + times.get("other", 0.0))
        self.stats.load.append(load.total)
        self.rooms = self._rooms()
        waiting = self._waiting(range(len(self.rows)))
        return self.ranks.agreed(lambda: self.scheduler.plan(self.rooms, self._context(), load, waiting))

    def draft(self, plan: Plan) -> DraftBlock | None:
        """A block with a line for every row, zeros for those that do not draft; `None` when none does."""
        self.waiting = self._waiting(plan.rows)
        if not plan.rows:
            self.drafter.catch_up(self.anchors)
            return None
        everybody = len(plan.rows) == len(self.rows)
        prefixes = self._prefixes()
        select = self.processors.drafting(prefixes and prefixes.of(plan.rows))
        rows = None if everybody else plan.rows
        block = self.drafter.draft(self.anchors, plan.length, select, rows, self._goes_on(plan), plan.most)
        return block if everybody else block.spread(on_device(plan.rows, block.tokens.device), len(self.rows))

    def schedule(self, plan: Plan, block: DraftBlock | None) -> Lengths:
        """How many drafts of each row to verify."""
        rows, rooms, device = len(self.rows), self.rooms, self.target.device
        if block is None:
            return Lengths(None, 0, rows, False, 0, None)
        drafted = block.tokens.shape[1]
        drafting, threshold = self._drafting(plan), self.scheduler.settings.threshold
        if not plan.packed and threshold is None and not self.runs_ahead:
            # Columns were paid for when they were drafted; no row's confidence changes that.
            lengths = np.zeros(rows, dtype=int)
            lengths[drafting] = np.minimum(rooms, drafted)[drafting]
            most, total = int(lengths.max()), rows + int(lengths.sum())
            return Lengths(torch.from_numpy(lengths).to(device), most, total, False, drafted, None)
        confidence = self._confidence(block.confidence_logits, drafted)
        if self.runs_ahead:
            lengths = self.scheduler.choose_ahead(plan, confidence.to(device), on_device(rooms, device))
            return Lengths(lengths, drafted, rows + plan.budget, plan.packed, drafted, None)
        survival = self.scheduler.estimates.survival(confidence.numpy()[drafting], drafting)
        if len(survival) < rows:
            everybody = np.zeros((rows, drafted))
            everybody[drafting] = survival
            survival = everybody
        lengths = self.scheduler.choose(plan, survival, rooms)
        most, total = int(lengths.max()), rows + int(lengths.sum())
        packed = plan.packed and total < rows * (1 + most)
        return Lengths(torch.from_numpy(lengths).to(device), most, total, packed, drafted, survival)

    def verify(self, block: DraftBlock | None, lengths: Lengths) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Target logits [R, L+1, V] of the anchor and the drafts behind it, and these drafts [R, L]; L is
        lengths.most."""
        tokens = self.anchors[:, None]
        if lengths.most:
            tokens = torch.cat([tokens, block.tokens[:, : lengths.most].to(tokens.device)], dim=1)
        read_at = self._read_at(tokens.shape[1])
        if lengths.packed:
            packing = Packing.of(lengths.of_rows, tokens.shape[1], lengths.total)
            self.passed = self.target.forward_packed(tokens, self.cache, packing, lengths=read_at)
        else:
            self.passed = self.target.forward(tokens, self.cache, lengths=read_at)
        return self.passed.logits, tokens[:, 1:]

    def accept(
        self, block: DraftBlock | None, lengths: Lengths, logits: torch.Tensor, drafts: torch.Tensor | None
    ) -> tuple[Outcome, torch.Tensor]:
        """What the target makes of the drafts, and its processed logits [R, L+1, V]. Here the host waits for the
        device, once a round."""
        if self.lockstep is not None:
            return self._accept_in_step(block, lengths, logits, drafts)
        logits = self.processors(logits, self._prefixes(drafts))
        if block is None:
            return Outcome.undrafted(self.processors.choose(logits[:, 0])), logits
        limits = lengths.of_rows
        if lengths.most == 0:
            verdict = Verdict(torch.zeros_like(limits), self.processors.choose(logits[:, 0]))
        else:
            verdict = _verdict(logits, drafts, block.logits, limits)
        return self._to_host(block, limits, verdict), logits

    def _accept_in_step(self, block, lengths, logits, drafts) -> tuple[Outcome, torch.Tensor]:
        """The same, a token of every row after the other, see `lockstep`. All rows commit as many."""
        rows = on_device(self._row_indices(), logits.device)
        limits = torch.zeros_like(rows) if lengths.of_rows is None else lengths.of_rows
        accepted, columns = torch.zeros_like(rows), []
        for j in range(logits.shape[1]):
            columns.append(self.lockstep.process(logits[:, j], rows))
            if j < lengths.most:
                sampled_from = None if block.logits is None else block.logits[:, j : j + 1]
                # What would come behind an accepted token is not asked yet.
                twice = torch.stack([columns[-1], columns[-1]], dim=1)
                verdict = _verdict(twice, drafts[:, j : j + 1], sampled_from, (limits > j).to(limits.dtype))
                goes_on = verdict.accepted
                tokens = torch.where(goes_on > 0, drafts[:, j], verdict.next_tokens)
            else:
                goes_on, tokens = torch.zeros_like(rows), self.processors.choose(columns[-1])
            self._check_tokens(tokens.cpu().numpy())
            accepted = accepted + goes_on
            ended = self.lockstep.append(tokens, rows).tolist()
            ended = self.ranks.agreed(lambda own=ended: own)
            if any(ended) or not goes_on.all():
                break
        processed, limits = torch.stack(columns, dim=1), limits.clamp(max=len(columns))
        if block is None:
            return Outcome.undrafted(tokens, ended), processed
        outcome = self._to_host(block, limits, Verdict(accepted, tokens))
        return replace(outcome, counts=[len(columns)] * len(rows), ended=ended), processed

    def learn(self, plan: Plan, lengths: Lengths, outcome: Outcome) -> None:
        """Tell the scheduler what became of the round."""
        tokens = lengths.total if lengths.packed else len(self.rows) * (1 + lengths.most)
        rows, context = len(self.rows), self._context()
        self.step = Step(len(plan.rows), lengths.drafted, self.waiting, rows, tokens, lengths.packed, context)
        drafting, estimates = self._drafting(plan), self.scheduler.estimates
        self.history.append(Past(self._row_indices(), drafting, lengths, outcome, estimates.corrections))
        if plan.rows:
            confidence, verified = outcome.confidence[drafting], outcome.lengths[drafting]
            if lengths.survival is not None:
                survival = lengths.survival[drafting]
            else:
                survival = estimates.survival(confidence, drafting)
            estimates.learn(drafting, confidence, survival, verified, outcome.accepted[drafting])

    def commit(self, outcome: Outcome, logits: torch.Tensor, lengths: Lengths | None = None) -> None:
        """Append accepted drafts and the target's own token; lengthen the cache; stream; drop rows that ended.

        Without `lengths` the token is the prefill's, which belongs to no round.
        """
        if lengths is not None:
            self.cache.commit(outcome.counts)
            self.drafter.remember(self.passed.features, outcome.counts)
        self.anchors = outcome.next_tokens
        accepted, device = outcome.accepted.tolist(), self.input_ids.device
        if outcome.ended is not None:
            stops = list(zip(outcome.committed, outcome.ended, strict=True))
        else:
            pairs = zip(self.rows, outcome.committed, strict=True)
            stops = [self.stopping.kept(row, committed, device) for row, committed in pairs]
            # Criteria may look at a clock.
            stops = self.ranks.agreed(lambda: stops) if self.stopping.others else stops
        for r, (row, (kept, ended)) in enumerate(zip(self.rows, stops, strict=True)):
            if lengths is not None:
                self.stats.accepted_lengths[row.index].append(len(kept))
                self.stats.kept_lengths[row.index].append(min(accepted[r], len(kept)))
            if self.recorder.active:
                self._record(r, row, len(kept), logits)
            row.committed += kept
            row.ended = ended
        if self.streaming is not None:
            self.streaming.put()
        active = [r for r, (_, ended) in enumerate(stops) if not ended]
        for r, row in enumerate(self.rows):
            if stops[r][1]:
                self.past.keep_row(r, row, self.cache, self.drafter, copy=bool(active))
        self._keep(active)

    # -- Helpers ------------------------------------------------------------------------------------------------

    def _waiting(self, rows: Iterable[int]) -> int:
        """Tokens of a row, at most, that the head has yet to read; 0 for what a round or two leave."""
        longest = max((self.drafter.unread[row] for row in rows), default=0)
        return longest if longest > 2 * (self.stats.block_size + 1) else 0

    def _expect_tokens(self) -> None:
        """Tell the caches how long rows can get: to their limit, and a block beyond it."""
        limit = self.stopping.max_length
        if limit is None:
            return
        longest = max(len(row.prompt_columns) + limit - row.length for row in self.rows)
        for cache in (self.cache, self.drafter.cache):
            cache.expect(longest + self.stats.block_size + 1)

    def _room(self, row: Row) -> int:
        """Drafts that row could commit, with one place left for the target's own token."""
        if self.lockstep is not None and len(self.all_rows) > 1:
            # Every row would have to accept for one to go on.
            return 0
        room, position = self.stats.block_size, len(row.columns) - 1
        if self.stopping.max_length is not None:
            room = self.stopping.max_length - row.length - 1
        if self.target.positions is not None:
            check_prompt(self.target.model, self.target.positions, position + 1)
            room = min(room, self.target.positions - 1 - position)
        border = self.target.rereads_at
        if border is not None and row.anchor_column < border:
            room = min(room, border - 1 - row.anchor_column)
        return room

    def _lag(self, row: Row) -> int:
        """How far its positions are behind those of the longest row, column by column."""
        return self.longest - len(row.prompt_columns)

    def _read_at(self, count: int) -> torch.Tensor | None:
        """[R, count] of the next tokens of every row the length of the longest row when plain decoding reads them;
        `None` where the target does not go by it."""
        if not self.target.growing:
            return None
        first = [len(row.columns) + self._lag(row) for row in self.rows]
        return on_device(first, self.target.device)[:, None] + torch.arange(count, device=self.target.device)

    def _prefixes(self, drafts: torch.Tensor | None = None) -> Prefixes | None:
        """Tokens of every row, with drafts behind; `None` when no processor looks."""
        if not self.processors.needs_prefix:
            return None
        tokens = [on_device(row.sequence, self.target.device) for row in self.rows]
        prefixes = Prefixes(tokens, self._row_indices())
        return prefixes if drafts is None else prefixes.longer(drafts)

    def _row_indices(self) -> list[int]:
        return [row.index for row in self.rows]

    def _rooms(self) -> list[int]:
        return [self._room(row) for row in self.rows]

    def _drafting(self, plan: Plan) -> list[int] | slice:
        """The rows that draft, as an index; that of everybody copies nothing."""
        return slice(None) if len(plan.rows) == len(self.rows) else plan.rows

    def _context(self) -> int:
        """Tokens of the longest row in the target's cache, which is what all rows look at."""
        return max(self.cache.lengths)

    def _confidence(self, logits: torch.Tensor | None, count: int) -> torch.Tensor:
        """[R, count] from confidence logits of the first positions; without a confidence head, running acceptance."""
        if logits is None:
            running = torch.from_numpy(self.scheduler.estimates.shared.confidence[:count])
            return running.expand(len(self.rows), -1)
        return self.drafter.head.calibrated(logits)

    def _goes_on(self, plan: Plan) -> GoesOn | None:
        """What decides, position by position, whether a single row drafts on; `None` where it is decided before."""
        walk = self.scheduler.walk(plan)
        if walk is None:
            return None
        head, running = self.drafter.head, self.scheduler.estimates.shared.confidence
        positions = itertools.count()

        def goes_on(logits: torch.Tensor | None) -> bool:
            k = next(positions)
            return walk(running[k] if logits is None else head.calibrated(logits, k).item())

        return goes_on

    def _to_host(self, block: DraftBlock, lengths: torch.Tensor, verdict: Verdict) -> Outcome:
        """The one transfer of a round: all that the host needs, in a single tensor."""
        device, drafted = lengths.device, block.tokens.shape[1]
        columns = [x[:, None] for x in (verdict.accepted, lengths, verdict.next_tokens)]
        confidence = self._confidence(block.confidence_logits, drafted)
        # In double precision token ids stay what they are.
        columns += [block.tokens.to(device), confidence.to(device)]
        table = torch.cat([column.double() for column in columns], dim=1).cpu().numpy()
        whole, confidence = table[:, : 3 + drafted].astype(int), table[:, 3 + drafted :]
        self._check_tokens(whole[:, 2])
        accepted, counts = whole[:, 0], (whole[:, 0] + 1).tolist()
        return Outcome(verdict.next_tokens, counts, accepted, whole[:, 2:].tolist(), whole[:, 1], confidence)

    def _check_tokens(self, tokens: np.ndarray) -> None:
        """Raise where logits were no distribution, as no token that follows means anything."""
        if (tokens == INVALID).any():
            row = self.rows[int((tokens == INVALID).argmax())].index
            raise ValueError(
                f"The target's logits for row {row} of the batch hold NaN, or nothing but -inf. Check the model's "
                "weights and dtype (float16 overflows in many models; use bfloat16), and the logits processors."
            )

    def _keep(self, active: list[int]) -> None:
        """Go on with the given rows only. The last of them take the places of those that ended."""
        if len(active) == len(self.rows):
            return
        staying = {row for row in active if row < len(active)}
        last = iter(row for row in active if row not in staying)
        order = [place if place in staying else next(last) for place in range(len(active))]
        self.rows = [self.rows[r] for r in order]
        if not order:
            return
        self.anchors = self.anchors[on_device(order, self.anchors.device)]
        for rows in (self.cache, self.drafter, self.scheduler):
            rows.keep(order)
        self.call.set_rows(len(order))

    def _record(self, r: int, row: Row, count: int, logits: torch.Tensor) -> None:
        if not row.committed:
            width = row.width - self.past.cached
            self.recorder.record_prefill(row.index, r, self.passed, logits, row.prompt_columns, len(row.prompt), width)
            return
        drafts = range(row.columns[-1] + 1, row.columns[-1] + self.passed.features.shape[1])
        self.recorder.record(row.index, r, count, self.passed, logits, [*row.columns, *drafts])

    def _sequences(self) -> torch.Tensor:
        longest = max(len(row.committed) for row in self.all_rows)
        new = [row.committed + [self.pad] * (longest - len(row.committed)) for row in self.all_rows]
        return torch.cat([self.input_ids, torch.tensor(new, device=self.input_ids.device)], dim=1)


def _verdict(
    target_logits: torch.Tensor, drafts: torch.Tensor, sampled_from: torch.Tensor | None, lengths: torch.Tensor
) -> Verdict:
    """Of drafts [R, L] that were the argmax of the head's logits, or were sampled from [R, >= L, V]."""
    if sampled_from is None:
        return accept_greedy(target_logits, drafts, lengths)
    return accept_sampled(target_logits, drafts, sampled_from[:, : drafts.shape[1]].to(target_logits.device), lengths)
