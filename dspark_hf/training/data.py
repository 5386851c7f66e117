"""Training text: chats, prompts with responses or token ids, from a file or the Hub, as supervised token rows."""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..evaluation.data_sets import read_split

logger = logging.get_logger(__name__)

LAYOUTS = (
    "`messages` (a chat; assistant turns are supervised), `prompt` and `response`, or `input_ids` with `loss_mask`"
)
NAMED_ROWS = 5  # bad rows that a warning lists
# What rows of the wrong types and templates that refuse a chat raise.
BAD_ROW = (ValueError, TypeError, KeyError, IndexError, AttributeError, TemplateError)
# Stands for an answer, to see where the template puts it.
PLACEHOLDER = "[[what the assistant wrote]]"
# Where a template marks what the assistant writes; see transformers, `return_assistant_tokens_mask`.
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Row = dict[str, list[int]]
T = TypeVar("T")


def load_rows(source: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Rows `{"input_ids": [...], "loss_mask": [...]}` of at most `max_length` tokens. Rows that cannot be used are left
    out with one warning that names the first of them by number, counted from 1.

    Args:
        source: a `.json`, `.jsonl` or `.parquet` file, or a Hub data set as `USER/NAME`, `USER/NAME:SPLIT` or
            `USER/NAME:CONFIG:SPLIT` (its `train` split where none is named).

    Raises:
        ValueError: when the columns are none of the known layouts, or no row can be used.
    """
    data, columns = read_data(source)
    encode = _encoder(columns, source)
    return usable(data, lambda row: _checked(encode(row, tokenizer), max_length), source, "supervised")


def usable(data: Iterable[Any], convert: Callable[[Any], T], source: str, use: str) -> list[T]:
    """What `convert` makes of the rows of a source; those that it raises for are left out with one warning.

    Args:
        use: what is done with rows, for the error.

    Raises:
        ValueError: when none is left.
    """
    good, bad = [], []
    for number, content in enumerate(data, start=1):
        try:
            good.append(convert(content))
        except BAD_ROW as error:
            bad.append(f"row {number}: {_reason(error)}")
    listed = "; ".join(bad[:NAMED_ROWS]) + ("; ..." if len(bad) > NAMED_ROWS else "")
    if not good:
        raise ValueError(f"No row of {source!r} can be {use} ({listed or 'it is empty'}).")
    if bad:
        logger.warning(f"{len(bad)} of {len(bad) + len(good)} rows of {source!r} are left out: {listed}")
    return good


def read_data(source: str) -> tuple[Iterable[Any], set[str]]:
    """The rows of a source, and its columns. JSON is read row by row, so that one bad row spoils no other."""
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        data = _read_json(path)
        return data, {key for row in data if isinstance(row, dict) for key in row}
    if path.suffix == ".parquet":
        from datasets import load_dataset

        data = load_dataset("parquet", data_files=str(path), split="train")
    else:
        data = read_split(source, "train")
    return data, set(data.column_names)


def _read_json(path: Path) -> list[Any]:
    """Rows of a file with a list, or with an object a line; a line that is no JSON is kept as it is, as text."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [_parsed(line) for line in text.splitlines() if line.strip()]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _encoder(columns: set[str], source: str) -> Callable[[Any, PreTrainedTokenizerBase], Row]:
    if {"input_ids", "loss_mask"} <= columns:
        return lambda row, _: {"input_ids": list(row["input_ids"]), "loss_mask": list(row["loss_mask"])}
    if "messages" in columns:
        return lambda row, tokenizer: encode_chat(row["messages"], tokenizer)
    if {"prompt", "response"} <= columns:
        return lambda row, tokenizer: encode_chat(
            [
                {"role": "user", "content": _text(row, "prompt")},
                {"role": "assistant", "content": _text(row, "response")},
            ],
            tokenizer,
        )
    raise ValueError(f"{source!r} has the columns {sorted(columns)}; expected {LAYOUTS}.")


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"`{key}` is {row[key]!r:.40}, not text")
    return row[key]


def _checked(row: Row, max_length: int) -> Row:
    ids, mask = row["input_ids"], row["loss_mask"]
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids)} `input_ids` with a `loss_mask` of {len(mask)}")
    if not all(type(value) is int for value in (*ids, *mask)):
        raise ValueError("`input_ids` and `loss_mask` must be whole numbers")
    # A block needs an anchor and at least one label.
    if sum(mask[:max_length]) < 2:
        raise ValueError(f"fewer than two supervised tokens within {max_length} tokens (--max-length)")
    return {"input_ids": ids[:max_length], "loss_mask": mask[:max_length]}


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error}"
    return str(error) if isinstance(error, ValueError | TemplateError) else f"{type(error).__name__}: {error}"


def encode_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Row:
    """Tokens of a chat and 1 for every token that the assistant wrote, up to the special token that ends its turn.

    Templates may write earlier answers otherwise than the last one (Qwen3 leaves out what was thought), so each answer
    is looked for in the text of the whole chat: it is what differs when the template is given another answer.

    Raises:
        ValueError: for messages that are none, and for an answer that cannot be found.
        jinja2.TemplateError: when the template refuses the chat.
    """
    check_messages(messages)
    template = tokenizer.get_chat_template()
    if tokenizer.is_fast and GENERATION_BLOCK.search(template):
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": list(encoded["input_ids"]), "loss_mask": [int(on) for on in encoded["assistant_masks"]]}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        # Many templates want the user to begin: what the assistant greets with is then not part of the chat.
        greeting = next((i for i, message in enumerate(messages) if message["role"] != "assistant"), 0)
        if not greeting:
            raise
        return encode_chat(messages[greeting:], tokenizer)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_answer(messages, turn, text, tokenizer) for turn in turns]
    ids, places = _tokenize(text, tokenizer)
    mask, special = [0] * len(ids), set(tokenizer.all_special_ids) | _special_added(tokenizer)
    for start, end in filter(None, spans):
        inside = [i for i, (first, last) in enumerate(places) if first < end and last > start and last > first]
        for i in inside:
            mask[i] = 1
        behind = inside[-1] + 1 if inside else len(ids)
        if behind < len(ids) and ids[behind] in special:
            mask[behind] = 1
    return {"input_ids": ids, "loss_mask": mask}


def check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError(f"`messages` is {messages!r:.40}, not a list of messages with a `role`")
    for number, message in enumerate(messages, start=1):
        # Beside calls of tools there may be no text.
        if message.get("content") is None and set(message) <= {"role", "content"}:
            raise ValueError(f"the `content` of message {number} is missing")


def _answer(
    messages: list[dict[str, Any]], turn: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int] | None:
    """Where in the text of the chat the answer of a turn is, `None` where the template leaves it out."""
    in_parts = isinstance(messages[turn].get("content"), list)
    placed = [{"type": "text", "text": PLACEHOLDER}] if in_parts else PLACEHOLDER
    other = [*messages[:turn], {"role": "assistant", "content": placed}, *messages[turn + 1 :]]
    rendered = tokenizer.apply_chat_template(other, tokenize=False)
    before, found, behind = rendered.partition(PLACEHOLDER)
    if not found:
        return None
    start = len(os.path.commonprefix([text, before]))
    end = len(text) - len(os.path.commonprefix([text[::-1], behind[::-1]]))
    if PLACEHOLDER in behind or start > end:
        raise ValueError(f"the template hides where message {turn + 1} is in the chat")
    return start, end


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and where in the text each token begins and ends."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    return ids, list(zip([0, *ends], ends, strict=False))


def _special_added(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens such as Gemma's `<end_of_turn>`, which have no role of their own in a tokenizer."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def prompt_of(row: Row) -> list[int]:
    """The tokens before the first supervised one; of a row that begins with it, that one."""
    return row["input_ids"][: max(1, row["loss_mask"].index(1))]


def left_padded(prompts: Sequence[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [b, T] of prompts, as `generate` takes them."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def collate(rows: Iterable[Row]) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids` and `loss_mask`, [b, T] int64, and `positions` if the rows are packed; padding is not
    supervised and not attended to, since it lies behind every supervised token. Among packed rows it is a document."""
    rows = list(rows)
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(row: Row, key: str) -> list[int]:
        missing = longest - len(row[key])
        return row[key] + (list(range(missing)) if key == "positions" else [0] * missing)

    keys = [key for key in ("input_ids", "loss_mask", "positions") if key in rows[0]]
    return {key: torch.tensor([padded(row, key) for row in rows]) for key in keys}
