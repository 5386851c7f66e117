"""What an evaluation found: as a table, a picture, and the JSON file that cards are made of."""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from rich import box
from rich.table import Table

from ..modeling_dspark import DSparkHead
from .acceptance import EvalRecord, Result, survivals
from .plots import draw_reliability, import_pyplot, save
from .report import format_cell

FORMAT = 1
TABLES = ("embed_tokens.", "lm_head.")
# Fields of the config beside the weights that change what a head drafts, or what it says of its drafts.
CONFIG_KEYS = (
    "block_size",
    "sample_from_anchor",
    "mask_token_id",
    "target_layer_ids",
    "layer_types",
    "sliding_window",
    "rope_parameters",
    "confidence_temperatures",
    "confidence_shifts",
)


def fingerprint(head: DSparkHead) -> str:
    """What tells a head from others: a hash of its weights, in the precision of bfloat16, and of its config.

    The embedding and LM head are left out, as they are the target's. A head in float32 and its copy in bfloat16 have
    one fingerprint; one that was loaded in float16 may have another.
    """
    digest = hashlib.sha256()
    config = {key: getattr(head.config, key) for key in CONFIG_KEYS}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(head.state_dict().items()):
        if not name.startswith(TABLES):
            digest.update(name.encode())
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def as_json(run: dict, results: list[Result]) -> dict:
    """The file that `--results` writes: the run, when and with what it was done, and a result for every data set."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    date = datetime.now(UTC).date().isoformat()
    return {"format": FORMAT} | run | {"date": date, "versions": versions, "results": [asdict(r) for r in results]}


def read_results(path: str | Path) -> dict:
    """What `--results` wrote.

    Raises:
        ValueError: for a file of another kind. OSError: for none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} is not JSON ({error}); expected what `dspark-hf eval --results` writes."
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or "results" not in found:
        raise ValueError(f"{str(path)!r} is not a file that `dspark-hf eval --results` wrote.")
    return found


def check_results(results: dict, head: DSparkHead, name: str) -> None:
    """Raises ValueError when results are not those of a head."""
    if results["fingerprint"] != fingerprint(head):
        raise ValueError(
            f"The results are of another head than {name!r}: they were taken with {results['head']!r} on "
            f"{results['date']}, whose weights or config differ. Evaluate this head: dspark-hf eval --head {name}."
        )


def as_tables(results: list[Result], paper: dict[str, dict[str, float]] | None = None) -> list[Table]:
    """The results as people read them: of every data set, then of every position.

    Args:
        paper: accepted lengths to show beside them, by drafter and data set; see `benchmarks.paper_of`.
    """
    paper = {drafter: row for drafter, row in (paper or {}).items() if any(r.name in row for r in results)}
    options = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(
        title="whole blocks verified every round",
        caption="accepted: tokens a round, bonus included. verify rate: share of the verified tokens that became text."
        + ("\npaper: accepted, table 1, temperature 1, blocks of 7." if paper else ""),
        **options,
    )
    by_position = Table(title="drafts kept, by position", **options)
    columns = ("prompts", "proposals", "drafts", "accepted", *(f"paper: {drafter}" for drafter in paper))
    columns += ("verify rate", "ECE", "AUC", "Brier")
    positions = max(len(result.positions) for result in results)
    for part, names in ((table, columns), (by_position, map(str, range(1, positions + 1)))):
        part.add_column("data", no_wrap=True)
        for name in names:
            part.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.name,
            str(r.prompts),
            str(r.proposals),
            f"{r.proposal_length:.2f}+1",
            f"{r.accepted_length:.2f}",
            *(format_cell(row.get(r.name), "{:.2f}") for row in paper.values()),
            f"{r.verify_rate:.1%}",
            format_cell(r.ece, "{:.1%}"),
            format_cell(r.auc, "{:.3f}"),
            format_cell(r.brier, "{:.3f}"),
        )
        by_position.add_row(r.name, *(f"{p.acceptance:.1%}" for p in r.positions))
    return [table, by_position]


def plot(results: list[Result], records: list[EvalRecord], path: Path) -> None:
    """Acceptance by position, a line a data set; and with a confidence head how often drafts were kept against the
    survival they were given, a panel a position."""
    confidence = [c for r in records for c in r.confidence]
    kept = [k for r in records if r.confidence for k in r.kept]
    positions = max(map(len, confidence), default=0)
    figure, axes = import_pyplot().subplots(1, 1 + positions, figsize=(4 + 2.2 * positions, 3), squeeze=False)
    first, *panels = axes[0]
    for result in results:
        rates = [p.acceptance for p in result.positions]
        first.plot(range(1, len(rates) + 1), rates, marker=".", label=f"{result.name}: {result.accepted_length:.2f}")
    first.set(xlabel="position", ylabel="kept", ylim=(0, 1), title="accepted length")
    first.legend(fontsize="small")
    for k, panel in enumerate(panels):
        draw_reliability(panel, k, *survivals(k, confidence, kept), color="tab:red")
        panel.set_xlabel("survival given", fontsize="small")
    save(figure, path)
