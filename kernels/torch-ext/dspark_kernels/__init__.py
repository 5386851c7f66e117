"""Triton kernels of DSpark decoding: verification, sequential sampling, ragged verify attention.

Every function runs its kernels on CUDA tensors when triton is installed, and the same in torch otherwise;
`DSPARK_KERNELS=off` in the environment forces torch. Random numbers are a function of the seeds that are passed
(Philox 4x32-7), the same in both. `import dspark_kernels` needs torch only.
"""

from .dispatch import (
    INVALID,
    LARGEST_BLOCK,
    ragged_attention,
    random_seeds,
    sample_block,
    sample_position,
    uses_kernels,
    verify_greedy,
    verify_sampled,
)

__all__ = [
    "INVALID",
    "LARGEST_BLOCK",
    "ragged_attention",
    "random_seeds",
    "sample_block",
    "sample_position",
    "uses_kernels",
    "verify_greedy",
    "verify_sampled",
]
