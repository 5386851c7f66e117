"""What the doctor found, as people and as machines read it."""

import math
from collections.abc import Iterator
from dataclasses import asdict

from rich import box
from rich.table import Table

from .doctor import Diagnosis, Finding, Measured
from .report import format_cell

MIB = 2**20


def as_tables(measured: Measured) -> list[Table]:
    """The measurement: of every prompt, and of every position of the block."""
    options = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    prompts = Table(title="tau, tokens a round, by prompt", **options)
    for column in (*map(str, range(1, len(measured.taus) + 1)), "all"):
        prompts.add_column(column, justify="right")
    prompts.add_row(*(f"{tau:.2f}" for tau in [*measured.taus, measured.result.accepted_length]))
    positions = Table(title="drafts by position", **options)
    positions.add_column("")
    for position in measured.result.positions:
        positions.add_column(str(position.position), justify="right")
    for name, key in (("kept", "acceptance"), ("survival given", "survival"), ("ECE", "ece")):
        positions.add_row(name, *(format_cell(getattr(p, key), "{:.0%}") for p in measured.result.positions))
    if measured.promised:
        positions.add_row("kept, as published", *(f"{share:.0%}" for share in measured.promised))
    return [prompts, positions]


def summary(measured: Measured) -> str:
    """Time and memory beside plain decoding, a line."""
    ratio = measured.plain_seconds / measured.seconds
    return (
        f"{measured.seconds:.2f} s with whole blocks, {measured.plain_seconds:.2f} s plain ({ratio:.2f}x); weights "
        f"{measured.bytes / MIB:.1f} MiB beside {measured.target_bytes / MIB:.1f} MiB"
    )


def as_lines(found: Diagnosis) -> Iterator[tuple[str, str]]:
    """The findings and the notes, and the style of each line."""
    for number, finding in enumerate(found.findings, start=1):
        weight = "" if math.isinf(finding.weight) else f" ({finding.weight:.2f}x)"
        yield f"{number}. {finding.name}{weight}: {finding.evidence}", "red"
        yield f"   {finding.fix}", ""
    for note in found.notes:
        yield f"note: {note}", "yellow"
    if not found.findings:
        yield "nothing is wrong with this head beside this target", "green"


def as_json(found: Diagnosis) -> dict:
    """All of it; an infinite weight is `None`."""
    measured = None if found.measured is None else asdict(found.measured)
    return {"findings": [_finding(finding) for finding in found.findings], "notes": found.notes, "measured": measured}


def _finding(finding: Finding) -> dict:
    return asdict(finding) | {"weight": finding.weight if math.isfinite(finding.weight) else None}
