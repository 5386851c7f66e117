"""Import this before the kernels: without a GPU they run in Triton's interpreter, on the CPU."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Random cases for a test: others in every run, and more where they take no time or DSPARK_CASES asks for them.
CASES = int(os.environ.get("DSPARK_CASES", 20 if DEVICE == "cpu" else 80))
if DEVICE == "cpu":
    # Read when triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"


def spaced(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second of a larger tensor."""
    return torch.stack([x, x + 1], dim=-1)[..., 0]


def strided(x: torch.Tensor, how: int) -> torch.Tensor:
    """The same numbers with other strides: 0 contiguous, 1 gaps at the ends of rows, 2 the last dimensions swapped in
    memory, 3 every second number of a larger tensor."""
    if how == 1:
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan") if x.is_floating_point() else 0)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if how == 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == 3:
        return spaced(x)
    return x.contiguous()
