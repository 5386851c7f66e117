"""What is known of a pair: how its drafts fare and what its steps cost, the latter also from one process to the next;
and the scheduler that goes by it."""

import hashlib
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.constants import HF_HOME
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..modeling_dspark import DSparkHead
from ..scheduling.cost import CostModel
from ..scheduling.estimates import AcceptanceStats
from ..scheduling.scheduler import ConstantSchedule, LoadSchedule, SyncedSchedule
from ..scheduling.settings import Settings
from .drafting import Drafter, window_of
from .graphs import draft_tiers
from .packing import implementation_of
from .target import Target

logger = logging.get_logger(__name__)

FORMAT = 4
SECONDS_BETWEEN_WRITES = 60


@dataclass
class PairCosts:
    """What a pair's steps cost.

    identity: of the pair, which takes milliseconds to read. written: when it was stored last.
    """

    costs: CostModel
    identity: dict[str, Any]
    written: float = -math.inf


# By the models themselves, and what may change about them.
_kept: WeakKeyDictionary[DSparkHead, WeakKeyDictionary[PreTrainedModel, dict[tuple, PairCosts]]] = WeakKeyDictionary()
_acceptance: WeakKeyDictionary[DSparkHead, WeakKeyDictionary[PreTrainedModel, AcceptanceStats]] = WeakKeyDictionary()


def runs_ahead(device: torch.device) -> bool:
    """Whether the host queues work for the device; it then does not wait to see a round's confidence."""
    return device.type == "cuda"


def scheduler_for(
    target: Target, drafter: Drafter, rows: int, config: GenerationConfig, synced: bool = False
) -> ConstantSchedule:
    """The scheduler that a call, or else the head's `generation_config`, asks for, or the one for processes that wait
    for each other.

    Raises:
        ValueError: for settings that mean nothing to a DSpark head.
    """
    head, ahead = drafter.head, runs_ahead(target.device)
    settings = Settings.read(head.generation_config, head.config.gamma, config)
    shared = acceptance_of(head, target.model)
    if synced:
        return SyncedSchedule(settings, shared, rows, ahead)
    if settings.schedule == "constant":
        return ConstantSchedule(settings, shared, rows, ahead)
    costs = costs_of(head, target, config.do_sample)
    tiers = draft_tiers(head.config.gamma) if target.captured else None
    return LoadSchedule(settings, shared, rows, costs, target.packs, ahead, tiers)


def acceptance_of(head: DSparkHead, target: PreTrainedModel) -> AcceptanceStats:
    """What this process has seen of the head's drafts for a target."""
    by_target = _acceptance.setdefault(head, WeakKeyDictionary())
    if target not in by_target:
        by_target[target] = AcceptanceStats.initial(head.config.gamma)
    return by_target[target]


def costs_of(head: DSparkHead, target: Target, sampled: bool = False) -> CostModel:
    """What the pair's steps cost on its device, as far as this process or one before it has learnt.

    Args:
        sampled: whether tokens are, which with a large vocabulary takes longer than a small target's pass.
    """
    return _costs_of_pair(head, target, sampled).costs


def _costs_of_pair(head: DSparkHead, target: Target, sampled: bool) -> PairCosts:
    model = target.model
    changing = tuple(_settings_of(model, head, target.device, sampled, target.captured).values())
    by_settings = _kept.setdefault(head, WeakKeyDictionary()).setdefault(model, {})
    if changing not in by_settings:
        share = (head.config.num_hidden_layers + 1) / (target.config.num_hidden_layers + 1)
        costs = CostModel(head.config.gamma, share, target.device.type, window_of(head))
        identity = identity_of(model, head, target.device, sampled, target.captured)
        _load(costs, identity)
        by_settings[changing] = PairCosts(costs, identity)
    return by_settings[changing]


def store(head: DSparkHead, target: Target, sampled: bool = False, at_once: bool = False) -> None:
    """Write what was learnt of the pair's steps; unless `at_once`, only if that was not done just before."""
    kept, now = _costs_of_pair(head, target, sampled), time.monotonic()
    fresh = now - kept.written < SECONDS_BETWEEN_WRITES
    if kept.costs.pace is None or (fresh and not at_once):
        return
    kept.written, path = now, path_of(kept.identity)
    content = {"format": FORMAT, "identity": kept.identity} | kept.costs.as_json()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning_once(f"What steps cost could not be stored and will be learnt again ({error}).")


def _load(costs: CostModel, identity: dict[str, Any]) -> None:
    """Take over what is stored, if it is of this pair and whole."""
    path = path_of(identity)
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or content["identity"] != identity:
            raise ValueError("of another release, pair or device")
        costs.take_over(content)
    except FileNotFoundError:
        pass
    except (OSError, KeyError, TypeError, ValueError) as error:
        logger.warning(f"The step costs in {str(path)!r} cannot be used ({error}); they are learnt again.")


def path_of(identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Path(HF_HOME) / "dspark_hf" / "step_costs" / f"{identity['target']}-{digest}.json"


def identity_of(
    target: PreTrainedModel, head: DSparkHead, device: torch.device, sampled: bool = False, captured: bool = False
) -> dict[str, Any]:
    """What step costs depend on: the two models, their dtypes, the device, the attention implementation, and whether
    tokens are sampled and passes captured."""
    return {
        "target": type(target).__name__,
        "target_config": _digest(target.config),
        "target_bytes": target.get_memory_footprint(),
        "head_config": _digest(head.config),
        "torch": torch.__version__,
    } | _settings_of(target, head, device, sampled, captured)


def _settings_of(
    target: PreTrainedModel, head: DSparkHead, device: torch.device, sampled: bool, captured: bool
) -> dict[str, Any]:
    """The part of an identity that may change while a process runs."""
    cuda = device.type == "cuda"
    return {
        "target_dtype": str(target.dtype),
        "head_dtype": str(head.dtype),
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type}, {torch.get_num_threads()} threads",
        "attention": implementation_of(target.config.get_text_config(decoder=True)),
        "compiled": captured or target._compiled_call_impl is not None,
        "processes": target.tp_size or 1,
        "sampled": sampled,
        "draft_window": window_of(head),
    }


# What a config says of itself that changes nothing about its speed.
UNTIMED = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "confidence_temperatures",
    "confidence_shifts",
    "dtype",
)


def _digest(config) -> str:
    content = {key: value for key, value in config.to_dict().items() if key not in UNTIMED}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
