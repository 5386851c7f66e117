"""What a run shows of itself: a progress bar or lines, `log.jsonl`, accelerate's trackers, and a plot at the end."""

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..evaluation.plots import import_pyplot, save

PROJECT = "dspark-hf"
# Seconds from one line to the next where no terminal shows a bar.
LINES_EVERY = 10.0
# Lines of the curve that a model card shows, at most.
CURVE_LINES = 8


def check_trackers(names: list[str]) -> list[str]:
    """The names, which accelerate's `log_with` takes; without `none`.

    Raises:
        ValueError: for one that accelerate does not know, or whose library is not installed.
    """
    names = [name for name in names if name != "none"]
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"--report-to {name}: accelerate has no such tracker, but {known}.")
        if name not in installed:
            raise ValueError(f"--report-to {name} needs its library: pip install {name}.")
    return names


class Report:
    """Shows the steps of a run, in the main process only.

    Args:
        done: steps that were done before; later lines of the log, of a run that was killed, are dropped.
    """

    def __init__(self, accelerator: Accelerator, output: Path, steps: int, done: int, settings: dict[str, Any]):
        self.accelerator, self.log, self.steps = accelerator, output / "log.jsonl", steps
        self.tokens, self.since = 0, time.monotonic()
        self.told = self.since
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        self.bar.disable = not (accelerator.is_main_process and self.bar.console.is_terminal)
        self.lines = accelerator.is_main_process and self.bar.disable
        self.task = self.bar.add_task("training", total=steps, completed=done, values="")
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_log(output) if line["step"] <= done]
            temporary = self.log.with_name(f".{self.log.name}")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self.log)
        if accelerator.log_with:
            flat = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
            accelerator.init_trackers(PROJECT, config=flat)

    def __enter__(self) -> "Report":
        self.bar.start()
        self._tell(f"{self.steps} steps")
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()
        # Not `end_training`, which ends the process group too.
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def count(self, tokens: int) -> None:
        """A step with so many tokens, of all processes, is done."""
        self.tokens += tokens
        self.bar.advance(self.task)

    def write(self, step: int, values: dict[str, float]) -> None:
        """A line of the log, with the speed since the last one."""
        if not self.accelerator.is_main_process:
            return
        now = time.monotonic()
        values = {name: round(value, 6) for name, value in values.items()}
        values["tokens_per_second"] = round(self.tokens / max(now - self.since, 1e-9), 1)
        self.tokens, self.since = 0, now
        with self.log.open("a") as log:
            log.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)
        shown = {name: value for name, value in values.items() if name != "learning_rate"}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.bar.update(self.task, values=text)
        if now - self.told >= LINES_EVERY or "tau" in values:
            self.told = now
            left = self.bar.tasks[0].time_remaining
            self._tell(f"step {step} of {self.steps}  {text}" + ("" if left is None else f"  {left:.0f} s left"))

    def _tell(self, text: str) -> None:
        if self.lines:
            self.bar.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def restart_clock(self) -> None:
        """What was done since the last line is no training: an evaluation, a checkpoint."""
        self.tokens, self.since = 0, time.monotonic()


def read_log(output: Path) -> list[dict[str, float]]:
    """The lines of the log, without one that a kill cut short."""
    path, lines = output / "log.jsonl", []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def curve(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """A few lines of a log for a model card: of the evaluations if there were any, first, last and best among them."""
    lines = [line for line in lines if "tau" in line] or lines
    if len(lines) <= CURVE_LINES:
        return lines
    chosen = {round(i * (len(lines) - 1) / (CURVE_LINES - 1)) for i in range(CURVE_LINES)}
    if "tau" in lines[0]:
        chosen.add(max(range(len(lines)), key=lambda i: lines[i]["tau"]))
    return [lines[i] for i in sorted(chosen)]


def plot(output: Path) -> Path | None:
    """The losses of a log by step, and tau beside them, as `training.png`; `None` without matplotlib."""
    lines = read_log(output)
    if find_spec("matplotlib") is None or not lines:
        return None
    evaluated = [line for line in lines if "tau" in line]
    figure, panels = import_pyplot().subplots(
        1, 2 if evaluated else 1, figsize=(10 if evaluated else 5, 4), squeeze=False
    )
    for name in ("total", "ce", "l1", "confidence"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            panels[0, 0].plot(*zip(*points, strict=True), label=name)
    panels[0, 0].set(xlabel="step", ylabel="loss")
    panels[0, 0].legend()
    if evaluated:
        panels[0, 1].plot([line["step"] for line in evaluated], [line["tau"] for line in evaluated], marker=".")
        panels[0, 1].set(xlabel="step", ylabel="tau on held-out rows")
    path = output / "training.png"
    save(figure, path)
    return path
