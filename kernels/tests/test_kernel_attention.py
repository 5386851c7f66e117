"""The ragged attention kernel against its reference."""

# ruff: isort: skip_file

from interpreter import CASES, DEVICE, spaced
import pytest
import torch
from dspark_kernels import attention
from dspark_kernels.reference import attention as reference
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True, scope="module")
def many_slices():
    """Short slices, so that short contexts have several of several tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SLICE", 32)
        patch.setattr(attention, "TILE", 16)
        yield


cases = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 3),
        "kv_heads": st.integers(1, 2),
        "groups": st.integers(1, 4),
        "queries": st.integers(1, 6),
        "width": st.sampled_from([8, 16, 24, 64]),
        "capacity": st.integers(6, 150),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "seed": st.integers(0, 2**31),
    }
)


def inputs(rows, kv_heads, groups, queries, width, capacity, dtype, seed):
    """Views of a larger cache; what lies behind a row's last token is NaN."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, queries, kv_heads * groups, width, generator=g).to(dtype).transpose(1, 2)
    cache = torch.randn(2, rows, kv_heads, capacity + 9, width, generator=g).to(dtype)
    starts = torch.randint(capacity - queries + 1, (rows,), generator=g)
    counts = torch.randint(queries + 1, (rows,), generator=g)
    behind = torch.arange(capacity + 9) >= (starts + counts)[:, None]
    cache = cache.masked_fill(behind[None, :, None, :, None], float("nan"))
    key, value = cache[:, :, :, :capacity]
    sinks = torch.randn(kv_heads * groups, generator=g)
    return [x.to(DEVICE) for x in (query, key, value, spaced(starts), spaced(counts), sinks)]


@settings(max_examples=2 * CASES, deadline=None)
@given(cases, st.sampled_from([None, 1, 5, 40]), st.booleans())
def test_is_its_reference(case, window, has_sinks):
    query, key, value, starts, counts, sinks = inputs(**case)
    args = query, key, value, starts, counts, 0.3, window, sinks if has_sinks else None
    found, clean = attention.ragged_attention(*args), [x.nan_to_num() for x in (key, value)]
    expected = reference.ragged_attention(query, *clean, *args[3:])
    # Weights are rounded to the dtype before they meet the values.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case["dtype"]]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_the_reference_is_sdpa_with_a_mask():
    query, key, value, starts, counts, _ = inputs(2, 2, 3, 4, 16, 50, torch.float32, 1)
    key, value, counts = key.nan_to_num(), value.nan_to_num(), torch.full_like(counts, 4)
    slots = starts[:, None] + torch.arange(4, device=DEVICE)
    at = torch.arange(50, device=DEVICE)
    mask = (at <= slots[..., None]) & (at > slots[..., None] - 7)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[:, None], scale=0.2, enable_gqa=True
    )
    found = reference.ragged_attention(query, key, value, starts, counts, 0.2, window=7)
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
