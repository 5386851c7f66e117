"""The same in torch: what the kernels are tested against, and what runs where they do not."""

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """Numbers as they are computed with: float32, or more where they are given so."""
    return x if x.dtype == torch.float64 else x.float()
