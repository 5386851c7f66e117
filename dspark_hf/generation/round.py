"""One round: draft, schedule, verify, accept, commit.

Between rounds a row is its committed tokens; the last of them, the anchor, is not yet in the target's cache. The steps
take tensors and give tensors, and know no row, no clock and no limit but in numbers: those are the engine's. What the
host learns of a round it learns from `to_host`, the one transfer.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..modeling_dspark import DraftBlock, DraftSampler
from ..scheduling.plan import Plan
from ..scheduling.scheduler import ConstantSchedule
from .acceptance import Verdict, accept_greedy, accept_sampled
from .cache import SlotCache, on_device
from .drafting import Drafter
from .processors import BlockProcessors, Prefixes
from .target import Part, Target, TargetOutput, side_by_side


@dataclass
class RoundState:
    """Where the R active rows stand.

    anchors: [R], the last committed token of every row.
    cache: keys and values of the target, of all tokens before the anchors.
    drafter: those of the head, and the target states that it has yet to read.
    """

    anchors: torch.Tensor
    cache: SlotCache
    drafter: Drafter

    def add(self, rows: int) -> None:
        """Give slots to so many rows, which have no tokens yet."""
        self.cache.add(rows)
        self.drafter.add(rows)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and move those kept; see `cache.compact`."""
        self.anchors = self.anchors[on_device(rows, self.anchors.device)] if rows else self.anchors[:0]
        self.cache.keep(rows)
        self.drafter.keep(rows)

    def erase(self, row: int) -> None:
        """Make zeros of what a row's slots hold."""
        self.cache.erase(row)
        self.drafter.cache.erase(row)


@dataclass(frozen=True)
class VerifyLayout:
    """What a pass of the target verifies.

    verify_lens: [R], drafts of each row; `None` when nothing was drafted.
    most: drafts that a row can have at most.
    tokens: those that count, anchors included.
    packed: whether the pass holds only those.
    drafted: positions drafted.
    survival: [R, drafted], 0 for rows that did not draft; `None` where the host does not wait for it.
    """

    verify_lens: torch.Tensor | None
    most: int
    tokens: int
    packed: bool
    drafted: int
    survival: np.ndarray | None


@dataclass(frozen=True)
class HostRound:
    """What a round came to, on the host.

    tokens: of every row those that it commits, the target's own last.
    accepted: [R], drafts accepted.
    verified: [R], drafts verified.
    drafts: of every row the tokens drafted.
    confidence: [R, drafted].
    stops: of every row whether it ends, where that is decided already.
    """

    tokens: list[list[int]]
    accepted: np.ndarray
    verified: np.ndarray
    drafts: list[list[int]]
    confidence: np.ndarray
    stops: list[bool] | None = None


def undrafted(rows: int) -> VerifyLayout:
    """The layout of a pass over the anchors alone."""
    return VerifyLayout(None, 0, rows, False, 0, None)


def prefill(
    state: RoundState, target: Target, prompts: list[list[int]], lengths: list[int], joining: list[int] | None = None
) -> TargetOutput:
    """A round without a draft: the whole prompts in one pass, right-padded or packed. Of its logits only those behind
    the last token of every prompt are computed, [n, 1, V].

    Args:
        prompts: tokens of the n rows that are not cached. lengths: see `packing.ForwardContext`.
        joining: places of these rows where others are active.
    """
    counts, device = [len(prompt) for prompt in prompts], target.device
    if target.is_stateful and len(set(counts)) > 1:
        return prefill_by_length(state, target, prompts, lengths, joining)
    if target.packs and len(set(counts)) > 1:
        (passed,) = target.forward_packed([prompt_part(state, target, prompts, lengths)], state.cache)
    else:
        tokens, read_at = laid_out(target, prompts, lengths)
        keep = sorted({count - 1 for count in counts})
        passed = target.forward(tokens, state.cache, on_device(keep, device), read_at, joining)
        columns = on_device([keep.index(count - 1) for count in counts], device)
        last = passed.logits[torch.arange(len(counts), device=device), columns][:, None]
        passed = replace(passed, logits=last)
    state.cache.commit(counts, joining)
    return passed


def laid_out(target: Target, prompts: list[list[int]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens of prompts, right-padded, [n, P], and for targets that are `growing` what is said of each in
    `packing.ForwardContext`."""
    longest = max(map(len, prompts))
    # Filled with a token that any target knows; what padding is called may be none.
    tokens = on_device([prompt + [0] * (longest - len(prompt)) for prompt in prompts], target.device)
    # Plain decoding reads a prompt in one pass.
    return tokens, on_device(lengths, target.device)[:, None].expand_as(tokens) if target.growing else None


def prompt_part(
    state: RoundState, target: Target, prompts: list[list[int]], lengths: list[int], first: int = 0
) -> Part:
    """The part of a packed pass in which prompts are read, see `prefill`; the n rows lie from place `first` on."""
    tokens, read_at = laid_out(target, prompts, lengths)
    counts = list(map(len, prompts))
    packing = state.cache.packing(on_device(counts, target.device), tokens.shape[1], sum(counts), first)
    return Part(tokens, packing, True, read_at)


def prefill_by_length(
    state: RoundState, target: Target, prompts: list[list[int]], lengths: list[int], joining: list[int] | None
) -> TargetOutput:
    """`prefill` of targets whose layers would read what fills shorter prompts up: a pass for each length."""
    places = list(range(len(prompts))) if joining is None else joining
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(i)
    passes = []
    for own in groups.values():
        parts = ([part[i] for i in own] for part in (prompts, lengths, places))
        passes.append(prefill(state, target, *parts))
    order = [i for own in groups.values() for i in own]
    return side_by_side(passes, [order.index(i) for i in range(len(prompts))])


def draft(state: RoundState, plan: Plan, sampler: DraftSampler) -> DraftBlock | None:
    """A block with a line for every row, zeros for those that do not draft; `None` when none does.

    Args:
        sampler: see `DSparkHead.sample_block`.
    """
    if not plan.rows:
        state.drafter.flush()
        return None
    rows = len(state.anchors)
    some = None if len(plan.rows) == rows else plan.rows
    block = state.drafter.draft(state.anchors, plan.length, sampler, some)
    return block if some is None else block.spread(on_device(some, block.tokens.device), rows)


def schedule(
    scheduler: ConstantSchedule,
    plan: Plan,
    block: DraftBlock | None,
    confidence: torch.Tensor | None,
    max_drafts: list[int],
    device: torch.device,
) -> VerifyLayout:
    """How many drafts of each row to verify.

    Args:
        confidence: [R, drafted], calibrated. max_drafts: [R], those that each row could commit.
    """
    rows = len(max_drafts)
    if block is None:
        return undrafted(rows)
    drafted, drafting = block.tokens.shape[1], plan.index(rows)
    if not plan.packed and scheduler.settings.threshold is None and not scheduler.runs_ahead:
        # Columns were paid for when they were drafted; no row's confidence changes that.
        lengths = np.zeros(rows, dtype=int)
        lengths[drafting] = np.minimum(max_drafts, drafted)[drafting]
        return _on_host(lengths, False, drafted, None, device)
    if scheduler.runs_ahead:
        drafters = set(plan.rows)
        limits = [most if r in drafters else 0 for r, most in enumerate(max_drafts)]
        lengths = scheduler.choose_on_device(plan, confidence.to(device), on_device(limits, device))
        return VerifyLayout(lengths, drafted, rows + plan.budget, plan.packed, drafted, None)
    survival = np.zeros((rows, drafted))
    survival[drafting] = scheduler.estimates.survival(confidence.cpu().numpy()[drafting], drafting)
    return _on_host(scheduler.choose(plan, survival, max_drafts), plan.packed, drafted, survival, device)


def _on_host(lengths: np.ndarray, packed: bool, drafted: int, survival, device: torch.device) -> VerifyLayout:
    """The layout of lengths that the host has chosen."""
    most, tokens = int(lengths.max()), len(lengths) + int(lengths.sum())
    packed = packed and tokens < len(lengths) * (1 + most)
    return VerifyLayout(torch.from_numpy(lengths).to(device), most, tokens, packed, drafted, survival)


def verify(
    state: RoundState,
    target: Target,
    block: DraftBlock | None,
    layout: VerifyLayout,
    read_at: torch.Tensor | None,
    joining: Part | None = None,
) -> tuple[TargetOutput, torch.Tensor]:
    """A pass over the anchors and the drafts behind them: logits and states of [R, L+1] tokens, and the drafts [R, L];
    L is layout.most.

    Args:
        read_at: see `packing.ForwardContext`. joining: rows behind the others whose prompts are read in the same pass.
    """
    tokens = state.anchors[:, None]
    if layout.most:
        tokens = torch.cat([tokens, block.tokens[:, : layout.most].to(tokens.device)], dim=1)
    drafts, tokens = tokens[:, 1:], tokens.clamp(min=0)
    if not layout.packed and joining is None:
        return target.forward(tokens, state.cache, lengths=read_at), drafts
    rows, width = tokens.shape
    counts, size = torch.full_like(state.anchors, width), rows * width
    if layout.packed:
        counts, size = 1 + layout.verify_lens, layout.tokens
    own = Part(tokens, state.cache.packing(counts, width, size), lengths=read_at)
    passed, *read = target.forward_packed([own] if joining is None else [own, joining], state.cache)
    return replace(passed, read=read[0]) if read else passed, drafts


def accept(
    logits: torch.Tensor,
    drafts: torch.Tensor | None,
    block: DraftBlock | None,
    layout: VerifyLayout,
    processors: BlockProcessors,
    prefixes: Prefixes | None,
) -> tuple[Verdict, torch.Tensor]:
    """What the target makes of the drafts, and its logits [R, L+1, V] after processors."""
    logits = processors(logits, prefixes)
    if layout.most == 0:
        nothing = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return Verdict(nothing, processors.next_tokens(logits[:, 0])), logits
    seeds = processors.seeds(len(logits), logits.device)
    return verdict_of(logits, drafts, block.logits, layout.verify_lens, seeds), logits


def verdict_of(
    target_logits: torch.Tensor,
    drafts: torch.Tensor,
    sampled_from: torch.Tensor | None,
    lengths: torch.Tensor,
    seeds: torch.Tensor | None = None,
) -> Verdict:
    """Of drafts [R, L] that were the argmax of the head's logits, or were sampled from [R, >= L, V]. A draft that is no
    token is as if it had not been verified."""
    if sampled_from is None:
        return accept_greedy(target_logits, drafts, lengths)
    sampled_from = sampled_from[:, : drafts.shape[1]].to(target_logits.device)
    lengths = torch.minimum(lengths, (drafts >= 0).long().cumprod(dim=1).sum(dim=1))
    return accept_sampled(target_logits, drafts.clamp(min=0), sampled_from, lengths, seeds)


def to_host(
    block: DraftBlock | None,
    layout: VerifyLayout,
    verdict: Verdict,
    confidence: torch.Tensor | None,
    count: int | None = None,
) -> HostRound:
    """All that the host needs of a round. The one transfer, where the host waits for the device.

    Args:
        confidence: [R, drafted], calibrated. count: tokens that every row commits, where that is not one more than it
            accepted; drafts behind them were not looked at.
    """
    if block is None:
        tokens = verdict.next_tokens[:, None].tolist()
        nothing = np.zeros(len(tokens), dtype=int)
        return HostRound(tokens, nothing, nothing, [[] for _ in tokens], np.zeros((len(tokens), 0)))
    device, drafted = layout.verify_lens.device, block.tokens.shape[1]
    looked_at = layout.verify_lens if count is None else layout.verify_lens.clamp(max=count)
    columns = [x[:, None] for x in (verdict.accepted, looked_at, verdict.next_tokens)]
    # In double precision token ids stay what they are.
    columns += [block.tokens.clamp(min=0).to(device), confidence.to(device)]
    table = torch.cat([column.double() for column in columns], dim=1).cpu().numpy()
    whole, confidence = table[:, : 3 + drafted].astype(int), table[:, 3 + drafted :]
    accepted, verified, drafts = whole[:, 0], whole[:, 1], whole[:, 3:].tolist()
    rows = zip(drafts, accepted.tolist(), whole[:, 2].tolist(), strict=True)
    tokens = [[*own[: kept if count is None else count - 1], last] for own, kept, last in rows]
    return HostRound(tokens, accepted, verified, drafts, confidence)


def commit(state: RoundState, passed: TargetOutput, counts: list[int], verdict: Verdict, as_accepted: bool) -> None:
    """Make the first counts[r] tokens of the pass part of row r, and the token behind them its anchor. Rows that join
    behind these have nothing yet.

    Args:
        as_accepted: whether all rows there are commit one token more than the verdict accepted, those that end here
            aside: the device can tell then where the next pass starts.
    """
    starts = None
    if as_accepted:
        starts = state.cache.starts + 1 + verdict.accepted if passed.starts is None else passed.starts
    state.cache.commit(counts, list(range(len(counts))), starts)
    state.drafter.append(passed.features, counts)
    state.anchors = verdict.next_tokens
