"""Calibrates a head's confidence: what it said of its drafts against what the target made of them."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_dspark import DSparkHead
from .bench import schedule_of
from .calibration import auc, brier_score, calibration_error, fit, survival_at
from .plots import draw_reliability, import_pyplot, save
from .prompts import encode, sampling

# Of this many prompts one is held out for the report.
HELD_OUT_EVERY = 2
FEWEST_BLOCKS = 100


@dataclass(frozen=True)
class DraftedBlocks:
    """Drafted blocks: confidence logits [N, G], and whether all drafts up to a position were accepted [N, G]."""

    logits: np.ndarray
    survived: np.ndarray


@dataclass(frozen=True)
class PositionCalibration:
    """A position of the block on held-out prompts, before and after: calibration error, AUC and Brier score of its
    survival; `rate` is how often it survived."""

    position: int
    rate: float
    temperature: float
    shift: float
    ece_before: float
    ece_after: float
    auc_before: float
    auc_after: float
    brier_before: float
    brier_after: float


@dataclass(frozen=True)
class Calibration:
    """temperatures, shifts: [G], fitted on `fitted_on` blocks; positions: the report on `held_out`."""

    temperatures: list[float]
    shifts: list[float]
    fitted_on: int
    held_out: DraftedBlocks
    positions: list[PositionCalibration]


def collect(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
) -> Iterator[DraftedBlocks]:
    """Draft and verify whole blocks, a batch of prompts at a time.

    Raises:
        ValueError: for a head without a confidence head.
    """
    if head.confidence_head is None:
        raise ValueError("This head has no confidence head: there is nothing to calibrate.")
    names = ("confidence_temperatures", "confidence_shifts")
    before = {name: getattr(head.config, name) for name in names}
    try:
        head.config.update(dict.fromkeys(names))
        for start in range(0, len(prompts), batch_size):
            inputs = encode(prompts[start : start + batch_size], tokenizer, model.device)
            with schedule_of(head, f"fixed-{head.config.gamma}"):
                output = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    **sampling(temperature),
                    assistant_model=head,
                    return_dict_in_generate=True,
                )
            yield _blocks(output.dspark)
    finally:
        head.config.update(before)


def _blocks(stats) -> DraftedBlocks:
    """The whole blocks of a generation; the round in which a row ends may have been cut, and is left out."""
    confidence, kept = [], []
    for row in range(len(stats.committed_lengths)):
        rounds = zip(stats.confidence[row], stats.accepted_lengths[row], strict=True)
        whole = [(c, k) for c, k in list(rounds)[:-1] if len(c) == stats.gamma]
        confidence += [c for c, _ in whole]
        kept += [k for _, k in whole]
    c = np.array(confidence).reshape(-1, stats.gamma).clip(1e-9, 1 - 1e-9)
    survived = np.array(kept)[:, None] > np.arange(stats.gamma)
    return DraftedBlocks(np.log(c / (1 - c)), survived.reshape(-1, stats.gamma))


def calibrate(
    model: PreTrainedModel,
    head: DSparkHead,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int = 16,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    report: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Fit temperatures and shifts on half of the prompts and report on the other half, at a temperature of decoding
    (0 is greedy). `report` is told how many prompts are done.

    Raises:
        ValueError: for a head without a confidence head, or too few blocks to say anything.
    """
    sets = [prompts[i::HELD_OUT_EVERY] for i in range(HELD_OUT_EVERY)]
    done, parts = 0, []
    for part in (sum(sets[1:], []), sets[0]):
        pieces = []
        for piece in collect(model, head, tokenizer, part, batch_size, max_new_tokens, temperature):
            pieces.append(piece)
            done = min(done + batch_size, len(prompts))
            report(f"drafted for {done} of {len(prompts)} prompts")
        parts.append(
            DraftedBlocks(
                *(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("logits", "survived"))
            )
            if pieces
            else DraftedBlocks(np.empty((0, 1)), np.empty((0, 1)))
        )
    fitting, held_out = parts
    if min(len(fitting.logits), len(held_out.logits)) < FEWEST_BLOCKS:
        raise ValueError(
            f"{len(prompts)} prompts gave {len(fitting.logits)} blocks to fit and {len(held_out.logits)} to report on; "
            f"at least {FEWEST_BLOCKS} of each are needed. Give more prompts or more --max-new-tokens."
        )
    temperatures, shifts = fit(fitting.logits, fitting.survived)
    positions = _positions(held_out, temperatures, shifts)
    return Calibration(temperatures.tolist(), shifts.tolist(), len(fitting.logits), held_out, positions)


def _positions(blocks: DraftedBlocks, temperatures: np.ndarray, shifts: np.ndarray) -> list[PositionCalibration]:
    before = survival_at(blocks.logits, np.ones_like(temperatures), np.zeros_like(shifts))
    after = survival_at(blocks.logits, temperatures, shifts)
    positions = []
    for k, (b, a, y) in enumerate(zip(before.T, after.T, blocks.survived.T, strict=True)):
        scores = [measure(x, y) for measure in (calibration_error, auc, brier_score) for x in (b, a)]
        positions.append(PositionCalibration(k + 1, float(y.mean()), float(temperatures[k]), float(shifts[k]), *scores))
    return positions


def as_table(calibration: Calibration) -> Table:
    """The report as people read it."""
    table = Table(
        title="survival on held-out prompts, before -> after",
        caption=f"fitted on {calibration.fitted_on} blocks, reported on {len(calibration.held_out.logits)}",
        box=box.SIMPLE_HEAD,
    )
    for column in ("position", "survives", "temperature", "shift", "ECE", "AUC", "Brier"):
        table.add_column(column, justify="right")
    for p in calibration.positions:
        table.add_row(
            str(p.position),
            f"{p.rate:.1%}",
            f"{p.temperature:.2f}",
            f"{p.shift:+.2f}",
            f"{p.ece_before:.2%} -> {p.ece_after:.2%}",
            f"{p.auc_before:.3f} -> {p.auc_after:.3f}",
            f"{p.brier_before:.3f} -> {p.brier_after:.3f}",
        )
    return table


def as_json(calibration: Calibration) -> dict:
    """The report as machines read it."""
    return {
        "temperatures": calibration.temperatures,
        "shifts": calibration.shifts,
        "fitted_on": calibration.fitted_on,
        "held_out": len(calibration.held_out.logits),
        "positions": [asdict(position) for position in calibration.positions],
    }


def plot(calibration: Calibration, path: Path) -> None:
    """Reliability diagram: how often drafts survived against the survival they were given, a panel a position."""
    blocks, size = calibration.held_out, len(calibration.temperatures)
    as_given, fitted = (
        (np.ones(size), np.zeros(size)),
        (np.array(calibration.temperatures), np.array(calibration.shifts)),
    )
    figure, axes = import_pyplot().subplots(1, size, figsize=(2.2 * size, 2.8), sharey=True, squeeze=False)
    for label, at, color in (("before", as_given, "tab:gray"), ("after", fitted, "tab:red")):
        predicted = survival_at(blocks.logits, *at)
        for k, panel in enumerate(axes[0]):
            draw_reliability(panel, k, predicted[:, k], blocks.survived[:, k], color=color, label=label)
    axes[0, 0].set_ylabel("survived")
    figure.supxlabel("survival given", fontsize="medium")
    axes[0, 0].legend(fontsize="small")
    save(figure, path)
