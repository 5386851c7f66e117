"""The same in torch: what the kernels are tested against, and what runs where they do not."""

import torch

# What `largest` looks at in one go; smaller vocabularies it leaves to torch.
SLICE = 1024


def largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of the last dimension and the first place that has it, as `x.max(-1)`.

    torch's own on a CPU remembers a place for every number that it reads. To find the largest number of every slice
    takes a fiftieth of that, and then there is one slice left to search.
    """
    size = x.shape[-1]
    whole = size // SLICE * SLICE
    if whole < 8 * SLICE or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.max(dim=-1)
    tops = x[..., :whole].unflatten(-1, (-1, SLICE)).amax(dim=-1)
    if whole < size:
        tops = torch.cat([tops, x[..., whole:].amax(dim=-1, keepdim=True)], dim=-1)
    best, which = tops.max(dim=-1)
    places = (which[..., None] * SLICE + torch.arange(SLICE)).clamp(max=size - 1)
    return best, which * SLICE + x.gather(-1, places).argmax(dim=-1)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Numbers as they are computed with: float32, or more where they are given so."""
    return x if x.dtype == torch.float64 else x.float()
