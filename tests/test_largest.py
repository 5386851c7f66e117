"""The argmax of a large vocabulary in two stages is torch's."""

import pytest
import torch
from dspark_kernels.reference import SLICE, largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 8 * SLICE - 1, 8 * SLICE, 9 * SLICE + 7])
def test_as_torch(size, dtype):
    # So few values that the largest is there more than once.
    x = torch.randint(0, 50, (4, 3, size)).to(dtype)
    best, places = largest(x)
    assert best.equal(x.amax(dim=-1))
    first = (x == best[..., None]).long().argmax(dim=-1)
    assert places.equal(first)


@pytest.mark.parametrize("place", [0, 2 * SLICE + 3, 9 * SLICE + 6])
def test_values_that_are_none(place):
    x = torch.zeros(2, 9 * SLICE + 7)
    x[0] = -torch.inf
    x[1, place] = torch.nan
    best, places = largest(x)
    assert best[0] == -torch.inf and places[0] == 0
    assert best[1].isnan() and places[1] == place
