"""Prompts to measure with: files of one prompt a line, and a few that ship with the package."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

DEFAULT_PROMPTS = (
    "A baker makes 12 trays of 8 rolls each morning. She sells 75 rolls. How many rolls are left?",
    "Tom has 5 boxes with 24 pencils each. He gives 3 pencils to each of his 20 classmates. How many pencils remain?",
    "A train travels 60 miles an hour for 3 hours and then 40 miles an hour for 2 hours. How far does it travel?",
    "Maria saves $15 every week. She wants a bicycle that costs $180. After 8 weeks, how much does she still need?",
    "A farmer has 36 cows and twice as many chickens. Each chicken lays 5 eggs a week. How many eggs are laid a week?",
    "Sam reads 20 pages a day on weekdays and 35 pages a day on weekends. How many pages does he read in 4 weeks?",
    "A shirt costs $25 and trousers cost $40. Ana buys 3 shirts and 2 trousers. How much does she pay?",
    "There are 48 students in a school. One third of them walk, and the others take 2 buses. How many are in each bus?",
)


# Sets of prompts that ship with the package: problems of GSM8K's test split, and beginnings of Python source that the
# embedded pair was not trained on.
DOMAINS = ("gsm8k", "code")


def domain_prompts(domain: str) -> list[str]:
    """The 64 prompts of a set that ships with the package."""
    return read_prompts(Path(__file__).parent / "data" / f"{domain}.jsonl")


def read_prompts(path: str | Path | None) -> list[str]:
    """Prompts from a file, or the built-in ones.

    Args:
        path: a `.txt` file with a prompt a line, or a `.jsonl` file whose rows have `turns` (the first is used),
            `prompt` or `question`.

    Raises:
        ValueError: when the file is empty or a row has none of those keys. OSError: for no file.
    """
    if path is None:
        return list(DEFAULT_PROMPTS)
    if Path(path).suffix in (".jsonl", ".json"):
        prompts = [turns[0] for turns in read_conversations(path)]
    else:
        prompts = [line for _, line in _lines(path)]
    if not prompts:
        raise ValueError(f"{str(path)!r} holds no prompts.")
    return prompts


def read_conversations(path: str | Path) -> list[list[str]]:
    """What the user says, turn by turn, in every row of a JSON-lines file; see [`turns_of`].

    Raises:
        ValueError: for a line that is no such row, which it names. OSError: for no file.
    """
    conversations = []
    for number, line in _lines(path):
        where = f"Line {number} of {str(path)!r}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON ({error}).") from error
        conversations.append(turns_of(row, where))
    return conversations


def _lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8 ({error}).") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def turns_of(row: Any, where: str) -> list[str]:
    """What the user says in a row of data, turn by turn: its `turns`, or its `prompt` or `question` alone.

    Raises:
        ValueError: when it has none of those keys, or something else than text in them; `where` names the row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object with `turns`, `prompt` or `question`.")
    key = next((key for key in ("turns", "prompt", "question") if row.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{where} has the keys {sorted(row)}; expected `turns`, `prompt` or `question`.")
    turns = [row[key]] if isinstance(row[key], str) else row[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"{where} should hold text, or a list of texts in `turns`; it holds {str(row[key])[:80]!r}.")
    return turns


def as_model_input(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt inside the tokenizer's chat template, or as it is where there is none."""
    return chat_as_model_input([{"role": "user", "content": prompt}], tokenizer)


def chat_as_model_input(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, thinking: bool | None = None
) -> str:
    """A chat that the model is to answer, inside the tokenizer's chat template.

    Args:
        thinking: passed to templates that know it as `enable_thinking`; `None` leaves it to them.

    Raises:
        ValueError: for more than one message and a tokenizer without a chat template.
    """
    if tokenizer.chat_template is None:
        if len(messages) > 1:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, so a chat of {len(messages)} "
                "messages cannot be written for this model. Give prompts of one turn."
            )
        return messages[0]["content"]
    options = {} if thinking is None else {"enable_thinking": thinking}
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def sampling(temperature: float) -> dict:
    """Arguments of `generate` for a temperature; 0 is greedy. A model's own top-k and top-p stay out of it."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def encode(prompts: list[str], tokenizer: PreTrainedTokenizerBase, device):
    """Left-padded `input_ids` and `attention_mask` of the prompts, ready for `generate`."""
    return tokenize([as_model_input(prompt, tokenizer) for prompt in prompts], tokenizer, device)


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, device):
    """`encode` for texts that are model inputs already."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    templated = tokenizer.chat_template is not None
    return tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not templated
    ).to(device)
