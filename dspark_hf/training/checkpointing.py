"""Checkpoints of a run: whole or not there at all, and the same whatever processes and shards they were made in.

`checkpoint-STEP` holds the head (`model.safetensors`, its state dict), `optimizer.pt` and `state.json`: the step, how
the evaluations went and the settings of the run. There are no random states: what is random follows from the step.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map_only

from ..evaluation.runs import differences

NAME = "checkpoint-"
# In a folder of this name a checkpoint is written or deleted.
TEMPORARY = ".checkpoint"
# What reading a file raises that is not what it was.
DAMAGED = (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError)


@dataclass
class State:
    """How far a run is. step: steps done. tau, best_step: of the best evaluation and when it was, `None` before the
    first. waited: evaluations since then."""

    step: int = 0
    tau: float | None = None
    best_step: int | None = None
    waited: int = 0

    def note(self, tau: float) -> bool:
        """Take an evaluation at this step in; whether it is the best so far."""
        if self.tau is not None and tau <= self.tau:
            self.waited += 1
            return False
        self.tau, self.best_step, self.waited = tau, self.step, 0
        return True


def folder_of(output: Path, step: int) -> Path:
    return output / f"{NAME}{step}"


def saved_steps(output: Path) -> list[int]:
    """The steps of the checkpoints in a folder, the latest last."""
    names = (path.parent.name.removeprefix(NAME) for path in output.glob(f"{NAME}*/state.json"))
    return sorted(int(name) for name in names if name.isdecimal())


def whole(state: Any, keep: bool = True) -> Any:
    """A state with full tensors on the CPU in the place of shards, or with `None` in a process that does not keep it.
    All processes have to call it together."""

    def full(x: torch.Tensor) -> torch.Tensor | None:
        x = x.full_tensor() if hasattr(x, "full_tensor") else x
        return x.detach().cpu() if keep else None

    return tree_map_only(torch.Tensor, full, state)


def save(
    output: Path,
    state: State,
    settings: dict[str, Any],
    weights: dict[str, torch.Tensor],
    optimizers: dict[str, Any],
    limit: int | None = None,
) -> None:
    """Write a checkpoint, then delete the oldest ones but for `limit`; that of the best evaluation stays.

    Args:
        weights, optimizers: `whole` states.
    """
    temporary, folder = output / TEMPORARY, folder_of(output, state.step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: x.contiguous() for name, x in weights.items()}, temporary / "model.safetensors")
    torch.save(optimizers, temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps(asdict(state) | {"settings": settings}, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    old = saved_steps(output)[:-limit] if limit else []
    for step in old:
        if step != state.best_step:
            # Under another name first: half of a checkpoint is none.
            os.rename(folder_of(output, step), temporary)
            shutil.rmtree(temporary)


def load_state(output: Path, steps: int, settings: dict[str, Any]) -> State:
    """How far the latest checkpoint is.

    Raises:
        ValueError: where there is none, and where it is of a run with other settings or beyond the steps of this one.
    """
    if not (saved := saved_steps(output)):
        raise ValueError(
            f"There is no checkpoint to resume from in {str(output)!r}. Leave out --resume to start afresh."
        )
    folder = folder_of(output, saved[-1])
    content = json.loads((folder / "state.json").read_text())
    if differing := differences(content.pop("settings"), settings):
        raise ValueError(
            f"The checkpoint in {str(folder)!r} was made with other settings: {'; '.join(differing)}. Resume with its "
            "settings, or leave out --resume and choose another --output. (The number of processes may change while "
            "global batch_size, --batch-size x processes x --gradient-accumulation-steps, does not.)"
        )
    state = State(**content)
    if state.step > steps:
        raise ValueError(
            f"The checkpoint in {str(folder)!r} is at step {state.step}, beyond the {steps} steps of this run. "
            "Raise --epochs."
        )
    return state


def refuse_to_mix(output: Path) -> None:
    """Raise for a fresh run in the folder of another one.

    Raises:
        ValueError: where there are checkpoints.
    """
    if saved := saved_steps(output):
        raise ValueError(
            f"{str(output)!r} holds a run that is at step {saved[-1]}: --resume continues it. To start afresh choose "
            f"another --output, or delete its {NAME}* folders."
        )


def load_weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    """The state dict of the head.

    Raises:
        ValueError: for a damaged file.
    """
    return _read(folder_of(output, step) / "model.safetensors", load_file)


def load_optimizers(output: Path, step: int, optimizers: Iterable[torch.optim.Optimizer], scaler: Any = None) -> None:
    """Put the state of a checkpoint into the optimizers of prepared parameters, sharded perhaps.

    Raises:
        ValueError: for a damaged file.
    """
    path = folder_of(output, step) / "optimizer.pt"
    saved = _read(path, lambda path: torch.load(path, map_location="cpu", weights_only=True))
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in state["state"].items():
            state["state"][number] = {name: _as_sharded(x, parameters[number]) for name, x in values.items()}
        optimizer.load_state_dict(state)
    if scaler is not None and saved["scaler"] is not None:
        scaler.load_state_dict(saved["scaler"])


def optimizer_states(optimizers: Iterable[torch.optim.Optimizer], scaler: Any = None) -> dict[str, Any]:
    """What `load_optimizers` takes."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    return {"optimizers": states, "scaler": None if scaler is None else scaler.state_dict()}


def _as_sharded(x: Any, parameter: torch.Tensor) -> Any:
    """A full tensor of a parameter's state in the shards of the parameter."""
    if not hasattr(parameter, "full_tensor") or not torch.is_tensor(x) or x.shape != parameter.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)


def _read(path: Path, load) -> Any:
    try:
        return load(path)
    except DAMAGED as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}). Delete {str(path.parent)!r} to resume "
            "from the checkpoint before it."
        ) from error
