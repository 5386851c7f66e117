"""Counter-based random numbers: known answers, and distributions."""

# ruff: isort: skip_file

from interpreter import DEVICE
import scipy.stats
import torch
from dspark_kernels.reference import random


def test_known_answers_of_philox(monkeypatch):
    """Random123's test vectors of philox4x32 with 7 rounds (kat_vectors): counter and key zero, and all ones."""
    zero = torch.zeros(1, dtype=torch.int64)
    found = random.philox(zero, zero, 0)
    assert [int(x) for x in found] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_numbers_are_uniform_and_exponential():
    seeds = torch.arange(4, device=DEVICE)
    u = random.uniform(torch.cat(random.philox(seeds, torch.arange(20_000, device=DEVICE), 0), dim=1)).flatten().cpu()
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    e = random.exponential(seeds, 50_001).flatten().cpu()
    assert scipy.stats.kstest(e, "expon").pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack([e[:-1], e[1:]]))[0, 1]) < 0.01
