"""A head's files, looked at without loading a tensor: config.json and the headers of its safetensors."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open

from ..modeling_dspark import DSparkHead
from ..scheduling.settings import HEAD_SETTINGS
from . import DIALECTS, dialect_of, read_config
from .errors import CheckpointError, config_file
from .headers import TensorHeader, find, find_file, read_headers
from .stored import StoredWeight

# Arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What a head may borrow from its target.
TABLES = ("embed_tokens.weight", "lm_head.weight")
GENERATION_CONFIG = "generation_config.json"
# What `dspark-hf eval` wrote, where a head was published with it.
RESULTS = "eval_results.json"
FLOATS = ("F64", "F32", "F16", "BF16")
# Folder of a target's repository in which its head may lie; SGLang looks there too.
BUNDLED = "dspark"
# Small tensors of the layouts that map a reduced draft vocabulary, and their type.
MAPS = {"d2t": "I64", "t2d": "BOOL"}
ELSEWHERE = "The file may belong to another head, or config.json to another layout."


@dataclass(frozen=True)
class Checkpoint:
    """A head that was looked at.

    source: folder or Hub id. dialect: module of `checkpoints`. published: its config.json. native: the keys of a
    `DSparkConfig`. tensors: headers by this project's names, and `published_names` what the file calls them. stored:
    headers by the file's names. from_tensors: keys of `native` that the tensors tell. subfolder: of the source, where
    its files are. weights: of a head inside its target's checkpoint what its tensors are made of.
    """

    source: str
    dialect: ModuleType
    published: dict[str, Any]
    native: dict[str, Any]
    tensors: dict[str, TensorHeader]
    published_names: dict[str, str]
    stored: dict[str, TensorHeader]
    from_tensors: dict[str, Any]
    subfolder: str = ""
    weights: dict[str, StoredWeight] | None = None

    @property
    def key_mapping(self) -> dict[str, str]:
        """As `from_pretrained` of transformers takes it: patterns of the file's tensor names to ours."""
        renamed = {old: new for new, old in self.published_names.items() if old != new}
        return {f"^{old}$".replace(".", r"\."): new for old, new in renamed.items()}

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
            in_file = f"{len(layers)}, the layers in the file"
            raise CheckpointError(config_file(self.source), key, str(stated), in_file, ELSEWHERE)
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


def open_checkpoint(source: str | os.PathLike, download: bool = True, **hub: Any) -> Checkpoint:
    """Look at the head in a folder or of a Hub id; of a target's own, at the head that it brings.

    Args:
        download: whether weights that are on the Hub are fetched; otherwise only their headers are.
        hub: of `HUB_ARGUMENTS`.

    Raises:
        OSError: when the folder, config.json or the weights cannot be found.
        CheckpointError: when what is there is no sound head.
    """
    source = os.fspath(source)
    check_source(source)
    published, hub = _published_and_place(source, hub)
    dialect, subfolder = dialect_of(published, source), hub.get("subfolder") or ""
    native = read_config(published, source)
    if hasattr(dialect, "gather"):
        stored = read_headers(source, download, hub, dialect.INSIDE)
        weights = dialect.gather(stored, published, source)
        told, tensors = dialect.told_by(weights), {name: weight.header for name, weight in weights.items()}
        names = {name: weight.name for name, weight in weights.items()}
        return Checkpoint(source, dialect, published, native | told, tensors, names, stored, told, subfolder, weights)
    stored = read_headers(source, download, hub)
    names = {_renamed(name, dialect): name for name in stored}
    tensors = {_renamed(name, dialect): header for name, header in stored.items()}
    told = {}
    if getattr(dialect, "MAY_LACK_TABLES", False):
        told = {
            "borrow_embeddings": "embed_tokens.weight" not in tensors,
            "borrow_lm_head": "lm_head.weight" not in tensors,
        }
    borrowed = {key: native[key] for key in ("borrow_embeddings", "borrow_lm_head") if key in native} | told
    return Checkpoint(source, dialect, published, native | told, tensors, names, stored, borrowed, subfolder)


def _published_and_place(source: str, hub: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a head and where it is: at the source, or in the folder that a target has for its head."""
    published = read_published(source, **hub)
    try:
        dialect_of(published, source)
    except CheckpointError:
        if hub.get("subfolder") or not brings_head(source, **hub):
            raise
        hub = hub | {"subfolder": BUNDLED}
        published = read_published(source, **hub)
    return published, hub


def brings_head(target: str, **hub: Any) -> bool:
    """Whether a target's folder or repository holds its head, among its own tensors or in a folder of it."""
    try:
        published = read_published(target, **hub)
        inside = any(dialect.recognises(published) for dialect in DIALECTS if hasattr(dialect, "INSIDE"))
        return inside or find(target, "config.json", hub | {"subfolder": BUNDLED}) is not None
    except (OSError, CheckpointError):
        return False


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


def read_published(source: str, **hub: Any) -> dict[str, Any]:
    """The `config.json` of a folder or repository, as it is."""
    path = find(source, "config.json", hub)
    if path is None:
        raise OSError(f"There is no config.json in {source!r}. Check the path or the repository id.")
    try:
        published = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(config_file(source), "the file", f"no JSON ({error})", "a JSON object") from error
    if not isinstance(published, dict):
        raise CheckpointError(config_file(source), "the file", type(published).__name__, "a JSON object")
    return published


def read_draft_settings(source: str, **hub: Any) -> dict[str, Any]:
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
        return {key: said[key] for key in HEAD_SETTINGS if said.get(key) is not None}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(path, "the file", f"no JSON object ({error})", "a JSON object") from error
