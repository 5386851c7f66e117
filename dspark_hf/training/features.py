"""The target's states of the training rows, written once and read in every epoch: training without target passes.

A folder holds `features.json`, which says what the states are of, and shards `features-00000.safetensors`, each with
its checksum beside it as `sha256sum` writes it. A shard has `layer_I` [tokens, d] for every layer I that heads may read
and `last`, the last hidden states after the final norm, of consecutive rows, whose tokens follow one another.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ..evaluation.runs import differences
from .data import Row, collate
from .step import States, target_states

logger = logging.get_logger(__name__)

# A shard has as many rows as fit in here, one at least: what is lost when a run is killed, and made again when one of
# its bytes is damaged.
SHARD_BYTES = 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of every parameter of a target: what tells it from others of its shape.
FIRST_VALUES = 64


@dataclass(frozen=True)
class FeatureCache:
    """The cache of the rows of a run in a folder.

    lengths: tokens of every row. layers: that a head reads, in its order. width: d. dtype: name of a torch dtype.
    stored: the layers in the folder, at least those of `layers`.
    """

    folder: Path
    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    stored: tuple[int, ...]
    width: int
    dtype: str
    _open: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def shards(self) -> list[range]:
        """The rows of every shard."""
        most, found, start, tokens = SHARD_BYTES // self.bytes_a_token, [], 0, 0
        for row, length in enumerate(self.lengths):
            if tokens and tokens + length > most:
                found.append(range(start, row))
                start, tokens = row, 0
            tokens += length
        return [*found, range(start, len(self.lengths))]

    @property
    def bytes_a_token(self) -> int:
        return (len(self.stored) + 1) * self.width * DTYPES[self.dtype].itemsize

    def path(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05d}.safetensors"

    def size(self, shard: int) -> int:
        """Bytes of a shard, without its header."""
        return sum(self.lengths[row] for row in self.shards[shard]) * self.bytes_a_token

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """For every row its shard, and its first token in there."""
        return [
            (shard, start)
            for shard, rows in enumerate(self.shards)
            for start in accumulate((self.lengths[row] for row in rows[:-1]), initial=0)
        ]

    def read(self, row: int) -> States:
        """What `target_states` gives for a row, [T, m*d] and [T, d]."""
        shard, start = self._places[row]
        if shard not in self._open:
            self._open[shard] = safe_open(self.path(shard), "pt")
        tokens = slice(start, start + self.lengths[row])
        layers = [self._open[shard].get_slice(f"layer_{layer}")[tokens] for layer in self.layers]
        return torch.cat(layers, dim=-1), self._open[shard].get_slice("last")[tokens]

    def state_of(self, shard: int) -> str | None:
        """`None` for a shard that is whole, else what is wrong with it; reads all of it."""
        path, checksum = self.path(shard), _checksum_file(self.path(shard))
        if not checksum.is_file() or not path.is_file():
            return "missing"
        # A file with another checksum than the one beside it, whichever of the two was changed.
        return None if checksum.read_text() == _checksum_line(path) else "damaged"


def open_cache(
    folder: Path,
    target: PreTrainedModel,
    rows: list[Row],
    layers: list[int],
    accelerator: Accelerator,
    batch_size: int,
    dtype: str | None = None,
) -> FeatureCache:
    """The cache of the rows in the folder, complete: what is missing is made, what is damaged is named and made again.
    The processes of the accelerator share the work.

    Args:
        layers: layer ids as in `DSparkConfig.target_layer_ids`. batch_size: rows of a pass of the target. dtype: of the
            states on disk; that of the target by default.

    Raises:
        ValueError: when the folder holds states of another target, of other rows, of fewer layers or in another dtype,
            or when there is too little space for what is missing.
    """
    dtype = dtype or str(target.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"Features are cached in {', '.join(DTYPES)}, not in {dtype!r} (--cache-dtype).")
    contents = _contents(target, rows, dtype)
    stored = _stored_layers(folder, contents, layers)
    cache = FeatureCache(
        folder,
        tuple(len(row["input_ids"]) for row in rows),
        tuple(layers),
        tuple(stored),
        target.config.get_text_config(decoder=True).hidden_size,
        dtype,
    )
    accelerator.wait_for_everyone()  # All have seen what is in the folder.
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "features.json", json.dumps(contents | {"layers": stored}, indent=2) + "\n")
    own = range(accelerator.process_index, len(cache.shards), accelerator.num_processes)
    states = {shard: cache.state_of(shard) for shard in own}
    for shard, state in states.items():
        if state == "damaged":
            logger.warning(f"{str(cache.path(shard))!r} is damaged: its checksum differs. It is made again.")
    missing = [shard for shard, state in states.items() if state is not None]
    _announce(cache, missing, accelerator)
    for shard in track(missing, "caching features", disable=not missing or not accelerator.is_main_process):
        _write(cache, shard, target, rows, accelerator, batch_size)
    accelerator.wait_for_everyone()
    return cache


def _announce(cache: FeatureCache, missing: list[int], accelerator: Accelerator) -> None:
    """Say how large the cache becomes, before it does.

    Raises:
        ValueError: when that is more than there is space for.
    """
    size = sum(map(cache.size, missing))
    total = int(accelerator.reduce(torch.tensor(size, dtype=torch.float64, device=accelerator.device)).item())
    tokens, whole = sum(cache.lengths), sum(map(cache.size, range(len(cache.shards))))
    accelerator.print(
        f"features: {tokens:,} tokens x {cache.bytes_a_token:,} bytes ({len(cache.stored)} layers and the last states, "
        f"{cache.width} wide, {cache.dtype}) = {_readable(whole)}, {_readable(total)} of it to be made in "
        f"{str(cache.folder)!r}"
    )
    free = shutil.disk_usage(cache.folder).free
    if total > free:
        raise ValueError(
            f"The features take {_readable(total)} more in {str(cache.folder)!r}, where {_readable(free)} are free. "
            "Train without --cache-features, in a smaller --cache-dtype, or on fewer or shorter rows."
        )


def _readable(size: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"


def _write(
    cache: FeatureCache, shard: int, target: PreTrainedModel, rows: list[Row], accelerator: Accelerator, batch_size: int
) -> None:
    """Compute a shard, and put it and its checksum into the folder, complete or not at all."""
    own, states = cache.shards[shard], {}
    ordered = sorted(own, key=cache.lengths.__getitem__)
    for start in range(0, len(ordered), batch_size):
        numbers = ordered[start : start + batch_size]
        batch = send_to_device(collate([rows[number] for number in numbers]), accelerator.device)
        with accelerator.autocast():
            features, last = target_states(target, batch["input_ids"], list(cache.stored), batch.get("positions"))
        found = torch.cat([features, last], dim=-1).to(DTYPES[cache.dtype]).cpu()
        states |= {number: of_row[: cache.lengths[number]] for number, of_row in zip(numbers, found, strict=True)}
    names = [*(f"layer_{layer}" for layer in cache.stored), "last"]
    parts = torch.cat([states[number] for number in own]).split(cache.width, dim=-1)
    path = cache.path(shard)
    _checksum_file(path).unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}")
    save_file({name: part.contiguous() for name, part in zip(names, parts, strict=True)}, temporary)
    os.replace(temporary, path)
    _replace(_checksum_file(path), _checksum_line(path))


def _contents(target: PreTrainedModel, rows: list[Row], dtype: str) -> dict[str, Any]:
    """What `features.json` says beside the layers."""
    config = target.config.get_text_config(decoder=True)
    # Where rows are packed the target reads their positions too.
    read = [[row[key] for key in ("input_ids", "positions") if key in row] for row in rows]
    return {
        "target": target.config._name_or_path,
        "target weights": _fingerprint(target),
        "hidden size": config.hidden_size,
        "rows": f"{len(rows)}, sha256 {hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]}",
        "dtype": dtype,
        "shard bytes": SHARD_BYTES,
    }


def _stored_layers(folder: Path, contents: dict[str, Any], layers: list[int]) -> list[int]:
    """The layers that the folder holds, or those that are to be put there.

    Raises:
        ValueError: when it holds something else.
    """
    path = folder / "features.json"
    if not path.is_file():
        return sorted(set(layers))
    theirs = json.loads(path.read_text())
    stored = theirs.pop("layers")
    # A target may have moved.
    differing = differences(theirs | {"target": contents["target"]}, contents)
    if not set(layers) <= set(stored):
        differing.append(f"layers {stored}, now {sorted(layers)}")
    if differing:
        raise ValueError(
            f"{str(folder)!r} holds other features: {'; '.join(differing)}. Give another folder to --cache-features, "
            "or delete this one."
        )
    return stored


def _fingerprint(target: PreTrainedModel) -> str:
    """A checksum of the names, the shapes and the first values of all parameters."""
    checksum = hashlib.sha256()
    for name, parameter in target.named_parameters():
        values = parameter.detach().flatten()[:FIRST_VALUES].float().cpu()
        checksum.update(f"{name} {tuple(parameter.shape)}".encode() + values.numpy().tobytes())
    return checksum.hexdigest()[:16]


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum_line(path: Path) -> str:
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"


def _replace(path: Path, text: str) -> None:
    """Write a file that is whole whenever it is there."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)
