"""Throughput against batch size: plain decoding, every fixed length, and the load schedule, on the same prompts."""

import random
from pathlib import Path

from rich import box
from rich.table import Table

from ..modeling_dspark import DSparkHead
from .bench import CUT_SHORT, BenchRecord, Cell, cells_of, fixed_methods, turns_cell
from .plots import import_pyplot, save

# Batches of prompts at batch size 1, and fewer at larger ones, which take longer and depend less on their prompts.
BATCHES, FEWEST_BATCHES = 8, 2
# Of every method over all batches of a cell, at least: few batches are run more often.
RUNS = 24
# The limit: a sweep of 9 methods at 6 batch sizes on 2 sets of prompts has some 17 s for each of these 108, where a
# table's limit leaves 24 s to each of its 5.
SECONDS = 1800.0


def sweep_cells(head: DSparkHead, domains: dict[str, list[str]], batch_sizes: list[int]) -> list[Cell]:
    """A cell for every set of prompts and batch size; see `cells_of`."""
    methods = ["plain", *fixed_methods(head), "load"]
    cells = []
    for domain, prompts in domains.items():
        for size in batch_sizes:
            count = max(FEWEST_BATCHES, round(BATCHES / size**0.5))
            cells += cells_of(head, _drawn(prompts, count * size), [size], methods, RUNS // count, domain)
    return cells


def _drawn(prompts: list[str], count: int) -> list[str]:
    """So many of the prompts; where there are fewer all again and again, in another order each time, so that batches
    differ."""
    order, drawn = random.Random(0), list(prompts)
    while len(drawn) < count:
        drawn += order.sample(prompts, len(prompts))
    return drawn[:count]


def as_table(records: list[BenchRecord]) -> Table:
    """What the load schedule is measured against: plain decoding and the best fixed length."""
    table = Table(
        title="tokens/s, methods measured alternately",
        caption=f"of best: load over the best of all others. length: drafts verified a round of a row.\n{CUT_SHORT}",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("prompts", no_wrap=True)
    for column in ("batch", "plain", "best fixed", "load", "of best", "speed up", "length", "tau", "schedule", "turns"):
        table.add_column(column, justify="right")
    for (domain, size), group in _groups(records).items():
        load, plain = group["load"], group["plain"]
        fixed = max((r for name, r in group.items() if name.startswith("fixed")), key=lambda r: r.tokens_per_second)
        best = max(fixed.tokens_per_second, plain.tokens_per_second)
        round_ms = load.draft_ms + load.schedule_ms + load.verify_ms
        table.add_row(
            domain,
            str(size),
            f"{plain.tokens_per_second:.0f}",
            f"{fixed.tokens_per_second:.0f} ({fixed.method.removeprefix('fixed-')})",
            f"{load.tokens_per_second:.0f}",
            f"{load.tokens_per_second / best:.3f}",
            f"{load.speedup:.2f}x",
            f"{load.verify_length:.2f}",
            f"{load.tau:.2f}",
            f"{load.schedule_ms / round_ms:.1%}",
            turns_cell(load),
        )
    return table


def plot(records: list[BenchRecord], path: Path) -> None:
    """Throughput and verified drafts against batch size, a column a set of prompts, as a picture file."""
    groups = _groups(records)
    domains = list(dict.fromkeys(domain for domain, _ in groups))
    figure, axes = import_pyplot().subplots(2, len(domains), figsize=(5 * len(domains), 6), sharex=True, squeeze=False)
    for (speed, length), domain in zip(axes.T, domains, strict=True):
        sizes = [size for name, size in groups if name == domain]
        for method in next(iter(groups.values())):
            chosen = [groups[domain, size][method] for size in sizes]
            style = _style(method)
            speed.plot(sizes, [r.speedup for r in chosen], **style)
            if method != "plain":
                length.plot(sizes, [r.verify_length for r in chosen], **style)
        speed.set_title(domain)
        speed.set_xscale("log", base=2)
        speed.set_xticks(sizes, [str(size) for size in sizes])
        length.set_xlabel("concurrent rows")
    axes[0, 0].set_ylabel("throughput, plain = 1")
    axes[1, 0].set_ylabel("drafts verified a row and round")
    axes[0, -1].legend(fontsize="small", ncols=2)
    save(figure, path)


def _style(method: str) -> dict:
    if method == "load":
        return {"label": method, "color": "tab:red", "linewidth": 2.5, "marker": "o", "zorder": 3}
    if method == "plain":
        return {"label": method, "color": "black", "linestyle": "--"}
    length = int(method.removeprefix("fixed-"))
    return {"label": method, "color": ("#9ecae1", "#4292c6", "#08519c")[min(length // 3, 2)], "linewidth": 1}


def _groups(records: list[BenchRecord]) -> dict[tuple[str, int], dict[str, BenchRecord]]:
    groups = {}
    for record in records:
        groups.setdefault((record.domain, record.batch_size), {})[record.method] = record
    return groups
