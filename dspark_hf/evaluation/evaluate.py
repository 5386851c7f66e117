"""Evaluates a head on data sets: decodes their conversations with whole blocks and records every round."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_dspark import DSparkHead
from .acceptance import EvalRecord, record_of
from .bench import schedule_of, until_eos
from .data_sets import DataSet
from .prompts import chat_as_model_input, sampling, tokenize
from .runs import append_lines, check_same_run, read_lines


@dataclass(frozen=True)
class EvalSettings:
    """max_new_tokens: of every turn. temperature: 0 is greedy. first_turn: answer only the first turn of each
    conversation. thinking: what chat templates that know `enable_thinking` are told."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 8
    first_turn: bool = False
    thinking: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Prompts of a data set that are decoded together; `number` counts the batches of all data sets."""

    number: int
    data: DataSet
    prompts: range

    def missing_from(self, records: list[EvalRecord]) -> bool:
        return not {(self.data.name, i) for i in self.prompts} <= {(r.data, r.prompt) for r in records}


def batches_of(data_sets: list[DataSet], size: int) -> list[Batch]:
    """All batches of a run. They do not depend on what is done already or on who does it, so that a continued run
    decodes and samples what an uninterrupted one would have."""
    ranges = [
        (data, range(start, min(start + size, len(data.conversations))))
        for data in data_sets
        for start in range(0, len(data.conversations), size)
    ]
    return [Batch(number, *rest) for number, rest in enumerate(ranges)]


def decode(
    model: PreTrainedModel, head: DSparkHead, tokenizer: PreTrainedTokenizerBase, batch: Batch, settings: EvalSettings
) -> list[EvalRecord]:
    """Records of a batch. Whole blocks are drafted and verified, whatever they cost. Each turn is answered, and the
    answer is part of the chat that the next turn continues."""
    torch.manual_seed(settings.seed + batch.number)
    conversations = [batch.data.conversations[i] for i in batch.prompts]
    turns = [turns[:1] if settings.first_turn else turns for turns in conversations]
    chats: list[list[dict]] = [[] for _ in turns]
    records: list[list[EvalRecord]] = [[] for _ in turns]
    for turn in range(max(map(len, turns))):
        rows = [row for row, texts in enumerate(turns) if len(texts) > turn]
        for row in rows:
            chats[row].append({"role": "user", "content": turns[row][turn]})
        answers, stats = _answer(model, head, tokenizer, [chats[row] for row in rows], settings)
        for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            content = tokenizer.decode(answer, skip_special_tokens=True)
            chats[row].append({"role": "assistant", "content": content})
            of = (batch.data.name, batch.prompts[row], len(answer), stats, place, settings.max_new_tokens)
            records[row].append(record_of(*of, head.confidence_head is not None))
    return [reduce(add, of_row) for of_row in records]


def _answer(model, head, tokenizer, chats: list[list[dict]], settings: EvalSettings):
    """New tokens of every chat's answer, and the statistics of the generation."""
    texts = [chat_as_model_input(chat, tokenizer, settings.thinking) for chat in chats]
    inputs = tokenize(texts, tokenizer, model.device)
    limit = settings.max_new_tokens
    with schedule_of(head, "whole"):
        output = model.generate(
            **inputs,
            **sampling(settings.temperature),
            # Room for the last round to be a whole one: a block, and the target's own token.
            max_new_tokens=limit + head.config.block_size + 1,
            assistant_model=head,
            return_dict_in_generate=True,
        )
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [until_eos(row, model.generation_config.eos_token_id)[:limit] for row in new], output.dspark


class Log:
    """The records of a run as JSON lines beside its results, a file for every process, so that a killed run goes on
    where it was. The first line of a file says what run it belongs to."""

    def __init__(self, results: Path, run: dict, process: int = 0):
        self.run = run
        self.path = results.with_name(f"{results.stem}.prompts-{process}.jsonl")
        self.pattern = f"{results.stem}.prompts-*.jsonl"

    def read(self) -> list[EvalRecord]:
        """Records of all processes of the run so far; a line that was cut short by a kill is left out.

        Raises:
            ValueError: when they belong to another run.
        """
        records = {}
        for path in sorted(self.path.parent.glob(self.pattern)):
            for place, line in read_lines(path):
                if place == 0:
                    check_same_run(path, line, self.run)
                else:
                    records[line["data"], line["prompt"]] = EvalRecord(**line)
        return list(records.values())

    def append(self, records: list[EvalRecord]) -> None:
        """Add what one batch gave, at once."""
        is_new = not self.path.exists() or not self.path.stat().st_size
        append_lines(self.path, [self.run] * is_new + [asdict(record) for record in records])


def evaluate(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    data_sets: list[DataSet],
    settings: EvalSettings,
    done: list[EvalRecord] = (),
    process: int = 0,
    processes: int = 1,
) -> Iterator[list[EvalRecord]]:
    """Records of the batches of this process, as soon as each is decoded; batches whose prompts are `done` are left
    out."""
    missing = [batch for batch in batches_of(data_sets, settings.batch_size) if batch.missing_from(done)]
    for batch in missing[process::processes]:
        yield decode(model, head, tokenizer, batch, settings)
