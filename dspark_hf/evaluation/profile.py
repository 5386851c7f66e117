"""The step times of a pair as a table and a picture."""

from pathlib import Path

from rich import box
from rich.table import Table

from ..scheduling.cost import KINDS, CostTable
from .plots import import_pyplot, save

TITLES = {
    "verify": "verify: tokens a row",
    "packed": "verify, packed: mean tokens a row",
    "draft": "draft: positions",
    "start": "first draft, of a position",
}


def as_tables(table: CostTable) -> list[Table]:
    """Milliseconds a step, a table a kind of step and context."""
    tables = []
    for kind in KINDS:
        for context, times in zip(table.contexts, getattr(table, kind), strict=True):
            shown = Table(title=f"{TITLES[kind]}, context {context}, ms", box=box.SIMPLE_HEAD)
            for column in ("rows", *map(str, range(1, times.shape[1] + 1))):
                shown.add_column(column, justify="right")
            for rows, line in zip(table.rows, times, strict=True):
                shown.add_row(str(rows), *(f"{1000 * seconds:.2f}" for seconds in line))
            tables.append(shown)
    return tables


def as_json(table: CostTable) -> dict:
    """The table as machines read it, in seconds."""
    times = {kind: getattr(table, kind).tolist() for kind in KINDS}
    return {"identity": table.identity, "path": str(table.path), "contexts": table.contexts, "rows": table.rows} | times


def plot(table: CostTable, path: Path) -> None:
    """Step time against tokens in the step, a line for each number of rows, at the shortest context."""
    kinds = [kind for kind in KINDS if kind != "start"]
    figure, axes = import_pyplot().subplots(1, len(kinds), figsize=(4.5 * len(kinds), 3.5), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for rows, line in zip(table.rows, getattr(table, kind)[0], strict=True):
            tokens = [rows * size for size in range(1, len(line) + 1)]
            axis.plot(tokens, [1000 * seconds for seconds in line], marker=".", label=f"{rows} rows")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(TITLES[kind].split(":")[0])
        axis.set_xlabel("tokens in the step" if kind != "draft" else "positions drafted, of all rows")
    axes[0].set_ylabel("ms")
    axes[-1].legend(fontsize="small")
    save(figure, path)
