"""Training text: chats, prompts with responses or token ids, from a file or the Hub, as supervised token rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

LAYOUTS = (
    "`messages` (a chat; assistant turns are supervised), `prompt` and `response`, or `input_ids` with `loss_mask`"
)


def load_rows(source: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, list[int]]]:
    """Rows `{"input_ids": [...], "loss_mask": [...]}` of at most `max_length` tokens.

    Args:
        source: a `.json`, `.jsonl` or `.parquet` file, or the id of a Hub data set (its `train` split).

    Raises:
        ValueError: when the columns are none of the known layouts, or nothing in the data is supervised.
    """
    from datasets import load_dataset

    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        data = load_dataset("json", data_files=str(path), split="train")
    elif path.suffix == ".parquet":
        data = load_dataset("parquet", data_files=str(path), split="train")
    else:
        data = load_dataset(source, split="train")
    encode = _encoder(set(data.column_names), source)
    rows = [{key: value[:max_length] for key, value in encode(row, tokenizer).items()} for row in data]
    # A block needs an anchor and at least one label.
    rows = [row for row in rows if sum(row["loss_mask"]) > 1]
    if not rows:
        raise ValueError(
            f"Nothing in {source!r} is supervised: no row has two response tokens within {max_length} tokens. "
            "Raise --max-length, or check the data."
        )
    return rows


def _encoder(columns: set[str], source: str):
    if {"input_ids", "loss_mask"} <= columns:
        return lambda row, _: {"input_ids": row["input_ids"], "loss_mask": row["loss_mask"]}
    if "messages" in columns:
        return lambda row, tokenizer: encode_chat(row["messages"], tokenizer)
    if {"prompt", "response"} <= columns:
        return lambda row, tokenizer: encode_chat(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}], tokenizer
        )
    raise ValueError(f"{source!r} has the columns {sorted(columns)}; expected {LAYOUTS}.")


def encode_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokens of a chat and 1 for every token that the assistant wrote."""

    def tokens(count: int, answer_follows: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=answer_follows)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    input_ids = tokens(len(messages), False)
    loss_mask = [0] * len(input_ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = len(tokens(turn, True)), len(tokens(turn + 1, False))
        loss_mask[start:end] = [1] * (end - start)
    return {"input_ids": input_ids, "loss_mask": loss_mask[: len(input_ids)]}


def collate(rows: Iterable[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids` and `loss_mask`, [b, T] int64; padding is not supervised and not attended to, since
    it lies behind every supervised token."""
    rows = list(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in rows])
        for key in ("input_ids", "loss_mask")
    }
