"""A head's files, looked at without loading a tensor: config.json and the headers of its safetensors."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import (
    HfHubHTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from ..modeling_dspark import DSparkHead
from ..scheduling.settings import DRAFT_SETTINGS
from . import dialect_of, read_config
from .errors import CheckpointError, config_file

# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What a head may borrow from its target.
TABLES = ("embed_tokens.weight", "lm_head.weight")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
# What `dspark-hf eval` wrote, where a head was published with it.
RESULTS = "eval_results.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin", "model.pt", "model.pth")
FLOATS = ("F64", "F32", "F16", "BF16")
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# Small tensors of the layouts that map a reduced draft vocabulary, and their type.
MAPS = {"d2t": "I64", "t2d": "BOOL"}
ELSEWHERE = "The file may belong to another head, or config.json to another layout."


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


@dataclass(frozen=True)
class Checkpoint:
    """A head that was looked at.

    source: folder or Hub id. dialect: module of `checkpoints`. published: its config.json. native: the keys of a
    `DSparkConfig`. tensors: headers by this project's names, and `published_names` what the file calls them.
    """

    source: str
    dialect: ModuleType
    published: dict[str, Any]
    native: dict[str, Any]
    tensors: dict[str, TensorHeader]
    published_names: dict[str, str]

    @property
    def key_mapping(self) -> dict[str, str]:
        """As `from_pretrained` of transformers takes it: patterns of the file's tensor names to ours."""
        renamed = {old: new for new, old in self.published_names.items() if old != new}
        return {f"^{old}$".replace(".", r"\."): new for old, new in renamed.items()}

    @property
    def borrowed(self) -> dict[str, bool]:
        """Config keys: whether the embedding and the LM head are the target's."""
        return {key: self.native[key] for key in ("borrow_embeddings", "borrow_lm_head") if key in self.native}

    def build(self, head_class: type[DSparkHead]) -> DSparkHead:
        """The head on the meta device, without weights."""
        try:
            config = head_class.config_class(**self.native)
            with torch.device("meta"):
                return head_class(config)
        except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise CheckpointError(config_file(self.source), "the config", f"{error}", "sound values") from error

    def validate(self, head_class: type[DSparkHead]) -> None:
        """Raise unless the files hold exactly the tensors that their config implies."""
        layers = {name.split(".")[1] for name in self.tensors if name.startswith("layers.")}
        stated = self.native["num_hidden_layers"]
        if len(layers) != stated:
            key = self.dialect.names(self.published).get("num_hidden_layers", "num_hidden_layers")
            expected = f"{len(layers)}, the layers in the file"
            raise CheckpointError(config_file(self.source), key, str(stated), expected, ELSEWHERE)
        expected = {name: tuple(tensor.shape) for name, tensor in self.build(head_class).state_dict().items()}
        if "t2d" in self.tensors and "d2t" in expected:
            expected["t2d"] = (self.native["vocab_size"],)
        for name, shape in expected.items():
            self._check_tensor(name, shape)
        for name, header in self.tensors.items():
            if name not in expected:
                own = self.published_names[name]
                raise CheckpointError(header.file, own, "a tensor", "no tensor of this name", ELSEWHERE)

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        header = self.tensors.get(name)
        if header is None:
            file = next((header.file for header in self.tensors.values()), self.source)
            raise CheckpointError(file, name, "no tensor", f"one of shape {list(shape)}", ELSEWHERE)
        own = self.published_names[name]
        if header.shape != shape:
            raise CheckpointError(header.file, own, f"shape {list(header.shape)}", f"{list(shape)}", ELSEWHERE)
        types = (MAPS[name],) if name in MAPS else FLOATS
        if header.dtype not in types:
            raise CheckpointError(header.file, own, f"type {header.dtype}", " or ".join(types))

    def validate_maps(self) -> None:
        """Raise unless `d2t` names tokens of the target, in increasing order, and `t2d` the same ones."""
        header = self.tensors.get("d2t")
        if header is None:
            return
        vocab_size, offsets = self.native["vocab_size"], self._read("d2t")
        tokens = offsets + torch.arange(len(offsets))
        if tokens[0] < 0 or tokens[-1] >= vocab_size or (tokens[1:] <= tokens[:-1]).any():
            found = f"target ids from {tokens.min().item()} to {tokens.max().item()}"
            raise CheckpointError(header.file, "d2t", found, f"increasing ids below {vocab_size}")
        if "t2d" in self.tensors:
            mask = self._read("t2d")
            if mask.sum() != len(tokens) or not mask[tokens].all():
                found = f"a mask of {int(mask.sum())} tokens"
                raise CheckpointError(self.tensors["t2d"].file, "t2d", found, f"the {len(tokens)} tokens of d2t")

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(self.published_names[name])


def open_checkpoint(source: str | os.PathLike, download: bool = True, **hub) -> Checkpoint:
    """Look at the head in a folder or of a Hub id.

    Args:
        download: whether weights that are on the Hub are fetched; otherwise only their headers are.
        hub: of `HUB_ARGUMENTS`.

    Raises:
        OSError: when the folder, config.json or the weights cannot be found.
        CheckpointError: when what is there is no sound head.
    """
    source = os.fspath(source)
    check_source(source)
    published = read_published(source, **hub)
    dialect = dialect_of(published, source)
    native = read_config(published, source)
    found = _headers(source, download, hub)
    published_names = {_renamed(name, dialect): name for name in found}
    tensors = {_renamed(name, dialect): header for name, header in found.items()}
    if getattr(dialect, "MAY_LACK_TABLES", False):
        native |= {
            "borrow_embeddings": "embed_tokens.weight" not in tensors,
            "borrow_lm_head": "lm_head.weight" not in tensors,
        }
    return Checkpoint(source, dialect, published, native, tensors, published_names)


def check_source(source: str | os.PathLike) -> None:
    """Raises OSError for a path of no folder. What could be an id of the Hub, `NAME` or `USER/NAME`, is left to it."""
    path = os.fspath(source)
    if not os.path.isdir(path) and not re.fullmatch(r"[^/\\.~][^/\\]*(/[^/\\]+)?", path):
        raise OSError(f"There is no folder {path!r}.")


def _renamed(name: str, dialect: ModuleType) -> str:
    for old, new in (dialect.PREFIXES | getattr(dialect, "OLD_PREFIXES", {})).items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def read_published(source: str, **hub) -> dict[str, Any]:
    """The `config.json` of a folder or repository, as it is."""
    path = cached_file(source, "config.json", **hub, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise OSError(f"There is no config.json in {source!r}. Check the path or the repository id.")
    try:
        published = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(config_file(source), "the file", f"no JSON ({error})", "a JSON object") from error
    if not isinstance(published, dict):
        raise CheckpointError(config_file(source), "the file", type(published).__name__, "a JSON object")
    return published


def read_draft_settings(source: str, **hub) -> dict[str, Any]:
    """What a `generation_config.json` beside a head says about drafting; nothing where there is none. The rest of it is
    about text, and may be that of its target.

    Raises:
        CheckpointError: when it is no JSON object.
    """
    path = find_file(source, GENERATION_CONFIG, **hub)
    if path is None:
        return {}
    try:
        said = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: said[key] for key in DRAFT_SETTINGS if said.get(key) is not None}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(path, "the file", f"no JSON object ({error})", "a JSON object") from error


# -- Headers ----------------------------------------------------------------------------------------------------


def _headers(source: str, download: bool, hub: dict[str, Any]) -> dict[str, TensorHeader]:
    """Headers by the file's own names."""
    if not (download or os.path.isdir(source) or _is_cached(source, hub)):
        return _remote_headers(source, hub)
    path = _find(source, WEIGHTS, hub)
    if path is not None:
        return read_header(path)
    index = _find(source, INDEX, hub)
    if index is None:
        _refuse_pickles(source, hub)
        raise OSError(
            f"{source} has no file named {WEIGHTS} or {INDEX}. Check the path or the repository id; heads are loaded "
            "from safetensors only."
        )
    headers: dict[str, TensorHeader] = {}
    for shard, names in _shards(index).items():
        path = _find(source, shard, hub)
        if path is None:
            raise CheckpointError(index, "weight_map", f"the file {shard}", "files that are there")
        own = read_header(path)
        for name in names:
            if name not in own:
                raise CheckpointError(path, name, "nothing", f"a tensor, as {INDEX} says")
        headers |= own
    return headers


def _is_cached(source: str, hub: dict[str, Any]) -> bool:
    try:
        return _find(source, WEIGHTS, hub | {"local_files_only": True}) is not None
    except OSError:
        return False


def find_file(source: str, name: str, **hub) -> str | None:
    """The path of a file, `None` where a folder or repository does not have it or cannot be asked."""
    try:
        return _find(source, name, hub)
    except OSError:
        return None


def _find(source: str, name: str, hub: dict[str, Any]) -> str | None:
    """The path of a file, `None` where a folder or repository does not have it."""
    return cached_file(source, name, **hub, _raise_exceptions_for_missing_entries=False)


def _shards(index: str) -> dict[str, list[str]]:
    """File names of an index and the tensors in each."""
    try:
        mapped = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        items = list(mapped.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(index, "weight_map", f"{type(error).__name__}", "an object of file names") from error
    shards: dict[str, list[str]] = {}
    for name, file in items:
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise CheckpointError(index, "weight_map", repr(file), "the name of a .safetensors file beside it")
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


def _remote_headers(source: str, hub: dict[str, Any]) -> dict[str, TensorHeader]:
    """Of a repository whose weights are not here: the first bytes of each file."""
    options = {key: hub[key] for key in ("revision", "token") if key in hub}
    try:
        metadata = get_safetensors_metadata(source, **options)
    except NotASafetensorsRepoError as error:
        _refuse_pickles(source, hub)
        raise OSError(f"{source} has no safetensors: {error}") from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{source}/{WEIGHTS}", "header", str(error), "a safetensors header") from error
    except HfHubHTTPError as error:
        raise OSError(f"The headers of {source} cannot be read: {error}") from error
    return {
        name: TensorHeader(f"{source}/{file}", tensor.dtype, tuple(tensor.shape))
        for file, part in metadata.files_metadata.items()
        for name, tensor in part.tensors.items()
    }


def _refuse_pickles(source: str, hub: dict[str, Any]) -> None:
    for name in PICKLES:
        path = os.path.join(source, name) if os.path.isdir(source) else _find(source, name, hub)
        if path is not None and os.path.exists(path):
            fix = "Pickles can run code and are not opened; convert the weights to safetensors."
            raise CheckpointError(path, "format", "a pickle", WEIGHTS, fix)
