"""What steps of a pair cost, as far as generation has learnt: tables and a picture."""

from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from ..scheduling.cost import CostModel
from .plots import import_pyplot, save

TITLES = {
    "verify": "verify, ms by tokens a row",
    "packed": "verify, packed, ms by mean tokens a row",
    "draft": "draft, ms by positions",
    "unsure": "standard deviation of a round, % by drafts a row",
}


def times(costs: CostModel, rows: list[int], context: int) -> dict[str, np.ndarray]:
    """[rows, sizes] seconds of every kind of step, and how unsure a round of 0, 1, .. drafts is, as a share of it."""
    kinds = {
        "verify": costs.verify,
        "packed": lambda rows, context: costs.verify(rows, context, packed=True),
        "draft": costs.draft,
        "unsure": costs.unsure,
    }
    return {kind: np.stack([of(n, context) for n in rows]) for kind, of in kinds.items()}


def as_tables(known: dict[str, np.ndarray], rows: list[int], context: int) -> list[Table]:
    """A table a kind of step."""
    tables = []
    for kind, values in known.items():
        shown = Table(title=f"{TITLES[kind]}, context {context}", box=box.SIMPLE_HEAD)
        first = 0 if kind == "unsure" else 1
        for column in ("rows", *map(str, range(first, first + values.shape[1]))):
            shown.add_column(column, justify="right")
        for n, line in zip(rows, values, strict=True):
            cells = (f"{100 * value:.0f}" if kind == "unsure" else f"{1000 * value:.2f}" for value in line)
            shown.add_row(str(n), *cells)
        tables.append(shown)
    return tables


def plot(known: dict[str, np.ndarray], rows: list[int], path: Path) -> None:
    """Step time against tokens in the step, a line for each number of rows."""
    kinds = [kind for kind in known if kind != "unsure"]
    figure, axes = import_pyplot().subplots(1, len(kinds), figsize=(4.5 * len(kinds), 3.5), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for n, line in zip(rows, known[kind], strict=True):
            tokens = [n * size for size in range(1, len(line) + 1)]
            axis.plot(tokens, 1000 * line, marker=".", label=f"{n} rows")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(kind)
        axis.set_xlabel("tokens in the step" if kind != "draft" else "positions drafted, of all rows")
    axes[0].set_ylabel("ms")
    axes[-1].legend(fontsize="small")
    save(figure, path)
