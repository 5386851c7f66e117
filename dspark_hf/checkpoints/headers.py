"""Headers of a head's safetensors: names, types and shapes, wherever the files are. No tensor is read."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, parse_safetensors_file_metadata
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from .errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin", "model.pt", "model.pth")
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorHeader:
    """What a header says of a tensor. file: that it is in. dtype: as safetensors calls it. shape: of the tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.count * BYTES.get(self.dtype, 1)


def read_headers(source: str, download: bool, hub: dict[str, Any], prefix: str = "") -> dict[str, TensorHeader]:
    """Headers by the file's own names, of a folder or repository.

    Args:
        download: see `files.open_checkpoint`. prefix: only tensors whose names begin so; no file without any is opened.
    """
    if not (download or os.path.isdir(source) or _is_cached(source, hub, prefix)):
        return _beginning(_remote_headers(source, hub, prefix), prefix)
    path = find(source, WEIGHTS, hub)
    if path is not None:
        return _beginning(read_header(path), prefix)
    index = find(source, INDEX, hub)
    if index is None:
        _refuse_pickles(source, hub)
        raise OSError(
            f"{source} has no file named {WEIGHTS} or {INDEX}. Check the path or the repository id; heads are loaded "
            "from safetensors only."
        )
    headers: dict[str, TensorHeader] = {}
    for shard, names in _shards(index, prefix).items():
        path = find(source, shard, hub)
        if path is None:
            raise CheckpointError(index, "weight_map", f"the file {shard}", "files that are there")
        own = read_header(path)
        for name in names:
            if name not in own:
                raise CheckpointError(path, name, "nothing", f"a tensor, as {INDEX} says")
        headers |= own
    return _beginning(headers, prefix)


def _beginning(headers: dict[str, TensorHeader], prefix: str) -> dict[str, TensorHeader]:
    return {name: header for name, header in headers.items() if name.startswith(prefix)}


def _is_cached(source: str, hub: dict[str, Any], prefix: str) -> bool:
    here = hub | {"local_files_only": True}
    try:
        if find(source, WEIGHTS, here) is not None:
            return True
        index = find(source, INDEX, here)
        return index is not None and all(find(source, shard, here) for shard in _shards(index, prefix))
    except OSError:
        return False


def find_file(source: str, name: str, **hub: Any) -> str | None:
    """The path of a file, `None` where a folder or repository does not have it or cannot be asked."""
    try:
        return find(source, name, hub)
    except OSError:
        return None


def find(source: str, name: str, hub: dict[str, Any]) -> str | None:
    """The path of a file, `None` where a folder or repository does not have it."""
    return cached_file(source, name, **hub, _raise_exceptions_for_missing_entries=False)


def _shards(index: str, prefix: str) -> dict[str, list[str]]:
    """File names of an index and the tensors in each whose names begin with the prefix."""
    try:
        mapped = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        items = list(mapped.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(index, "weight_map", f"{type(error).__name__}", "an object of file names") from error
    shards: dict[str, list[str]] = {}
    for name, file in items:
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise CheckpointError(index, "weight_map", repr(file), "the name of a .safetensors file beside it")
        if name.startswith(prefix):
            shards.setdefault(file, []).append(name)
    return shards


def read_header(path: str) -> dict[str, TensorHeader]:
    """Names, types and shapes of a safetensors file; its size is checked, no tensor is read.

    Raises:
        CheckpointError: for a file that is damaged, cut short or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {
                name: TensorHeader(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except SafetensorError as error:
        fix = "The file is damaged, cut short or of another format. Download it again."
        raise CheckpointError(path, "header", f"{error}", "a whole safetensors file", fix) from error


def _remote_headers(source: str, hub: dict[str, Any], prefix: str) -> dict[str, TensorHeader]:
    """Of a repository whose weights are not here: the first bytes of each file that has a name with the prefix."""
    options = {key: hub[key] for key in ("revision", "token") if key in hub}
    folder = hub.get("subfolder") or ""
    try:
        if not (prefix or folder):
            files = get_safetensors_metadata(source, **options).files_metadata
        else:
            index = find(source, INDEX, hub)
            names = [WEIGHTS] if index is None else _shards(index, prefix)
            paths = [f"{folder}/{name}".lstrip("/") for name in names]
            files = {path: parse_safetensors_file_metadata(source, path, **options) for path in paths}
    except NotASafetensorsRepoError as error:
        _refuse_pickles(source, hub)
        raise OSError(f"{source} has no safetensors: {error}") from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{source}/{WEIGHTS}", "header", str(error), "a safetensors header") from error
    except HfHubHTTPError as error:
        raise OSError(f"The headers of {source} cannot be read: {error}") from error
    return {
        name: TensorHeader(f"{source}/{file}", tensor.dtype, tuple(tensor.shape))
        for file, part in files.items()
        for name, tensor in part.tensors.items()
    }


def _refuse_pickles(source: str, hub: dict[str, Any]) -> None:
    for name in PICKLES:
        path = os.path.join(source, name) if os.path.isdir(source) else find(source, name, hub)
        if path is not None and os.path.exists(path):
            fix = "Pickles can run code and are not opened; convert the weights to safetensors."
            raise CheckpointError(path, "format", "a pickle", WEIGHTS, fix)
