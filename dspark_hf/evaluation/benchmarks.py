"""The nine benchmarks of the paper by name: where their prompts are on the Hub, and how they are put to a model.

How many prompts are taken is as in DeepSpec's `eval.py`. DeepSpec ships its prompts as files, whose wording this
project does not know: the wording here is our own, but for the sentence that Qwen recommends for mathematics. For the
paper's very prompts give those files to `--data` instead.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .data_sets import DataSet, read_split

MATHEMATICS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
CODE = "Write a Python function that solves the following problem. Answer with the code in one block.\n\n"
COMPLETE = "Complete the following Python function. Answer with the whole function in one block.\n\n"
PROGRAM = "Write a Python program that solves the following problem. Answer with the code in one block.\n\n"

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """source: a data set of the Hub, see `data_sets.read_split`; or with files its id alone. turns: what the user says,
    from a row. prompts: so many are taken, from the front. title: as in the paper's table. files: of the repository,
    JSON lines, where the repository as a whole is none that `datasets` loads."""

    source: str
    turns: Callable[[Row], list[str]]
    prompts: int
    title: str
    files: tuple[str, ...] = ()


def _problem(row: Row) -> list[str]:
    return [row["problem"] + MATHEMATICS]


def _instruction(row: Row) -> list[str]:
    return [f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]]


def _contest(row: Row) -> list[str]:
    start = row.get("starter_code")
    begin = f"\n\nBegin with this code:\n```python\n{start}\n```" if start else ""
    return [PROGRAM + row["question_content"] + begin]


# LiveCodeBench and Arena-Hard are read as they come and no further than needed: their repositories hold a script and
# models' answers, and the former's rows are large with tests.
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k:main:test", lambda row: [row["question"] + MATHEMATICS], 500, "GSM8K"),
    "math500": Benchmark("HuggingFaceH4/MATH-500:test", _problem, 500, "MATH"),
    "aime25": Benchmark("MathArena/aime_2025:train", _problem, 30, "AIME25"),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp:sanitized:test",
        lambda row: [CODE + row["prompt"] + "\n\nIt must pass:\n" + "\n".join(row["test_list"])],
        256,
        "MBPP",
    ),
    "humaneval": Benchmark(
        "openai/openai_humaneval:test",
        lambda row: [f"{COMPLETE}```python\n{row['prompt']}\n```"],
        164,
        "HumanEval",
    ),
    "livecodebench": Benchmark(
        "livecodebench/code_generation_lite",
        _contest,
        500,
        "LCB",
        tuple(f"test{number}.jsonl" for number in ("", 2, 3, 4, 5, 6)),
    ),
    "mt-bench": Benchmark("HuggingFaceH4/mt_bench_prompts:train", lambda row: list(row["prompt"]), 80, "MT-Bench"),
    "alpaca": Benchmark("tatsu-lab/alpaca:train", _instruction, 500, "Alpaca"),
    "arena-hard-v2": Benchmark(
        "lmarena-ai/arena-hard-auto",
        lambda row: [row["prompt"]],
        500,
        "Arena-Hard",
        ("data/arena-hard-v2.0/question.jsonl",),
    ),
}

# Accepted length in the paper's table 1, in the order of BENCHMARKS: temperature 1, blocks of 7, no scheduler.
PAPER = {
    "Qwen/Qwen3-4B": {
        "Eagle3": (5.14, 4.62, 3.92, 3.69, 4.16, 3.77, 2.39, 2.26, 2.55),
        "DFlash": (5.40, 4.85, 4.15, 4.40, 4.74, 4.18, 3.07, 2.96, 2.83),
        "DSpark": (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29),
    },
    "Qwen/Qwen3-8B": {"DSpark": (6.17, 5.78, 5.01, 5.16, 5.52, 5.17, 3.72, 3.58, 3.21)},
    "Qwen/Qwen3-14B": {"DSpark": (6.21, 5.74, 4.94, 5.26, 5.43, 5.02, 3.70, 3.58, 3.13)},
    "google/gemma-4-12B-it": {"DSpark": (6.05, 5.78, 5.12, 5.11, 5.64, 4.51, 3.49, 3.35, 2.92)},
}


def names_of(chosen: list[str]) -> list[str]:
    """The benchmarks that are chosen, all for `all`.

    Raises:
        ValueError: for one that there is not.
    """
    if chosen == ["all"]:
        return [*BENCHMARKS]
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"There is no benchmark {unknown[0]!r}; choose from all, {', '.join(BENCHMARKS)}.")
    return chosen


def load_benchmark(name: str, limit: int | None = None) -> DataSet:
    """The first prompts of a benchmark: as many as DeepSpec takes, or at most `limit`.

    Raises:
        ValueError: when its rows are not those that are known. OSError, ConnectionError: of `datasets`.
    """
    benchmark = BENCHMARKS[name]
    rows = _rows_of_files(benchmark) if benchmark.files else read_split(benchmark.source)
    try:
        conversations = [
            benchmark.turns(row) for row in islice(rows, min(limit or benchmark.prompts, benchmark.prompts))
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"The rows of {benchmark.source!r} are not those of {name} as they are known here ({error!r}). Give the "
            "prompts as a file of `turns` with --data."
        ) from error
    if not conversations:
        raise ValueError(f"{benchmark.source!r} holds no prompts.")
    return DataSet(name, benchmark.source, conversations)


def _rows_of_files(benchmark: Benchmark) -> Iterable[Row]:
    from datasets import load_dataset

    root = benchmark.source if Path(benchmark.source).is_dir() else f"hf://datasets/{benchmark.source}"
    files = [f"{root}/{file}" for file in benchmark.files]
    return load_dataset("json", data_files={"test": files}, split="test", streaming=True)


def paper_of(target: str) -> dict[str, dict[str, float]]:
    """Accepted lengths of the paper for a target, by drafter and benchmark; empty where it has none.

    Args:
        target: a Hub id, or a folder that is called like the model.
    """
    name = target.rstrip("/").rpartition("/")[2]
    for known, rows in PAPER.items():
        if target == known or (Path(target).is_dir() and name == known.rpartition("/")[2]):
            return {drafter: dict(zip(BENCHMARKS, row, strict=True)) for drafter, row in rows.items()}
    return {}
