"""Long runs: shared among processes, and noted line by line, so that a killed one goes on where it was."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# Processes wait so long for the slowest of them.
PATIENCE = timedelta(days=7)


class Processes:
    """The processes of this run: one, or as many as accelerate's launcher (or torchrun) has started."""

    def __init__(self):
        self.index, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState

            self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
            self.index, self.count = self.state.process_index, self.state.num_processes

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            self.state.wait_for_everyone()

    def gather(self, items: list) -> list:
        """Those of all processes."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def close(self) -> None:
        if self.count > 1:
            self.state.destroy_process_group()


def append_lines(path: Path, lines: Iterable[Any]) -> None:
    """Add values to a file as JSON lines, at once. A line that a kill has cut short stays one of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Where each line of a file begins, in bytes, and its value; lines that a kill has cut short are left out."""
    with path.open("rb") as file:
        place = 0
        for line in file:
            with suppress(ValueError):
                yield place, json.loads(line)
            place += len(line)


def differences(theirs: dict, ours: dict) -> list[str]:
    """What differs between the settings of another run and those of this one, in words, by key."""
    keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    return [f"{key} {theirs.get(key)}, now {ours.get(key)}" for key in keys]


def check_same_run(path: Path, found: dict, run: dict) -> None:
    """Raise a ValueError that names what differs when a file was made by another run."""
    if found != run:
        changed = [key for key in sorted(run | found) if run.get(key) != found.get(key)]
        raise ValueError(
            f"{str(path)!r} is of another run: {', '.join(changed)} differ. Write somewhere else, or delete the file "
            "to start anew."
        )
