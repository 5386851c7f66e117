"""Tau on rows that are not trained on: their prompts are answered greedily by the engine, with whole blocks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..evaluation.acceptance import record_of
from ..evaluation.bench import schedule_of
from ..generation import observers
from ..modeling_dspark import DSparkHead
from .data import Row, left_padded, prompt_of

# Prompts that are answered at once.
BATCH_SIZE = 8


def split(rows: list[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and `count` held out, at random but for the seed.

    Raises:
        ValueError: where too few are left.
    """
    if count >= len(rows):
        raise ValueError(
            f"{count} of {len(rows)} rows cannot be held out: none is left to train on. Lower --eval-prompts, or give "
            "--eval-data."
        )
    chosen = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    return (
        [row for number, row in enumerate(rows) if number not in chosen],
        [rows[number] for number in sorted(chosen)],
    )


def measure_tau(
    target: PreTrainedModel, head: DSparkHead, rows: list[Row], max_new_tokens: int, accelerator: Accelerator
) -> float:
    """Tokens a round, bonus included, over all rounds of all rows; the processes share the rows.

    Rounds are counted as in `evaluation.acceptance`. 1, as plain decoding has it, where there was no round.
    """
    prompts = [prompt_of(row) for row in rows[accelerator.process_index :: accelerator.num_processes]]
    prompts.sort(key=len)
    accepted = chain.from_iterable(
        _accepted(target, head, prompts[i : i + BATCH_SIZE], max_new_tokens) for i in range(0, len(prompts), BATCH_SIZE)
    )
    rounds = list(accepted)
    # float64 is exact for counts.
    counts = torch.tensor([sum(rounds), len(rounds)], dtype=torch.float64, device=accelerator.device)
    tokens, count = accelerator.reduce(counts).tolist()
    return tokens / count if count else 1.0


def _accepted(target: PreTrainedModel, head: DSparkHead, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """Tokens committed in every round of every prompt."""
    with schedule_of(head, "whole"), _without_advice():
        stats = target.generate(
            **left_padded(prompts, target.device),
            assistant_model=head,
            do_sample=False,
            # Room for the last round to be a whole one.
            max_new_tokens=max_new_tokens + head.config.block_size + 1,
            return_dict_in_generate=True,
        ).dspark
    records = [record_of("", row, 0, stats, row, max_new_tokens, False) for row in range(len(prompts))]
    return [tokens for record in records for tokens in record.accepted]


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without the warning that a head hardly helps: one that begins to learn does not."""
    level = observers.logger.level
    observers.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        observers.logger.setLevel(level)
