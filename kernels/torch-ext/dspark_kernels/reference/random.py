"""Random numbers that are a function of a seed and a counter: Philox 4x32 with 7 rounds (Salmon et al., SC 2011)."""

import torch

ROUNDS = 7
# Which of a seed's streams of numbers a draw takes.
RACE, ACCEPT = 0, 1
_LOW = 0xFFFFFFFF
_MULTIPLY = 0xD2511F53, 0xCD9E8D57
_ADD = 0x9E3779B9, 0xBB67AE85


def philox(seeds: torch.Tensor, counters: torch.Tensor, stream: int) -> tuple[torch.Tensor, ...]:
    """Four numbers [R, n] below 2^32, as int64, for seeds [R] int64 and counters [n]."""
    keys = [(seeds & _LOW)[:, None], ((seeds >> 32) & _LOW)[:, None]]
    zeros = torch.zeros(len(seeds), len(counters), dtype=torch.int64, device=seeds.device)
    c = [counters.long() + zeros, zeros + stream, zeros, zeros]
    for _ in range(ROUNDS):
        # Products wrap around in 64 bits, which leaves their bits right.
        a, b = c[0] * _MULTIPLY[0], c[2] * _MULTIPLY[1]
        c = [(b >> 32 & _LOW) ^ c[1] ^ keys[0], b & _LOW, (a >> 32 & _LOW) ^ c[3] ^ keys[1], a & _LOW]
        keys = [(key + add) & _LOW for key, add in zip(keys, _ADD, strict=True)]
    return tuple(c)


def uniform(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers below 2^32 to float32 in (0, 1]; close to 0 no two are the same."""
    return (numbers.float() + 0.5) * 2.0**-32


def exponential(seeds: torch.Tensor, count: int, stream: int = RACE) -> torch.Tensor:
    """[R, count] draws of the exponential distribution: v is lane v // Q of counter v % Q, with Q = ceil(count / 4)."""
    quarter = -(-count // 4)
    lanes = philox(seeds, torch.arange(quarter, device=seeds.device), stream)
    u = uniform(torch.cat(lanes, dim=1)[:, :count])
    # -log(1 - u); the series where 1 - u would round u away.
    series = u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    return torch.where(u < 0.01, series, -torch.log(1 - u))
