"""Times of a round, measured by running rounds.

A pass that is timed alone finds its weights in the processor's cache, and nothing is accepted or committed behind it;
on two CPU cores such times were 13 to 50 % too low for rounds that draft, and right for those that do not.
"""

import random
import time

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from ..modeling_dspark import DSparkHead
from ..scheduling.cost import sizes_of
from ..scheduling.estimates import Experience
from ..scheduling.plan import NO_DRAFT, Plan
from ..scheduling.scheduler import ConstantSchedule
from ..scheduling.settings import Settings
from .loop import Rounds
from .stats import synchronize

# Rounds of every shape in a turn. One of each after the other, as a machine is disturbed for many rounds in a row.
ROUNDS = 6
# By how much (root mean square of logarithms) the two quickest rounds of a shape differ where times need no more turns.
AGREED = 0.01

# By kind of step, context and size: seconds, and those of every round.
Seconds = dict[tuple[str, int, int], float]
Samples = dict[tuple[str, int, int], list[float]]


@torch.no_grad()
def measure(
    target: PreTrainedModel, head: DSparkHead, rows: int, contexts: list[int], samples: Samples, seed: float
) -> None:
    """Add a turn of rounds for a number of rows. It takes several to tell what disturbed the machine for a moment.

    In the longer contexts the smallest and the largest sizes stand for those between, and packed passes are not
    measured. Sizes come in random order: a machine that slows down on the way would make what comes last look dear.
    """
    block, draw = head.config.gamma, random.Random(seed)
    for context in contexts:
        trial, first = Trial(target, head, rows, context), context == contexts[0]
        sizes = _sizes(block + 1) if first else sorted({1, 2, block + 1})
        shapes = [(size, False) for size in sizes]
        if first and trial.packs:
            shapes += [(size, True) for size in _packed_sizes(sizes)]
        for _ in range(ROUNDS):
            for size, packed in draw.sample(shapes, len(shapes)):
                draft, verify = trial.seconds(size, packed)
                samples["packed" if packed else "verify", context, size].append(verify)
                if size > 1 and not packed:
                    samples["draft", context, size - 1].append(draft)
        for _ in range(2):
            samples["start", context, 1].append(trial.seconds_to_start())


def settled(samples: Samples, contexts: list[int], block: int) -> dict[str, np.ndarray]:
    """Seconds of every kind of step (see [`CostTable`]), [contexts, sizes] each.

    Of every shape the two quickest rounds count, as what disturbs a machine only ever makes a round slower: on a shared
    one the slope over sizes then has a third to a half of the error that it has with medians. What is left is taken out
    by [`straightened`].
    """
    seconds, noise = {shape: _quickest(own).mean() for shape, own in samples.items()}, _noise(samples)
    times = {kind: _times(seconds, kind, contexts, block, noise) for kind in ("verify", "draft", "start")}
    return times | {"packed": times["verify"] * _packing(seconds, contexts[0], block)}


def _times(seconds: Seconds, kind: str, contexts: list[int], block: int, noise: float) -> np.ndarray:
    """[contexts, sizes] of a kind of step: a line over sizes, and what longer contexts add to it."""
    lines: list[np.ndarray] = []
    every = range(1, sizes_of(block)[kind] + 1)
    for context in contexts:
        sizes = sorted(size for k, c, size in seconds if (k, c) == (kind, context))
        measured = np.array([seconds[kind, context, size] for size in sizes])
        if not lines:
            # A round without drafts is another thing than one with few.
            drafted = slice(1, None) if kind == "verify" else slice(None)
            measured[drafted] = straightened(np.array(sizes)[drafted], measured[drafted], noise)
            lines.append(np.interp(every, sizes, measured))
        else:
            longer = measured - lines[0][np.array(sizes) - 1]
            lines.append(lines[0] + np.interp(every, sizes, longer).clip(min=0))
    return np.stack(lines)


def _packing(seconds: Seconds, context: int, block: int) -> np.ndarray:
    """[block + 1] how many times the seconds of an even pass those of a packed one of as many tokens are, by size.

    A factor, as a difference between two times, one of them disturbed, can be more than a third time.
    """
    factors = np.ones(block + 1)
    sizes = sorted(size for kind, _, size in seconds if kind == "packed")
    if sizes:
        measured = [seconds["packed", context, size] / seconds["verify", context, size] for size in sizes]
        factors[1:-1] = np.interp(range(2, block + 1), sizes, measured)
    return factors


def agree(samples: Samples) -> bool:
    """Whether the quickest rounds of all shapes differ by nothing that a decision depends on."""
    return _noise(samples) < AGREED**2


def _noise(samples: Samples) -> float:
    """Variance of the logarithm of a time, as far as the two quickest rounds of every shape tell."""
    pairs = [_quickest(own) for (kind, _, _), own in samples.items() if kind != "start"]
    return float(np.mean([np.log(b / a) ** 2 for a, b in pairs]))


def _quickest(seconds: list[float]) -> np.ndarray:
    """[2]"""
    return np.sort(seconds)[:2]


def _sizes(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 .. up to `most`: of long blocks not every size is worth its own rounds."""
    powers = [1 << i for i in range(most.bit_length())]
    return sorted({most, *(size for power in powers for size in (power, power * 3 // 2) if size < most)})


def _packed_sizes(sizes: list[int]) -> list[int]:
    """Few tokens and many, but not whole blocks, which leave nothing to pack."""
    return sorted({2, sizes[-2]}) if len(sizes) > 2 else []


def straightened(sizes: np.ndarray, times: np.ndarray, noise: float) -> np.ndarray:
    """Times [N] of `sizes` [N], as near to a straight line as `noise`, the variance of their logarithm, explains.

    Where the quickest rounds agree, as on a GPU, the steps that they show are kept.
    """
    if len(times) < 3:
        return times
    line = np.polynomial.Polynomial.fit(sizes, times, 1)(sizes)
    off = times / line - 1
    variance = (off**2).sum() / (len(times) - 2)
    return line * (1 + max(0.0, 1 - noise / max(variance, 1e-12)) * off)


class Told(ConstantSchedule):
    """Verifies what it is told to."""

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
        vocab_size = min(head.config.vocab_size, target.config.get_text_config(decoder=True).vocab_size)
        prompts = torch.arange(2 * rows, device=target.device).view(rows, 2) * 7919 % vocab_size
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

    @property
    def packs(self) -> bool:
        """Whether passes of uneven lengths can be packed."""
        return self.rounds.target.packs and len(self.lengths) > 1

    def seconds(self, size: int, packed: bool) -> tuple[float, float]:
        """Of a round that verifies `size` tokens a row, evenly or unevenly spread: until the drafts are there, and of
        everything behind them."""
        return self._round(self._uneven(size) if packed else [size - 1] * len(self.lengths), packed)

    def seconds_to_start(self) -> float:
        """Of a draft of one position when all the context has yet to be read."""
        features = self.rounds.passed.features
        unread = max(1, min(self.lengths) - self.block - 1)
        self.rounds.drafter.remember(
            features.new_ones(len(features), unread, features.shape[2]), [unread] * len(features)
        )
        return self._round([1] * len(features), False)[0]

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
        logits, drafts = rounds.verify(block, chosen)
        outcome, logits = rounds.accept(block, chosen, logits, drafts)
        rounds.learn(plan, chosen, outcome)
        rounds.commit(outcome, logits, chosen)
        return drafted - started, self._now() - drafted

    def _now(self) -> float:
        synchronize(self.rounds.target.device)
        return time.perf_counter()
