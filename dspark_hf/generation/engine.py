"""The engine: a pair of target and head, slots for rows, and the rounds that decode them.

Rows join between rounds, and leave as they end; their slots are free for others at once. Where others are active,
prompts are read in the pass that verifies those's drafts. `generate` is an engine whose rows all join at the start.
Everything here is on the host; the steps of a round are in `round.py`.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from dspark_kernels import INVALID

from ..modeling_dspark import DraftBlock
from ..scheduling.scheduler import ConstantSchedule
from . import round as rounds
from .acceptance import Verdict
from .cache import SlotCache, on_device
from .compatibility import check_prompt
from .compiled import CompiledPasses
from .drafting import Drafter
from .lockstep import Lockstep
from .mixed import processors_of
from .observers import CommittedRound, Observer
from .past import Continuation
from .pieces import read_ahead
from .planner import Planner
from .processors import Prefixes
from .rereading import read_lengths, reread
from .round import HostRound, RoundState, VerifyLayout
from .rows import Row
from .stats import Stopwatch
from .target import Target, TargetOutput


class Engine:
    """Decodes rows, a round at a time.

    Args:
        target, drafter: the two models; the drafter with no rows yet.
        scheduler: says what a round drafts and verifies.
        slots: rows that decode at once; others wait for a place.
        lockstep: where processors or criteria must be called as plain decoding calls them.
        past: what is known of rows that join, and what becomes of those that end.
        compiled: passes that are captured.
        observers: see [`Observer`].
        private: whether nobody else sees a tensor of its rounds. Those are torch's inference tensors then, which cost
            the host an eighth less, but cannot be changed in place or trained on.
        isolates: whether a row whose logits are no distribution ends alone, with an `error`, instead of raising.
        piece: tokens of a prompt that are read at once, `None` for all.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        scheduler: ConstantSchedule,
        slots: int,
        lockstep: Lockstep | None = None,
        past: Continuation | None = None,
        compiled: CompiledPasses | None = None,
        observers: Sequence[Observer] = (),
        private: bool = False,
        isolates: bool = False,
        piece: int | None = None,
    ):
        self.target, self.drafter, self.lockstep, self.isolates = target, drafter, lockstep, isolates
        self.mode: type[AbstractContextManager] = torch.inference_mode if private else torch.no_grad
        self.past, self.observers, self.slots, self.compiled, self.piece = past, observers, slots, compiled, piece
        self.clock = Stopwatch(target.device)
        # In lockstep every row of a batch would have to accept for one to go on.
        drafts = lockstep is None or len(lockstep.input_ids) == 1
        self.planner = Planner(target, drafter, scheduler, self.clock, drafts)
        self.rows: list[Row] = []
        self.queue: deque[Row] = deque()
        cache = target.new_cache(0, slots) if compiled is None else compiled.target_cache
        self.state = RoundState(torch.zeros(0, dtype=torch.long, device=target.device), cache, drafter)

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.queue)

    def add(self, rows: Iterable[Row]) -> None:
        """Queue rows; they join when there are slots for them."""
        self.queue.extend(rows)

    def close(self) -> None:
        """Count as no load any more."""
        self.planner.call.set_rows(0)
        if self.compiled is not None:
            self.compiled.close(self.drafter)

    def step(self) -> list[Row]:
        """Run a round, with the prefill of rows that join. Returns the rows that have ended."""
        with self.mode():
            return self._step()

    def _step(self) -> list[Row]:
        joining = self._joining()
        if joining and not (self.rows and self.target.packs):
            # There is no pass to share, or none that can be shared.
            with self.clock.part("prefill"):
                return self._prefill(joining)
        if self.past is None or not self.past.given_in_part:
            reread(self.rows, self.state.cache, self.target)
        rows, state, planner, clock, passes = self.rows, self.state, self.planner, self.clock, self.compiled or rounds
        with clock.part("schedule"):
            context, max_drafts = max(state.cache.lengths), list(map(planner.max_drafts_of, rows))
            plan, load, pending = planner.plan(rows, max_drafts, context)
        with clock.part("draft"):
            drafting = [rows[r] for r in plan.rows]
            processors = processors_of(drafting or rows)
            prefixes = prefixes_of(drafting, self.target.device) if processors.needs_prefix else None
            block = passes.draft(state, plan, processors.draft_sampler(prefixes))
        with clock.part("schedule"):
            confidence = planner.confidence(block)
            layout = rounds.schedule(planner.scheduler, plan, block, confidence, max_drafts, self.target.device)
        with clock.part("verify"):
            read_at = read_lengths(rows, 1 + layout.most, self.target)
            part = rounds.prompt_part(state, self.target, *self._seat(joining)) if joining else None
            passed, drafts = passes.verify(state, self.target, block, layout, read_at, part)
        with clock.part("other"):
            host, verdict, logits = accept(rows, self.lockstep, block, layout, passed, drafts, confidence)
        with clock.part("schedule"):
            survival = planner.learn(plan, layout, host, len(rows), context, pending)
            if joining or (self.compiled is not None and self.compiled.captured):
                # A time that says nothing of the rounds to come.
                planner.last = None
        with clock.part("other"):
            done = self._decided(CommittedRound(rows, host, passed, logits, load, plan, survival))
            # Of a row that ends in the middle of a block no more than its text: a state cannot be cut back later.
            counts, as_accepted = [max(len(kept), 1) for kept in done.kept], not (joining or self.lockstep)
            rounds.commit(state, passed, counts, verdict, as_accepted)
            if joining:
                state.cache.commit([len(row.prompt) for row in joining], list(range(len(rows), len(self.rows))))
            return self._settle([done, self._begin(joining, passed.read)] if joining else [done])

    # -- Rows come and go ---------------------------------------------------------------------------------------

    def _joining(self) -> list[Row]:
        """Rows of the queue that there are slots for."""
        joining = [self.queue.popleft() for _ in range(min(len(self.queue), self.slots - len(self.rows)))]
        for row in joining:
            check_prompt(self.target.model, self.target.positions, len(row.prompt_columns) + row.lag)
        return joining

    def _seat(self, joining: list[Row]) -> tuple[list[list[int]], list[int], int]:
        """Give rows their slots, and what is known of them. Returns what is left to read of their prompts and their
        lengths, see `round.prefill`, and the place of the first."""
        present, cache = len(self.rows), self.state.cache
        if present == 0:
            # Those that ended last have left theirs for whoever goes on from them.
            self.state.keep([])
            self.planner.scheduler.keep([])
        self.rows = self.rows + joining
        places = list(range(present, len(self.rows)))
        self.planner.call.set_rows(len(self.rows))
        self.state.add(len(joining))
        if present == 0:
            expect_tokens((cache, self.drafter.cache), joining, self.planner.gamma + 1, self.compiled)
        if self.past is not None:
            self.past.load(joining, places, cache, self.drafter)
        lengths = [len(row.prompt_columns) + row.lag for row in joining]
        if self.piece is not None:
            read_ahead(self.state, self.target, self.piece, joining, lengths, places if present else None)
        return [row.prompt for row in joining], lengths, present

    def _prefill(self, joining: list[Row]) -> list[Row]:
        """Read the prompts of rows in a pass of their own."""
        prompts, lengths, present = self._seat(joining)
        places = list(range(present, len(self.rows))) if present else None
        passed = rounds.prefill(self.state, self.target, prompts, lengths, places)
        return self._settle([self._begin(joining, passed)])

    def _begin(self, joining: list[Row], passed: TargetOutput) -> CommittedRound:
        """The first tokens of rows whose prompts were read."""
        layout, present = rounds.undrafted(len(joining)), len(self.rows) - len(joining)
        counts = [len(row.prompt) for row in joining]
        host, verdict, logits = accept(joining, self.lockstep, None, layout, passed)
        self.state.anchors = torch.cat([self.state.anchors, verdict.next_tokens])
        self.planner.scheduler.add(len(joining))
        if present:
            self.drafter.read(list(range(present, len(self.rows))), passed.features, counts)
        else:
            self.drafter.append(passed.features, counts)
        return self._decided(CommittedRound(joining, host, passed, logits))

    def _decided(self, done: CommittedRound) -> CommittedRound:
        """With what its rows keep, up to their ends, and which of them end."""
        stops = stops_of(done.rows, done.host, self.state.anchors.device, self.isolates)
        if done.host.stops is None and any(row.stopping.others for row in done.rows):
            # Criteria may look at a clock.
            stops = self.planner.ranks.agreed(lambda: stops)
        done.kept, done.ends = [kept for kept, _ in stops], [ended for _, ended in stops]
        return done

    def _settle(self, parts: Sequence[CommittedRound]) -> list[Row]:
        """Give the rows what they keep of a round; drop those that ended, which are returned."""
        for done in parts:
            for observer in self.observers:
                observer.on_round(done)
            for row, kept, ended in zip(done.rows, done.kept, done.ends, strict=True):
                row.committed += kept
                row.ended = ended
        staying = [r for r, row in enumerate(self.rows) if not row.ended]
        ended = [(r, row) for r, row in enumerate(self.rows) if row.ended]
        copies = bool(staying or self.queue or self.compiled)
        for r, row in ended:
            if row.error is not None:
                self.state.erase(r)
            if self.past is not None:
                self.past.keep_row(r, row, self.state.cache, self.drafter, copies)
        for observer in self.observers:
            observer.on_commit()
        self._keep(staying)
        return [row for _, row in ended]

    def drop(self, row: Row) -> None:
        """End a row now, wherever it is."""
        row.ended = True
        if row in self.queue:
            self.queue.remove(row)
        with self.mode():
            self._keep([r for r, own in enumerate(self.rows) if own is not row])

    def _keep(self, staying: list[int]) -> None:
        """Go on with the given rows only. The last of them take the places of those that ended."""
        if len(staying) == len(self.rows):
            return
        order = compacted(staying)
        self.rows = [self.rows[r] for r in order]
        self.planner.call.set_rows(len(order))
        if order:
            self.state.keep(order)
            self.planner.scheduler.keep(order)


def accept(
    rows: Sequence[Row],
    lockstep: Lockstep | None,
    block: DraftBlock | None,
    layout: VerifyLayout,
    passed: TargetOutput,
    drafts: torch.Tensor | None = None,
    confidence: torch.Tensor | None = None,
) -> tuple[HostRound, Verdict, torch.Tensor | None]:
    """What the host learns of a pass over rows, what the device knows of it, and the processed logits, `None` where
    they stay in a captured pass."""
    if passed.verdict is not None:
        verdict, logits = passed.verdict, None
        host = rounds.to_host(block, layout, verdict, confidence)
    elif lockstep is None:
        processors = processors_of(rows)
        prefixes = prefixes_of(rows, passed.logits.device, drafts) if processors.needs_prefix else None
        verdict, logits = rounds.accept(passed.logits, drafts, block, layout, processors, prefixes)
        host = rounds.to_host(block, layout, verdict, confidence)
    else:
        index = on_device([row.index for row in rows], passed.logits.device)
        choose = rows[0].processors.choose
        verdict, logits, ended = lockstep.accept(passed.logits, drafts, block, layout, index, choose)
        host = replace(rounds.to_host(block, layout, verdict, confidence, logits.shape[1]), stops=ended)
    return host, verdict, logits


def stops_of(
    rows: Sequence[Row], host: HostRound, device: torch.device, isolates: bool
) -> list[tuple[list[int], bool]]:
    """Of every row the tokens of a round that it keeps, and whether it ends with them; see `kept_of`.

    Raises:
        ValueError: for a row whose logits were no distribution, unless such rows end alone.
    """
    decided = host.stops or [None] * len(rows)
    stops = [kept_of(*of_row, device) for of_row in zip(rows, host.tokens, decided, strict=True)]
    errors = [row.error for row in rows if row.error is not None]
    if errors and not isolates:
        raise ValueError(errors[0])
    return stops


def kept_of(row: Row, tokens: list[int], stops: bool | None, device: torch.device) -> tuple[list[int], bool]:
    """Of the tokens that a row commits those up to its end, and whether that is among them, which may be decided
    already. Where its logits were no distribution no token that follows means anything: it ends, with an `error`."""
    if tokens[-1] != INVALID:
        return row.kept(tokens, device) if stops is None else (tokens, stops)
    row.error = (
        f"The target's logits for row {row.index} of the batch hold NaN, or nothing but -inf. Check the model's "
        "weights and dtype (float16 overflows in many models; use bfloat16), and the logits processors."
    )
    return [], True


def longest_of(rows: Iterable[Row]) -> int | None:
    """Tokens of the longest of the rows when it reaches its limit; `None` where there is none."""
    if any(row.stopping.max_length is None for row in rows):
        return None
    return max(len(row.prompt_columns) + row.stopping.max_length - row.length for row in rows)


def expect_tokens(
    caches: Iterable[SlotCache], rows: Sequence[Row], block: int, compiled: CompiledPasses | None
) -> None:
    """Tell the caches how long rows can get: to their limit, and a block beyond it; or the view of captured passes."""
    longest = longest_of(rows)
    if longest is not None:
        for cache in caches:
            cache.expect(longest + block if compiled is None else compiled.view, is_static=compiled is not None)


def prefixes_of(rows: Sequence[Row], device: torch.device, drafts: torch.Tensor | None = None) -> Prefixes:
    """Tokens of rows, with drafts [R, L] behind."""
    prefixes = Prefixes([on_device(row.sequence, device) for row in rows], [row.index for row in rows])
    return prefixes if drafts is None else prefixes.longer(drafts.clamp(min=0))


def compacted(staying: list[int]) -> list[int]:
    """The places of rows that stay, so that as many as possible keep theirs: the last ones fill the gaps."""
    fixed = {row for row in staying if row < len(staying)}
    last = iter(row for row in staying if row not in fixed)
    return [place if place in fixed else next(last) for place in range(len(staying))]
