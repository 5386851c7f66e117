"""The verify kernels against their references."""

# ruff: isort: skip_file

from interpreter import CASES, DEVICE, spaced, strided
import pytest
import torch
from dspark_kernels import INVALID, verify
from dspark_kernels.reference import verify as reference
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def many_slices():
    """Small tiles, so that small vocabularies have several slices of several tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "SLICE", 64)
        patch.setattr(verify, "TILE", 32)
        yield


cases = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 3),
        "drafts": st.integers(0, 5),
        "vocabulary": st.integers(1, 300),
        "dtype": st.sampled_from(DTYPES),
        "how": st.integers(0, 3),
        "scale": st.sampled_from([0.1, 1.0, 6.0]),
        "agree": st.floats(0, 1),
        "seed": st.integers(0, 2**31),
    }
)


def inputs(rows, drafts, vocabulary, dtype, how, scale, agree, seed):
    """Logits, drafts of which some are what the target wants, lengths; logits behind the lengths are NaN."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, drafts + 1, vocabulary, generator=g) * scale
    draft = target[:, :-1] + torch.randn(rows, drafts, vocabulary, generator=g) * (1 - agree)
    target, draft = target.to(dtype), draft.to(dtype)
    tokens = torch.randint(vocabulary, (rows, drafts), generator=g)
    wanted = torch.rand(rows, drafts, generator=g) < agree
    tokens = torch.where(wanted, target[:, :-1].argmax(-1), tokens)
    lengths = torch.randint(drafts + 1, (rows,), generator=g)
    place = torch.arange(drafts + 1)
    target = target.masked_fill((place > lengths[:, None])[..., None], float("nan"))
    draft = draft.masked_fill((place[:-1] >= lengths[:, None])[..., None], float("nan"))
    seeds = torch.randint(2**62, (rows,), generator=g)
    target, draft, tokens = (strided(x, how).to(DEVICE) for x in (target, draft, tokens))
    return target, draft, tokens, spaced(lengths.to(DEVICE)), spaced(seeds.to(DEVICE))


@settings(max_examples=CASES, deadline=None)
@given(cases)
def test_greedy_is_its_reference(case):
    target, _, tokens, lengths, _ = inputs(**case)
    found = verify.verify_greedy(target, tokens, lengths)
    for a, b in zip(found, reference.verify_greedy(target, tokens, lengths), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=CASES, deadline=None)
@given(cases)
def test_sampled_is_its_reference(case):
    target, draft, tokens, lengths, seeds = inputs(**case)
    found = verify.verify_sampled(target, draft, tokens, lengths, seeds)
    expected = reference.verify_sampled(target, draft, tokens, lengths, seeds)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("module", [verify, reference])
def test_what_is_no_distribution_is_flagged(module, bad):
    target, draft, tokens, _, seeds = inputs(4, 2, 100, torch.float32, 0, 1.0, 1.0, 0)
    g = torch.Generator().manual_seed(1)
    target, draft = (torch.randn(x.shape, generator=g).to(DEVICE) for x in (target, draft))
    lengths = torch.tensor([2, 2, 1, 0], device=DEVICE)
    # A position that counts of row 0, one behind the length of rows 2 and 3, the draft's of row 1.
    for r, j in ((0, 1), (2, 2), (3, 1)):
        target[r, j, 7 if bad != bad else slice(None)] = bad
    accepted, found = module.verify_greedy(target, tokens, lengths)
    assert (found == INVALID).tolist() == [True, False, False, False] and accepted[0] == 0
    draft[1, 1, 50 if bad != bad else slice(None)] = bad
    accepted, found = module.verify_sampled(target, draft, tokens, lengths, seeds)
    assert (found == INVALID).tolist() == [True, True, False, False] and accepted[:2].tolist() == [0, 0]


def test_residual_of_nothing_falls_back_to_the_target():
    """p = q but for rounding: whatever rejects, the token comes from p."""
    logits = torch.full((1, 2, 8), -30.0, device=DEVICE)
    logits[..., 3] = 30.0
    draft, tokens = logits[:, :1].clone(), torch.tensor([[5]], device=DEVICE)
    draft[..., 5] = -20.0
    for seed in range(5):
        seeds, lengths = torch.tensor([seed], device=DEVICE), torch.tensor([1], device=DEVICE)
        accepted, token = verify.verify_sampled(logits, draft, tokens, lengths, seeds)
        assert accepted.item() == 0 and token.item() == 3


@pytest.mark.slow
def test_committed_tokens_are_distributed_as_the_target_says():
    """Drafts drawn from q, verified against p: the first committed token has distribution p. 5,000 draws."""
    g = torch.Generator().manual_seed(3)
    draws, vocabulary = 5000, 6
    p, q = (torch.randn(vocabulary, generator=g) * 1.5 for _ in range(2))
    tokens = torch.multinomial(q.softmax(0), draws, replacement=True, generator=g)[:, None].to(DEVICE)
    target = p.expand(draws, 2, -1).to(DEVICE)
    draft = q.expand(draws, 1, -1).to(DEVICE)
    lengths, seeds = torch.ones(draws, dtype=torch.long, device=DEVICE), torch.arange(draws, device=DEVICE)
    accepted, token = verify.verify_sampled(target, draft, tokens, lengths, seeds)
    first = torch.where(accepted == 1, tokens[:, 0], token).cpu()
    seen, expected = torch.bincount(first, minlength=vocabulary).double(), draws * p.softmax(0).double()
    statistic = ((seen - expected) ** 2 / expected).sum()
    # The 0.9999 quantile of chi squared with 5 degrees of freedom.
    assert statistic < 25.7
    share = torch.minimum(p.softmax(0), q.softmax(0)).sum()
    assert abs(accepted.double().mean().cpu() - share) < 4 * (share * (1 - share) / draws) ** 0.5
