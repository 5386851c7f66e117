"""Speed of decoding methods, measured alternately in one run on the same prompts."""

import copy
import os
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from transformers import CompileConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..generation.hook import stock_loop
from ..generation.stats import DSparkStats, synchronize
from ..modeling_dspark import DSparkHead
from .baselines import BASELINES, ONE_ROW, Others, RoundCounter, keeping_mtp
from .prompts import encode, sampling
from .report import format_cell

# Rounds of median polish; it mostly settles in three.
POLISHED = 10
# Of a median, over the median of absolute deviations and the root of the count, for normal deviations.
STANDARD_ERROR = 1.86
# The standard error of a speed, as a share of it, above which turns go on.
SURE = 0.01
# Turns of a batch of prompts, at least.
TURNS = 3
# A table's limit in seconds: a default table has finished by then on a small machine.
SECONDS = 120.0
# What tables say of the mark in `turns_cell`.
CUT_SHORT = "turns: runs of a method; cut: the time limit came before the turns that were to be."
# Behind the name of a method that decodes with static caches, and compiled passes.
STATIC = "-static"
# Of the call that says how long the others will take: so few that it is short, so many that the prompt weighs little.
FIRST_TOKENS = 8


@dataclass(frozen=True)
class Cell:
    """What is measured at one batch size.

    batches: of prompts, all of one size. methods: see [`cells_of`]. turns: of every batch, at least. domain: the set of
    prompts, where there are several.
    """

    batches: list[list[str]]
    methods: list[str]
    turns: int = TURNS
    domain: str | None = None

    @property
    def batch_size(self) -> int:
        return len(self.batches[0])

    @property
    def fewest_turns(self) -> int:
        return self.turns * len(self.batches)


@dataclass(frozen=True)
class BenchRecord:
    """One method at one batch size.

    domain: the set of prompts, where there are several. tokens_per_second: all tokens over all seconds, as in
        [`median_polish`], all rows together. noise: its standard error beside the other methods, a share of it;
        `None` where a batch of prompts had one turn only. prompts: so many were decoded, in turns: so many runs of the
        method. cut_short: whether the time limit came before the speeds of this batch size were known as well as asked.
    speedup: of tokens_per_second over plain's. tau: tokens a round of a row. verify_length: drafts verified a round of
    a row. draft_ms, schedule_ms, verify_ms: mean a round. ceiling: tau * T(1) / (T_verify + T_draft), the speed-up if
    everything but the two model passes were free, with T(1) plain's time a step. identical: whether all outputs
    equalled plain's. Fields that do not apply to a method are `None`.
    """

    method: str
    batch_size: int
    tokens_per_second: float
    noise: float | None
    prompts: int
    turns: int
    cut_short: bool
    domain: str | None = None
    speedup: float | None = None
    tau: float | None = None
    verify_length: float | None = None
    draft_ms: float | None = None
    schedule_ms: float | None = None
    verify_ms: float | None = None
    ceiling: float | None = None
    identical: bool | None = None


@dataclass(frozen=True)
class MethodRun:
    """One method over one batch of prompts. tokens: of all rows, steps: of the longest. outputs: new tokens of every
    row. stats: where the method drafts with our loop. committed: tokens of each round of transformers' assisted loop,
    where that is used."""

    seconds: float
    outputs: list[list[int]]
    stats: DSparkStats | None
    committed: list[int] | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def steps(self) -> int:
        return max(map(len, self.outputs))


# The runs of one method, by batch of prompts and turn.
Runs = list[list[MethodRun]]


def cells_of(
    head: DSparkHead,
    prompts: list[str],
    batch_sizes: list[int],
    methods: list[str],
    turns: int = TURNS,
    domain: str | None = None,
) -> list[Cell]:
    """A cell for every batch size. Prompts that fill no batch are left out.

    Args:
        methods: `plain`; `stock`, transformers' own loop with the same head, at batch 1 only; `dspark`, the head as it
            is set; `load` and `fixed-1`, `fixed-2`, .., the head with that schedule; the first three also
            with `-static` behind, compiled; and the baselines of `baselines.py`, those of transformers' loop at batch 1
            only.

    Raises:
        ValueError: for a method that there is not, and a batch size without prompts or methods for it.
    """
    known = ["plain", "stock", "dspark", *static_methods(), "load", *fixed_methods(head), *BASELINES]
    unknown = set(methods) - set(known)
    if unknown:
        raise ValueError(f"Unknown methods {sorted(unknown)}; choose from {', '.join(known)}.")
    cells = []
    for size in batch_sizes:
        if not 1 <= size <= len(prompts):
            raise ValueError(
                f"Batch size {size} needs as many prompts, and there are {len(prompts)}: give more --prompts, a higher "
                "--limit, or a smaller batch."
            )
        chosen = [method for method in methods if size == 1 or not method.startswith(ONE_ROW)]
        if not chosen:
            raise ValueError(f"No method is left at batch size {size}: transformers' assisted loop takes one row only.")
        batches = [prompts[i : i + size] for i in range(0, len(prompts) - size + 1, size)]
        cells.append(Cell(batches, chosen, turns, domain))
    return cells


def check_compiler(device: torch.device) -> None:
    """A `ValueError` where passes on a CPU would be compiled and torch finds no C++ compiler."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and sys.platform != "win32" and shutil.which(name) is None:
        raise ValueError(
            f"Compiling for a CPU takes a C++ compiler, and there is no {name}. Install one, or name yours in the "
            "environment variable CXX."
        )


def static_methods() -> list[str]:
    """The methods with static caches and compiled passes."""
    return [method + STATIC for method in ("plain", "stock", "dspark")]


def fixed_methods(head: DSparkHead) -> list[str]:
    """The methods that draft and verify the same number of positions every round."""
    return [f"fixed-{k}" for k in range(1, head.config.gamma + 1)]


def estimate(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    cells: list[Cell],
    max_new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of a turn of each cell, by a short call of plain decoding at its batch size.

    That is about the most: the prompt is counted with every few tokens, and all methods are taken to be no faster.
    """
    seconds = []
    for cell in cells:
        inputs, tokens = encode(cell.batches[0], tokenizer, model.device), min(FIRST_TOKENS, max_new_tokens)
        # The first call pays for what is done once.
        _, run = (run_method("plain", model, head, inputs, tokens, clock) for _ in range(2))
        seconds.append(run.seconds / run.steps * max_new_tokens * len(cell.methods))
    return seconds


def expectation(cells: list[Cell], turn_seconds: list[float], seconds: float) -> str:
    """What will be measured, and how long that takes, as people read it."""
    sizes: dict[str, dict[int, None]] = {}
    for cell in cells:
        sizes.setdefault(", ".join(cell.methods), {})[cell.batch_size] = None
    what = "; ".join(f"{methods} at batch {', '.join(map(str, of_them))}" for methods, of_them in sizes.items())
    prompts = len({prompt for cell in cells for batch in cell.batches for prompt in batch})
    turns, needed = sum(cell.fewest_turns for cell in cells), sum(_needs(cells, turn_seconds))
    limit = f"cut short at {seconds:g} s" if needed > seconds else f"at most {seconds:g} s"
    return (
        f"{what}; {prompts} prompt{'s' if prompts > 1 else ''}: {turns} turns or up to twice as many, "
        f"about {needed:.0f} s or up to twice as long, {limit}"
    )


def _needs(cells: list[Cell], turn_seconds: list[float]) -> list[float]:
    """Seconds of each cell for its fewest turns and the one before them."""
    return [(1 + cell.fewest_turns) * turn for cell, turn in zip(cells, turn_seconds, strict=True)]


def bench(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    cells: list[Cell],
    turn_seconds: list[float],
    max_new_tokens: int = 128,
    seconds: float = SECONDS,
    report: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
    others: Others | None = None,
) -> Iterator[BenchRecord]:
    """Records of every cell, as soon as it is measured. Decoding is greedy.

    A turn is one run of every method over a batch of prompts, in random order; batches take turns. After a turn that is
    not measured each has as many as its cell says, and up to twice as many where a method's speed is not yet known
    within 1 %. What is left of the time is shared among the cells that are left, by what they need: where it is too
    short, all have fewer turns. Each has one in any case, and a turn under way is finished.

    Args:
        turn_seconds: see [`estimate`].
        seconds: the time limit; compiling, for methods that do, comes before.
        report: told of every turn.
        others: what the methods `assistant` and `baseline-head` draft with.

    Raises:
        ValueError: when one turn of every cell would take longer than the limit.
    """
    least = 2 * sum(turn_seconds)
    if least > seconds:
        raise ValueError(
            f"--seconds {seconds:g} is too short to run every method twice at every batch size, once to warm up: that "
            f"takes about {least:.0f} s. Give --seconds {2 * least:.0f}, or fewer methods, batch sizes or "
            "--max-new-tokens."
        )
    compiles = any(method.endswith(STATIC) for cell in cells for method in cell.methods)
    room = _room(cells, head, tokenizer, max_new_tokens) if compiles else None

    def run_one(method: str, inputs) -> MethodRun:
        return run_method(method, model, head, inputs, max_new_tokens, clock, room, others)

    for cell in cells:
        for method in filter(lambda method: method.endswith(STATIC), cell.methods):
            report(f"compiling {method} at batch {cell.batch_size}")
            run_one(method, encode(cell.batches[0], tokenizer, model.device))
    started, needs, draw = clock(), _needs(cells, turn_seconds), random.Random(0)

    def run_turn(cell: Cell, prompts: list[str]) -> dict[str, MethodRun]:
        inputs = encode(prompts, tokenizer, model.device)
        # What a run leaves in caches and memory helps or hinders the next, which must not always be the same one.
        order = draw.sample(cell.methods, len(cell.methods))
        return {method: run_one(method, inputs) for method in order}

    def report_turn(text: str) -> None:
        report(f"{text}; {clock() - started:.0f} s of at most {seconds:g} s")

    for index, cell in enumerate(cells):
        now = clock()
        ends = now + (started + seconds - now) * needs[index] / sum(needs[index:])
        runs, cut_short = _measure(cell, run_turn, ends, report_turn, clock)
        yield from _records(runs, cell, cut_short)


def _room(cells: list[Cell], head: DSparkHead, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> int:
    """Tokens that static caches hold, so that nothing is compiled anew for a longer prompt."""
    prompts = {prompt for cell in cells for batch in cell.batches for prompt in batch}
    longest = max(encode([prompt], tokenizer, "cpu")["input_ids"].shape[1] for prompt in prompts)
    return longest + max_new_tokens + head.config.block_size + 1


def _measure(
    cell: Cell,
    run_turn: Callable[[Cell, list[str]], dict[str, MethodRun]],
    ends: float,
    report: Callable[[str], None],
    clock: Callable[[], float],
) -> tuple[dict[str, Runs], bool]:
    """The runs of a cell, and whether its time ended, on the clock, before it was done."""
    # To warm up, and for the schedule to learn what steps cost and what a head is worth.
    run_turn(cell, cell.batches[0])
    runs: dict[str, Runs] = {method: [[] for _ in cell.batches] for method in cell.methods}
    waiting, turns = deque(range(len(cell.batches))), 0
    while waiting and (turns == 0 or clock() < ends):
        batch = waiting.popleft()
        for method, run in run_turn(cell, cell.batches[batch]).items():
            runs[method][batch].append(run)
        turns += 1
        report(f"{cell.domain or ''} batch {cell.batch_size}: turn {turns} of {cell.fewest_turns} or more".strip())
        if not _is_settled([own[batch] for own in runs.values()], cell.turns, len(cell.batches)):
            waiting.append(batch)
    return {method: [of_batch for of_batch in own if of_batch] for method, own in runs.items()}, bool(waiting)


def _is_settled(runs: Runs, fewest: int, batches: int) -> bool:
    """Whether the runs [methods, turns] over one of so many batches say well enough how fast every method is, or are
    twice as many as the fewest."""
    count = len(runs[0])
    if count < fewest:
        return False
    if count == 2 * fewest:
        return True
    _, errors = _compared(runs)
    return errors.max() < SURE * batches**0.5


def run_method(
    method: str,
    model,
    head,
    inputs,
    max_new_tokens: int,
    clock: Callable[[], float],
    room: int | None = None,
    others: Others | None = None,
    temperature: float = 0.0,
) -> MethodRun:
    """Decode with a method.

    Args:
        room: tokens that static caches hold. others: see [`bench`]. temperature: 0 is greedy.
    """
    kwargs = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True} | sampling(temperature)
    if method.endswith(STATIC):
        method, kwargs = method.removesuffix(STATIC), kwargs | _static_options(room)
    # Of transformers' loop only what it streams says what its rounds came to.
    rounds = RoundCounter() if method.startswith(ONE_ROW) else None
    if rounds is not None:
        kwargs["streamer"] = rounds
    synchronize(model.device)
    started = clock()
    if method == "plain":
        output = model.generate(**inputs, **kwargs)
    elif method in BASELINES:
        with keeping_mtp():
            output = model.generate(**inputs, **(others or Others()).arguments(method), **kwargs)
    else:
        with stock_loop() if method == "stock" else schedule_of(head, method):
            output = model.generate(**inputs, assistant_model=head, **kwargs)
    synchronize(model.device)
    seconds = clock() - started
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    outputs = [until_eos(row, model.generation_config.eos_token_id) for row in new]
    return MethodRun(seconds, outputs, getattr(output, "dspark", None), rounds and rounds.committed)


def _static_options(room: int | None) -> dict[str, Any]:
    """Of `generate`. On a CPU plain decoding is compiled only with a flag that transformers keeps to itself."""
    config = CompileConfig()
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    # Older releases have a cache as long as each call.
    return options | ({"max_cache_len": room} if hasattr(GenerationConfig(), "max_cache_len") else {})


@contextmanager
def schedule_of(head: DSparkHead, method: str) -> Iterator[None]:
    """The head with the schedule of a method, or with `whole` blocks drafted and verified; as it was afterwards."""
    before = head.generation_config
    head.generation_config = copy.deepcopy(before)
    if method == "load":
        head.generation_config.update(num_assistant_tokens_schedule="load", num_assistant_tokens=None)
    elif method.startswith("fixed-"):
        length = int(method.removeprefix("fixed-"))
        head.generation_config.update(num_assistant_tokens_schedule="constant", num_assistant_tokens=length)
    elif method == "whole":
        names = ("num_assistant_tokens", "assistant_confidence_threshold")
        head.generation_config.update(num_assistant_tokens_schedule="constant", **dict.fromkeys(names))
    try:
        yield
    finally:
        head.generation_config = before


def _records(measured: dict[str, Runs], cell: Cell, cut_short: bool) -> Iterator[BenchRecord]:
    compared = [_compared(runs) for runs in zip(*measured.values(), strict=True)]
    # [batches, methods]
    seconds, errors = (np.array(of_batches) for of_batches in zip(*compared, strict=True))
    noise = ((seconds * errors) ** 2).sum(axis=0) ** 0.5 / seconds.sum(axis=0)
    tokens = [sum(np.mean([run.tokens for run in own]) for own in runs) for runs in measured.values()]
    speeds = dict(zip(measured, tokens / seconds.sum(axis=0), strict=True))
    plain = measured.get("plain")
    of_plain = sum(plain or [], [])
    for index, (method, runs) in enumerate(measured.items()):
        fields, every = {}, sum(runs, [])
        if plain:
            same = all(run.outputs == right[0].outputs for own, right in zip(runs, plain, strict=True) for run in own)
            fields = {"speedup": float(speeds[method] / speeds["plain"]), "identical": same}
        if every[0].stats is not None:
            fields |= _round_times([run.stats for run in every])
            if plain:
                step_ms = 1000 * sum(run.seconds for run in of_plain) / sum(run.steps for run in of_plain)
                fields["ceiling"] = fields["tau"] * step_ms / (fields["draft_ms"] + fields["verify_ms"])
        elif any(run.committed for run in every):
            fields["tau"] = float(np.mean([length for run in every for length in run.committed or ()]))
        share = float(noise[index]) if np.isfinite(noise[index]) else None
        counts = (len(runs) * cell.batch_size, len(every), cut_short)
        yield BenchRecord(method, cell.batch_size, float(speeds[method]), share, *counts, cell.domain, **fields)


def median_polish(seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each method takes beside the others, from the seconds [turns, methods] of its runs.

    Other work on a machine slows a single run or, for minutes, all of them. Tukey's median polish takes out both: the
    logarithm of a run's seconds is that of its turn, plus that of its method, plus a rest whose medians over turns and
    over methods are zero.

    Returns:
        [methods] seconds, at the pace of the median turn; [methods] standard errors of their logarithms, by the median
        of the rests' absolute values, which are infinite after one turn.
    """
    times, method = np.log(seconds), np.zeros(seconds.shape[1])
    for _ in range(POLISHED):
        turn = np.median(times - method, axis=1, keepdims=True)
        method = np.median(times - turn, axis=0)
    errors = STANDARD_ERROR * np.median(np.abs(times - turn - method), axis=0) / len(seconds) ** 0.5
    if len(seconds) == 1:
        errors = np.full_like(errors, np.inf)
    return np.exp(np.median(turn) + method), errors


def _compared(runs: Iterable[list[MethodRun]]) -> tuple[np.ndarray, np.ndarray]:
    """The runs [methods, turns] over one batch beside each other."""
    return median_polish(np.array([[run.seconds for run in own] for own in runs]).T)


def _round_times(stats: list[DSparkStats]) -> dict[str, float]:
    rounds = sum(s.rounds for s in stats)
    lengths = [length for s in stats for row in s.committed_lengths for length in row]
    return {
        "tau": sum(lengths) / len(lengths),
        "verify_length": sum(sum(s.verified) for s in stats) / len(lengths),
        "draft_ms": 1000 * sum(s.draft_seconds for s in stats) / rounds,
        "schedule_ms": 1000 * sum(s.schedule_seconds for s in stats) / rounds,
        "verify_ms": 1000 * sum(s.verify_seconds for s in stats) / rounds,
    }


def until_eos(row: list[int], eos_token_id: int | list[int] | None) -> list[int]:
    """The tokens of a row up to its first end-of-sequence token, that token included."""
    ids = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    end = next((i + 1 for i, token in enumerate(row) if token in ids), len(row))
    return row[:end]


def turns_cell(record: BenchRecord) -> str:
    """The turns of a record as a table shows them, with a mark where the time limit came first."""
    return f"{record.turns}{' cut' if record.cut_short else ''}"


def as_table(records: list[BenchRecord]) -> Table:
    """The records as people read them."""
    table = Table(
        title="greedy decoding, methods measured alternately",
        caption="of it: share of the ceiling that was reached. same: whether all tokens equal plain's.\n" + CUT_SHORT,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = ("batch", "prompts", "turns", "tok/s", "speed up", "tau", "draft ms", "verify ms", "ceiling", "of it")
    table.add_column("method", no_wrap=True)
    for column in (*columns, "same"):
        table.add_column(column, justify="right")
    for r in records:
        share = r.speedup / r.ceiling if r.ceiling else None
        same = {None: "-", True: "yes", False: "NO"}[r.identical]
        table.add_row(
            r.method,
            str(r.batch_size),
            str(r.prompts),
            turns_cell(r),
            f"{r.tokens_per_second:.1f}",
            format_cell(r.speedup, "{:.2f}x"),
            format_cell(r.tau, "{:.2f}"),
            format_cell(r.draft_ms, "{:.1f}"),
            format_cell(r.verify_ms, "{:.1f}"),
            format_cell(r.ceiling, "{:.2f}x"),
            format_cell(share, "{:.0%}"),
            same,
        )
    return table


def as_json(records: list[BenchRecord]) -> list[dict]:
    """The records as machines read them."""
    return [asdict(record) for record in records]
