"""Random numbers inside kernels; `reference.random` has the same in torch."""

import triton
import triton.language as tl

# Rounds and streams, as in `reference.random`.
ROUNDS = tl.constexpr(7)
RACE, ACCEPT = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def numbers(seed, counter, stream):
    """Four uint32 blocks for a block of counters."""
    zero = counter * 0
    return tl.philox(seed, counter, zero + stream, zero, zero, ROUNDS)


@triton.jit
def uniform(number):
    """uint32 to float32 in (0, 1]."""
    return (number.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def exponential(number):
    """uint32 to a draw of the exponential distribution."""
    u = uniform(number)
    series = u * (1 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    return tl.where(u < 0.01, series, -tl.log(1 - u))
