"""Data sets to evaluate on: files in the layout of DeepSpec's benchmarks, and data sets of the Hub."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .prompts import DOMAINS, read_conversations, turns_of

SHIPPED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class DataSet:
    """name: what it is called in tables. source: what was asked for. conversations: what the user says, turn by turn,
    in each."""

    name: str
    source: str
    conversations: list[list[str]]

    @property
    def identity(self) -> dict:
        """What tells this data set from others, whatever its file is called."""
        text = json.dumps(self.conversations)
        return {
            "name": self.name,
            "prompts": len(self.conversations),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }


def load_data_sets(sources: list[str], limit: int | None = None) -> list[DataSet]:
    """Data sets by [`load_data_set`], with names that differ."""
    found = [load_data_set(source, limit) for source in sources]
    check_names(found)
    return found


def check_names(data_sets: list[DataSet]) -> None:
    """Raise a ValueError when two have one name, as results are kept by name."""
    names = [data.name for data in data_sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        sources = ", ".join(data.source for data in data_sets)
        raise ValueError(f"Several data sets are called {', '.join(twice)}: {sources}. Rename a file.")


def load_data_set(source: str, limit: int | None = None) -> DataSet:
    """The first `limit` conversations of a data set.

    Args:
        source: a `.jsonl` file whose rows have `turns` (or `prompt` or `question`); `gsm8k` or `code`, which ship with
            the package; or a Hub data set with such columns as `USER/NAME`, `USER/NAME:SPLIT` or
            `USER/NAME:CONFIG:SPLIT` (the split is `test` where there is one).

    Raises:
        ValueError: when it cannot be found, is empty, or its rows have other keys.
    """
    path = SHIPPED / f"{source}.jsonl" if source in DOMAINS else Path(source)
    if path.is_file():
        conversations, name = read_conversations(path), path.stem
    elif path.suffix in (".jsonl", ".json", ".txt"):
        raise ValueError(f"There is no file {source!r}.")
    elif "/" in source:
        rows, name = islice(read_split(source), limit), source.partition(":")[0].rstrip("/").rpartition("/")[2]
        conversations = [turns_of(row, f"Row {number} of {source!r}") for number, row in enumerate(rows, 1)]
    else:
        raise ValueError(
            f"{source!r} is no data set: expected a .jsonl file, {' or '.join(DOMAINS)}, or a Hub id as USER/NAME."
        )
    if not conversations:
        raise ValueError(f"{source!r} holds no prompts.")
    return DataSet(name, source, conversations[:limit])


def read_split(source: str, default: str = "test") -> Iterable[dict]:
    """The rows of a Hub data set, or of a folder laid out like one, and its columns as `column_names`.

    Args:
        source: `USER/NAME`, `USER/NAME:SPLIT` or `USER/NAME:CONFIG:SPLIT`. default: the split where none is named and
            there are several, or where it is there.

    Raises:
        ValueError: for a split that there is not. ImportError: without `datasets`.
    """
    from datasets import load_dataset

    repository, *config, split = source.split(":") if ":" in source else (source, None)
    data = load_dataset(repository, *config)
    if split is None:
        split = default if default in data or len(data) > 1 else next(iter(data))
    if split not in data:
        raise ValueError(
            f"{repository!r} has no split {split!r}, only {', '.join(data)}: take {repository}:{[*data][0]}."
        )
    return data[split]
