"""What a head is, from its config and the headers of its weights: no tensor is read, whatever its size."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, PreTrainedConfig

from ..checkpoints.files import TABLES, Checkpoint, check_source, open_checkpoint
from ..modeling_dspark import DSparkHead
from ..pairing import doubts, misfits
from .registry import published_heads


@dataclass(frozen=True)
class Inspection:
    """A head. target: that it was made for, `None` where neither file nor registry says.

    rows: of a block; drafts: of a round. parameters, bytes: in the file. table_bytes: of its copies of the target's
    embedding and LM head. borrowed: what the target lends. problems: what speaks against a given
    target, `None` where there is none to look at.
    """

    head: str
    dialect: str
    target: str | None
    backbone: str
    layers: int
    layer_types: list[str]
    target_layers: list[int]
    rows: int
    drafts: int
    sequential_head: str
    confidence_head: str
    vocabulary: int
    draft_vocabulary: int
    rope_theta: float
    parameters: int
    bytes: int
    table_bytes: int
    dtypes: list[str]
    borrowed: list[str]
    problems: list[str] | None


def inspect_head(source: str, target: str | None = None, **hub: Any) -> Inspection:
    """Look at a head.

    Args:
        source: a Hub id or a folder. target: that of a model, to look at the two side by side; only its config is read.
            By default the one that the head was made for, if its config is on this machine.

    Raises:
        OSError, CheckpointError: as `DSparkHead.from_pretrained`.
    """
    checkpoint = open_checkpoint(source, download=False, **hub)
    checkpoint.validate(DSparkHead)
    config = checkpoint.build(DSparkHead).config
    beside = _target_config(checkpoint, target)
    problems = None if beside is None else problems_beside(config, beside)
    tensors = checkpoint.tensors
    return Inspection(
        head=source,
        dialect=checkpoint.dialect.NAME,
        target=target or _target_of(checkpoint),
        backbone=config.backbone,
        layers=config.num_hidden_layers,
        layer_types=config.layer_types,
        target_layers=config.target_layer_ids,
        rows=config.block_size,
        drafts=config.gamma,
        sequential_head=f"{config.markov_head_type}, rank {config.markov_rank}" if config.markov_rank else "none",
        confidence_head=_confidence(config),
        vocabulary=config.vocab_size,
        draft_vocabulary=config.draft_vocab_size or config.vocab_size,
        rope_theta=config.rope_parameters["rope_theta"],
        parameters=sum(header.count for name, header in tensors.items() if name not in ("d2t", "t2d")),
        bytes=sum(header.bytes for header in checkpoint.stored.values()),
        table_bytes=sum(tensors[name].bytes for name in TABLES if name in tensors),
        dtypes=sorted({header.dtype for name, header in checkpoint.stored.items() if name not in ("d2t", "t2d")}),
        borrowed=[name.removesuffix(".weight") for name in TABLES if name not in tensors],
        problems=problems,
    )


def problems_beside(config: PreTrainedConfig, target: PreTrainedConfig) -> list[str]:
    """What speaks against a head of this config beside a target of that."""
    return misfits(config, target) or doubts(config, target)


def _target_of(checkpoint: Checkpoint) -> str | None:
    if checkpoint.weights is not None:
        # The head is part of its target.
        return checkpoint.source
    said = checkpoint.native.get("target_name_or_path")
    listed = [head.target for head in published_heads() if head.head.lower() == checkpoint.source.lower()]
    return said or next(iter(listed), None)


def _target_config(checkpoint: Checkpoint, target: str | None) -> PreTrainedConfig | None:
    if target is not None:
        check_source(target)
        return AutoConfig.from_pretrained(target)
    said = _target_of(checkpoint)
    if said is None:
        return None
    beside = Path(checkpoint.source, said)
    try:
        return AutoConfig.from_pretrained(beside if beside.is_dir() else said, local_files_only=True)
    except (OSError, ValueError):
        return None


def _confidence(config: PreTrainedConfig) -> str:
    if not config.enable_confidence_head:
        return "none"
    sees = "hidden state and previous token" if config.confidence_head_with_markov else "hidden state"
    return f"from {sees}{', calibrated' if config.confidence_temperatures else ''}"


def as_json(found: Inspection) -> dict[str, Any]:
    return asdict(found)


def as_table(found: Inspection) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    sliding = found.layer_types.count("sliding_attention")
    rows = {
        "head": found.head,
        "dialect": found.dialect,
        "target": found.target or "not said",
        "layers": f"{found.layers} of {found.backbone}{f', {sliding} of them sliding' if sliding else ''}",
        "fed by": f"target layers {', '.join(map(str, found.target_layers))}",
        "block": f"{found.rows} rows, {found.drafts} drafts",
        "sequential head": found.sequential_head,
        "confidence head": found.confidence_head,
        "vocabulary": _vocabulary(found),
        "rope base": f"{found.rope_theta:g}",
        "parameters": f"{found.parameters:,} ({', '.join(found.dtypes)})",
        "borrowed": ", ".join(found.borrowed) or "nothing",
        "memory": _memory(found),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for problem in found.problems or ():
        table.add_row(Text("problem", style="red"), problem)
    if found.problems == []:
        table.add_row(Text("beside the target", style="green"), "fits: vocabulary, width, layers and mask token")
    return table


def _vocabulary(found: Inspection) -> str:
    reduced = found.draft_vocabulary < found.vocabulary
    return f"{found.vocabulary:,}{f', drafts from {found.draft_vocabulary:,} of them' if reduced else ''}"


def _memory(found: Inspection) -> str:
    whole = _size(found.bytes)
    if not found.table_bytes:
        return f"{whole} beside the target"
    least = _size(found.bytes - found.table_bytes)
    return f"{least} beside the target once its copies of the target's tables are freed, {whole} before"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
