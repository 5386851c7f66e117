"""A head beside other ways to draft, on the data sets of an evaluation: tokens a round and tokens a second, one row."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from rich import box
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_dspark import DSparkHead
from .baselines import BASELINES, Others
from .bench import MethodRun, run_method
from .data_sets import DataSet
from .evaluate import EvalSettings
from .prompts import chat_as_model_input, tokenize
from .report import format_cell

KNOWN = ("stock", *BASELINES)
# Prompts of each data set: every one is decoded by every method.
PROMPTS = 8


@dataclass(frozen=True)
class Compared:
    """A method on a data set. tokens_per_second: all tokens over all seconds. speedup: of that over plain decoding's.
    tau: tokens a round, bonus included; `None` without rounds."""

    data: str
    method: str
    prompts: int
    tokens_per_second: float
    speedup: float
    tau: float | None


def check_methods(model: PreTrainedModel, methods: list[str], others: Others) -> None:
    """Raise a ValueError for baselines that there are not, or not for this target."""
    unknown = sorted(set(methods) - set(KNOWN))
    if unknown:
        raise ValueError(f"Unknown baselines {unknown}; choose from {', '.join(KNOWN)}.")
    others.check(model, methods)


def compare(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    data_sets: list[DataSet],
    baselines: list[str],
    others: Others,
    settings: EvalSettings,
    report: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Compared]:
    """Plain decoding, the baselines, and the head with its own schedule, on the first prompts of every data set.

    Methods take turns in random order; each decodes the first prompt once more before, which is not measured.
    """
    methods, draw = ["plain", *baselines, "dspark"], random.Random(0)
    for data in data_sets:
        prompts = [turns[0] for turns in data.conversations[:PROMPTS]]
        runs: dict[str, list[MethodRun]] = {method: [] for method in methods}
        for number, prompt in enumerate([prompts[0], *prompts]):
            text = chat_as_model_input([{"role": "user", "content": prompt}], tokenizer, settings.thinking)
            inputs = tokenize([text], tokenizer, model.device)
            for method in draw.sample(methods, len(methods)):
                options = {"others": others, "temperature": settings.temperature}
                run = run_method(method, model, head, inputs, settings.max_new_tokens, clock, **options)
                if number:
                    runs[method].append(run)
            report(f"{data.name}: {number} of {len(prompts)} prompts by {', '.join(methods)}")
        speeds = {method: sum(r.tokens for r in own) / sum(r.seconds for r in own) for method, own in runs.items()}
        for method, own in runs.items():
            speed = speeds[method]
            yield Compared(data.name, method, len(prompts), speed, speed / speeds["plain"], _tau(own))


def _tau(runs: list[MethodRun]) -> float | None:
    rounds = [*chain.from_iterable(_rounds(run) for run in runs)]
    return sum(rounds) / len(rounds) if rounds else None


def _rounds(run: MethodRun) -> list[int]:
    """Tokens that each round committed; none without rounds."""
    return run.stats.committed_lengths[0] if run.stats is not None else run.committed or []


def as_table(compared: list[Compared], settings: EvalSettings) -> Table:
    """The comparison as people read it."""
    decoding = f"temperature {settings.temperature:g}" if settings.temperature else "greedy"
    table = Table(title=f"beside other ways to draft: one row, {decoding}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("data", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("prompts", "tok/s", "speed up", "tau"):
        table.add_column(column, justify="right")
    for c in compared:
        speed = (f"{c.tokens_per_second:.1f}", f"{c.speedup:.2f}x")
        table.add_row(c.data, c.method, str(c.prompts), *speed, format_cell(c.tau, "{:.2f}"))
    return table
