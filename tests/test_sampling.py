"""Sampling with a head: the first three tokens are distributed as the target's own. With --all of 20,000 draws, which
tell a shift of a twentieth in temperature from none; else of 5,000, which tell one of a tenth."""

import itertools
import sys
from weakref import WeakKeyDictionary

import pytest
import torch
from conftest import FixedCosts, tiny_head, tiny_target, whole_blocks
from scipy.stats import chi2
from shares import rest_slow
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark_hf.generation import experience

VOCABULARY, TOKENS, DRAWS, ROWS = 16, 3, 5_000, 500
MANY_DRAWS = 20_000
PROMPTS = ([1, 5, 9, 2], [7, 7, 3], [12, 4, 8, 11, 6, 2])

SETTINGS = {
    "temperature 1": ({}, []),
    "temperature 0.7": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top-k 5": ({"top_k": 5}, [TopKLogitsWarper(5)]),
    "top-p 0.8": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
}


@torch.no_grad()
def exact_distribution(target, prompt: list[int], warpers: list) -> torch.Tensor:
    """[16, 16, 16] probabilities of the three tokens after the prompt, from plain forward passes."""
    prefixes = list(itertools.product(range(VOCABULARY), repeat=TOKENS - 1))
    ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
    logits = target(input_ids=ids).logits[:, len(prompt) - 1 :].float()
    scores = LogitsProcessorList(warpers)(None, logits.flatten(0, 1)) if warpers else logits.flatten(0, 1)
    p = scores.softmax(-1).view(VOCABULARY, VOCABULARY, TOKENS, VOCABULARY).double()
    return p[:1, :1, 0].view(-1, 1, 1) * p[:, :1, 1].view(VOCABULARY, VOCABULARY, 1) * p[:, :, 2]


def draw(target, head, prompts: list[list[int]], **kwargs) -> list[torch.Tensor]:
    """For every prompt [DRAWS, 3] tokens, drawn with the prompts mixed in the rows of one batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts]).repeat(ROWS, 1)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]).repeat(ROWS, 1)
    drawn = []
    for _ in range(DRAWS // ROWS):
        sequences = target.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            assistant_model=head,
            **{"top_k": 0, "eos_token_id": None, "max_new_tokens": TOKENS + 2} | kwargs,
        )
        drawn.append(sequences[:, longest : longest + TOKENS].view(ROWS, len(prompts), TOKENS))
    return list(torch.cat(drawn).unbind(1))


def p_value(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square test of the joint distribution; cells with fewer than five expected draws are pooled."""
    flat = (tokens * torch.tensor([VOCABULARY**2, VOCABULARY, 1])).sum(-1)
    observed = torch.bincount(flat, minlength=VOCABULARY**TOKENS).double()
    wanted = expected.flatten() * len(tokens)
    assert observed[wanted == 0].sum() == 0, "drew a token that the target never gives"
    large = wanted >= 5
    observed = torch.cat([observed[large], observed[~large].sum()[None]])
    wanted = torch.cat([wanted[large], wanted[~large].sum()[None]])
    keep = wanted > 0
    statistic = ((observed - wanted)[keep] ** 2 / wanted[keep]).sum().item()
    return chi2.sf(statistic, int(keep.sum()) - 1)


@pytest.fixture(scope="module")
def pair():
    # Sharp enough that the head's drafts matter, apart enough that many are rejected.
    target = tiny_target(VOCABULARY, sharpness=2)
    return target, tiny_head(target)


@pytest.fixture(autouse=True, params=rest_slow([DRAWS, MANY_DRAWS], quick=[DRAWS]))
def draws(request, monkeypatch) -> int:
    """As many as are drawn."""
    monkeypatch.setattr(sys.modules[__name__], "DRAWS", request.param)
    return DRAWS


# Of one prompt, below, all settings are tried.
@pytest.mark.parametrize(
    "setting",
    rest_slow(["temperature 0.7", "top-p 0.8", "temperature 1", "top-k 5"], quick=["top-p 0.8"]),
)
def test_rows_of_a_batch(pair, setting):
    target, head = pair
    kwargs, warpers = SETTINGS[setting]
    for prompt, tokens in zip(PROMPTS, draw(target, head, list(PROMPTS), **kwargs), strict=True):
        assert p_value(tokens, exact_distribution(target, prompt, warpers)) > 1e-4


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_prompt(pair, setting):
    target, head = pair
    kwargs, warpers = SETTINGS[setting]
    (tokens,) = draw(target, head, [PROMPTS[0]], **kwargs)
    assert p_value(tokens, exact_distribution(target, PROMPTS[0], warpers)) > 1e-4


@pytest.mark.parametrize("setting", rest_slow(["temperature 1", "top-p 0.8"], quick=["temperature 1"]))
def test_a_schedule_that_changes(pair, setting, shuffled):
    """From round to round and from row to row: who drafts, how long, and how much of it is verified."""
    target, head = pair
    kwargs, warpers = SETTINGS[setting]
    for prompt, tokens in zip(PROMPTS, draw(target, head, list(PROMPTS), **kwargs), strict=True):
        assert p_value(tokens, exact_distribution(target, prompt, warpers)) > 1e-4


@pytest.mark.parametrize("ahead", rest_slow([False, True], quick=[True]))
def test_the_load_schedule(pair, ahead, monkeypatch):
    """Lengths from this round's confidence with the early stop, or from earlier rounds' and ranked by this one's."""
    monkeypatch.setattr(experience, "runs_ahead", lambda device: ahead)
    # Two drafts of three are rejected here: they pay only where they cost next to nothing.
    costs = FixedCosts(4, verify=0.01)
    costs.draft = lambda rows, context, pending=0: 0.05 * FixedCosts.draft(costs, rows, context)
    monkeypatch.setattr(experience, "costs_of", lambda head, target, sampled: costs)
    monkeypatch.setattr(experience, "_acceptance", WeakKeyDictionary())
    target, head = pair
    head.generation_config.num_assistant_tokens_schedule = "load"
    try:
        ids = torch.tensor([PROMPTS[0]]).repeat(200, 1)
        output = target.generate(
            input_ids=ids, do_sample=True, top_k=0, max_new_tokens=8, assistant_model=head, return_dict_in_generate=True
        )
        assert len({length for row in output.dspark.verified_lengths for length in row}) > 1
        for prompt, tokens in zip(PROMPTS, draw(target, head, list(PROMPTS)), strict=True):
            assert p_value(tokens, exact_distribution(target, prompt, [])) > 1e-4
    finally:
        whole_blocks(head)


def test_drafts_are_accepted_and_rejected(pair):
    """The tests above exercise both branches."""
    target, head = pair
    ids = torch.tensor([PROMPTS[0]]).repeat(2000, 1)
    output = target.generate(
        input_ids=ids, do_sample=True, top_k=0, max_new_tokens=5, assistant_model=head, return_dict_in_generate=True
    )
    share = sum(output.dspark.accepted) / sum(output.dspark.verified)
    assert 0.1 < share < 0.9


def test_the_test_can_fail(pair, draws):
    """The same draws against a slightly different distribution are told apart."""
    target, head = pair
    (tokens,) = draw(target, head, [PROMPTS[0]])
    shift = 0.95 if draws == MANY_DRAWS else 0.9
    shifted = exact_distribution(target, PROMPTS[0], [TemperatureLogitsWarper(shift)])
    assert p_value(tokens, shifted) < 1e-6


def test_a_seed_reproduces(pair):
    target, head = pair
    kwargs = {"input_ids": torch.tensor([PROMPTS[0]]), "do_sample": True, "max_new_tokens": 30}
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(target.generate(**kwargs, assistant_model=head).tolist())
    assert outputs[0] == outputs[1]
