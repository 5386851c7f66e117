"""Times of a round, measured by running rounds.

A pass that is timed alone finds its weights in the processor's cache, and nothing is accepted or committed behind it;
on two CPU cores such times were 13 to 50 % too low for rounds that draft, and right for those that do not.
"""

import random
import time
from collections import defaultdict

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..modeling_dspark import DSparkHead
from ..scheduling.cost import KINDS, sizes_of
from ..scheduling.estimates import Experience
from ..scheduling.scheduler import NO_DRAFT, ConstantSchedule, Plan, Settings
from .loop import Rounds
from .stats import synchronize

# Rounds of a shape in a turn, of which the quicker counts. With a single one, lengths of 1 and 7 looked 16 % apart at
# batch 1 that were 5 % apart in generation; a third makes what is found hardly surer.
ROUNDS = 2
# The variance of a median over that of a mean.
MEDIANS_VARY = 1.57
# Standard error, of logarithms, of times that turns agree about.
AGREED = 0.01


@torch.no_grad()
def measure(target: PreTrainedModel, head: DSparkHead, rows: int, contexts: list[int]) -> dict[str, np.ndarray]:
    """Seconds of every kind of step (see [`CostTable`]), [contexts, sizes] each, for a number of rows. It takes
    several calls to tell what disturbed the machine for a moment; see [`settled`].

    In the longer contexts the smallest and the largest sizes stand for those between, and packed passes are as much
    dearer than even ones as in the first. Sizes come in random order: a machine that slows down on the way would make
    what comes last look dear in every call.
    """
    draw = random.Random()
    block = head.config.gamma
    tables: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS if kind != "packed"}
    for i, context in enumerate(contexts):
        trial = Trial(target, head, rows, context)
        tokens = _sizes(block + 1) if i == 0 else sorted({1, 2, block + 1})
        seconds = trial.seconds(draw.sample(tokens, len(tokens)))
        if i == 0:
            dearer = trial.packing(seconds["verify"])
        for kind, lines in tables.items():
            sizes = sorted(seconds[kind])
            measured = np.array([seconds[kind][size] for size in sizes])
            every = range(1, sizes_of(block)[kind] + 1)
            if i == 0:
                lines.append(np.interp(every, sizes, measured))
                continue
            longer = measured - lines[0][[size - 1 for size in sizes]]
            lines.append(lines[0] + np.interp(every, sizes, longer).clip(min=0))
    times = {kind: np.stack(lines) for kind, lines in tables.items()}
    return times | {"packed": times["verify"] * dearer}


def _sizes(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 .. up to `most`: of long blocks not every size is worth its own rounds."""
    powers = [1 << i for i in range(most.bit_length())]
    return sorted({most, *(size for power in powers for size in (power, power * 3 // 2) if size < most)})


def settled(turns: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One time for every one that was measured in several turns: the median, with all turns brought to the same pace.

    A shared or throttled machine changes its pace for seconds to minutes, and a moment of another pace makes a size
    look dear beside those measured in the next. What is left of that is taken out by [`straightened`].
    """
    times = {}
    for kind, own in _at_one_pace(turns).items():
        times[kind] = np.exp(np.median(own, axis=0))
        # A round without drafts is another thing than one with few.
        drafted = slice(1, None) if kind in ("verify", "packed") else slice(None)
        noise = MEDIANS_VARY * np.var(own, axis=0).mean() / len(turns)
        times[kind][:, drafted] = [straightened(line, noise) for line in times[kind][:, drafted]]
    return times


def agree(turns: list[dict[str, np.ndarray]]) -> bool:
    """Whether the mean of the turns has a standard error that no decision depends on."""
    variances = [np.var(own, axis=0, ddof=1).ravel() for own in _at_one_pace(turns).values()]
    return np.concatenate(variances).mean() < len(turns) * AGREED**2


def _at_one_pace(turns: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Logarithms [turns, contexts, sizes] of the times of every kind."""
    logs = {kind: np.log([turn[kind] for turn in turns]) for kind in KINDS}
    surprise = [(own - np.median(own, axis=0)).reshape(len(turns), -1) for own in logs.values()]
    pace = np.median(np.concatenate(surprise, axis=1), axis=1)[:, None, None]
    return {kind: own - pace for kind, own in logs.items()}


def straightened(times: np.ndarray, noise: float) -> np.ndarray:
    """Times [N] by size, brought as near to a straight line as `noise`, the variance of their logarithm, explains.

    Where turns agree, as on a GPU, the steps that they show are kept.
    """
    if len(times) < 3:
        return times
    sizes = np.arange(len(times))
    line = np.polynomial.Polynomial.fit(sizes, times, 1)(sizes)
    off = times / line - 1
    variance = (off**2).sum() / (len(times) - 2)
    return line * (1 + max(0.0, 1 - noise / max(variance, 1e-12)) * off)


class Told(ConstantSchedule):
    """Plans and verifies what it is told to."""

    next: Plan
    lengths: np.ndarray

    def choose(self, plan: Plan, survival: np.ndarray, rooms: list[int]) -> np.ndarray:
        return self.lengths

    def choose_ahead(self, plan: Plan, confidence: torch.Tensor, rooms: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.lengths).to(rooms.device)


class Trial:
    """Greedy rounds of rows that hold `context` tokens; which tokens does not matter."""

    def __init__(self, target: PreTrainedModel, head: DSparkHead, rows: int, context: int):
        config = GenerationConfig()
        config._pad_token_tensor = None
        self.block, self.everybody = head.config.gamma, list(range(rows))
        self.schedule = Told(Settings(self.block, "constant", None), Experience.fresh(self.block), rows)
        prompts = torch.arange(2 * rows, device=target.device).view(rows, 2) * 7919 % head.config.vocab_size
        nothing = LogitsProcessorList(), StoppingCriteriaList()
        self.rounds = Rounds(target, head, prompts, None, None, None, *nothing, config, None, self.schedule)
        outcome, logits = self.rounds.prefill()
        self.rounds.commit(outcome, logits)
        self.rounds.rooms = [self.block] * rows
        # Rows of one length are the exception in generation.
        self.lengths = [context - r % 2 for r in range(rows)]
        self._round([self.block] * rows, False)
        # Memory that was never written is the same page of zeros everywhere, which is read faster than a context is.
        for cache in (self.rounds.cache, self.rounds.drafter.cache):
            for layer in cache.layers:
                layer.keys.fill_(1)
                layer.values.fill_(1)

    def seconds(self, tokens: list[int]) -> dict[str, dict[int, float]]:
        """Of each kind of step by size, for rounds that verify so many tokens a row."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        undrafted = []
        for i, count in enumerate(tokens):
            if i % 2 == 0:
                # All other times are weighed against that of a round without drafts, which had better be right.
                undrafted.append(self._undisturbed([0] * len(self.lengths), False)[1])
            if count > 1:
                even = [count - 1] * len(self.lengths)
                found["draft"][count - 1], found["verify"][count] = self._undisturbed(even, False)
        found["verify"][1] = np.median(undrafted).item()
        features = self.rounds.passed.features
        unread = max(1, min(self.lengths) - self.block - 1)
        for _ in range(2):
            unseen = features.new_ones(len(features), unread, features.shape[2])
            self.rounds.drafter.remember(unseen, [unread] * len(features))
            found["start"][1], _ = self._round([1] * len(features), False)
        return found

    def _undisturbed(self, lengths: list[int], packed: bool) -> tuple[float, float]:
        """The quicker of two rounds after a first: rounds of a shape come many in a row, and the first of them finds
        no memory of its size."""
        self._round(lengths, packed)
        return min((self._round(lengths, packed) for _ in range(ROUNDS)), key=sum)

    def packing(self, even: dict[int, float]) -> np.ndarray:
        """[block + 1] how many times the seconds of `even` passes those of packed ones of as many tokens are, by size;
        measured for few tokens and for many.

        A factor, as a difference between two times, one of them disturbed, can be more than a third time.
        """
        factors = np.ones(self.block + 1)
        if not self.rounds.target.packs or len(self.lengths) < 2 or self.block < 2:
            return factors
        ends = sorted({2, max(size for size in even if size <= self.block)})
        measured = [self._undisturbed(self._uneven(size), True)[1] / even[size] for size in ends]
        factors[1:-1] = np.interp(range(2, self.block + 1), ends, measured)
        return factors

    def _uneven(self, count: int) -> list[int]:
        """As many drafts as `count` tokens a row leave room for: the first rows have as many as they can."""
        lengths, left = [], len(self.lengths) * (count - 1)
        for _ in self.lengths:
            lengths.append(min(left, self.block))
            left -= lengths[-1]
        return lengths

    def _round(self, lengths: list[int], packed: bool) -> tuple[float, float]:
        """Seconds until the drafts are there, and of everything behind them."""
        rounds, most = self.rounds, max(lengths)
        rounds.cache.lengths = list(self.lengths)
        waiting = zip(self.lengths, rounds.drafter.unread, strict=True)
        rounds.drafter.cache.lengths = [length - unread for length, unread in waiting]
        self.schedule.lengths = np.array(lengths)
        plan = Plan(self.everybody, most, most, packed, sum(lengths)) if most else NO_DRAFT
        started = self._now()
        block = rounds.draft(plan)
        chosen = rounds.schedule(plan, block)
        drafted = self._now()
        logits = rounds.verify(block, chosen)
        outcome = rounds.accept(block, chosen, logits)
        rounds.learn(plan, chosen, outcome)
        rounds.commit(outcome, logits, chosen)
        return drafted - started, self._now() - drafted

    def _now(self) -> float:
        synchronize(self.rounds.target.device)
        return time.perf_counter()
