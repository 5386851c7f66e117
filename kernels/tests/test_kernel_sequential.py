"""The sequential kernels against their references."""

# ruff: isort: skip_file

from interpreter import CASES, DEVICE, spaced, strided
import pytest
import torch
from dspark_kernels import INVALID, sequential
from dspark_kernels.reference import sequential as reference
from dspark_kernels.reference.random import RACE, exponential
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
cases = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 18),
        "positions": st.integers(1, 3),
        "vocabulary": st.integers(1, 300),
        "rank": st.integers(1, 40),
        "dtype": st.sampled_from(DTYPES),
        "how": st.integers(0, 3),
        "seed": st.integers(0, 2**31),
    }
)


def inputs(rows, positions, vocabulary, rank, dtype, how, seed):
    g = torch.Generator().manual_seed(seed)
    base = strided((torch.randn(rows, positions, vocabulary, generator=g) * 3).to(dtype), how)
    w1, w2 = (torch.randn(vocabulary, rank, generator=g).to(dtype) for _ in range(2))
    anchors = torch.randint(vocabulary, (rows,), generator=g)
    seeds = torch.randint(2**62, (rows,), generator=g)
    return [x.to(DEVICE) for x in (base, w1, w2, spaced(anchors), spaced(seeds))]


@settings(max_examples=CASES, deadline=None)
@given(cases, st.booleans(), st.sampled_from([0.6, 1.0, 1.5]))
def test_block_is_its_reference(case, sample, temperature):
    base, w1, w2, anchors, seeds = inputs(**case)
    args = base, w1, w2, anchors, seeds if sample else None, temperature
    tokens, logits = sequential.sample_block(*args)
    expected, expected_logits = reference.sample_block(*args)
    # Products are summed in another order: where two scores are that close, either token may win, and the rest of the
    # block follows it.
    for r in range(len(tokens)):
        wrong = (tokens[r] != expected[r]).nonzero()
        same = int(wrong[0]) if len(wrong) else tokens.shape[1]
        if sample:
            torch.testing.assert_close(logits[r, :same], expected_logits[r, :same], atol=1e-3, rtol=1e-4)
        if len(wrong):
            before = expected[r, same - 1] if same else anchors[r]
            best = (base[r, same].float() + w1[before].float() @ w2.float().T) / temperature
            if sample:
                best = best - exponential(seeds[r : r + 1], base.shape[2], RACE + 2 + same)[0].log()
            assert best[expected[r, same]] - best[tokens[r, same]] < 1e-3


@settings(max_examples=CASES, deadline=None)
@given(cases, st.booleans())
def test_position_is_its_reference(case, sample):
    base, w1, w2, anchors, seeds = inputs(**case)
    args = base[:, 0], w1[anchors], w2, seeds if sample else None
    found, expected = sequential.sample_position(*args), reference.sample_position(*args)
    assert (found[0] != expected[0]).sum() == 0
    if sample:
        torch.testing.assert_close(found[1], expected[1], atol=1e-3, rtol=1e-4)
    else:
        assert found[1] is expected[1] is None


@pytest.mark.parametrize("module", [sequential, reference])
@pytest.mark.parametrize("sample", [False, True])
def test_what_is_no_distribution_is_flagged(module, sample):
    base, w1, w2, anchors, seeds = inputs(3, 3, 40, 8, torch.float32, 0, 0)
    base[0, 1, 7] = float("nan")
    base[1, 0] = -float("inf")
    tokens, _ = module.sample_block(base, w1, w2, anchors, seeds if sample else None)
    assert (tokens == INVALID).tolist() == [[False, True, True], [True, True, True], [False, False, False]]


def test_tokens_are_distributed_as_the_logits_say():
    """5,000 draws of one position."""
    draws, vocabulary = 5000, 7
    base, w1, w2, _, _ = inputs(1, 1, vocabulary, 4, torch.float32, 0, 5)
    anchors = torch.full((draws,), 2, device=DEVICE)
    tokens, _ = sequential.sample_block(
        base.expand(draws, -1, -1), w1, w2, anchors, torch.arange(draws, device=DEVICE), 2.0
    )
    p = ((base[0, 0] + w1[2] @ w2.T) / 2.0).double().softmax(0)
    seen = torch.bincount(tokens[:, 0], minlength=vocabulary)
    # The 0.9999 quantile of chi squared with 6 degrees of freedom.
    assert ((seen - draws * p) ** 2 / (draws * p)).sum() < 27.9
