"""Caches: continued from plain generate, returned to it, and handed from turn to turn."""

import pytest
import torch
from conftest import tiny_head, tiny_target
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from dspark_hf.generation.releases import CACHE

GREEDY = {"do_sample": False, "return_dict_in_generate": True}


def sliding_target():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, initializer_range=0.2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["full", "sliding"])
def pair(request):
    target = tiny_target(vocab_size=24, sharpness=3) if request.param == "full" else sliding_target()
    return target, tiny_head(target)


def turns(target, helpers, prompts, **kwargs):
    """A conversation of several turns that hands the cache on; helper i (a head or `None`) decodes turn i."""
    sequences, cache = None, None
    for helper, prompt in zip(helpers, prompts, strict=True):
        ids = prompt if sequences is None else torch.cat([sequences, prompt], dim=1)
        extra = {} if helper is None else {"assistant_model": helper}
        output = target.generate(input_ids=ids, **{CACHE: cache}, max_new_tokens=9, **GREEDY, **extra, **kwargs)
        sequences, cache = output.sequences, output[CACHE]
    return output


PROMPTS = [torch.tensor([[3, 9, 4, 7]]), torch.tensor([[5, 2]]), torch.tensor([[11, 8, 1]])]


@pytest.mark.parametrize("pattern", ["hhh", "php", "hph", "phh", "hhp"])
def test_turns_with_and_without_a_head(pair, pattern):
    target, head = pair
    expected = turns(target, [None] * 3, PROMPTS)
    found = turns(target, [head if letter == "h" else None for letter in pattern], PROMPTS)
    assert torch.equal(found.sequences, expected.sequences)
    assert found[CACHE].get_seq_length() == expected[CACHE].get_seq_length()
    for a, b in zip(found[CACHE].layers, expected[CACHE].layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)


def test_the_head_remembers_what_it_knew(vanilla):
    """A continued turn accepts as much as one that starts with the whole text."""
    target, head = vanilla.target(), vanilla.head()
    ids = torch.tensor([vanilla.expected["prompts"][1]["generate_ids"]])
    first = target.generate(input_ids=ids[:, :20], max_new_tokens=9, assistant_model=head, **GREEDY)
    longer = torch.cat([first.sequences, torch.tensor([[5, 6]])], dim=1)
    afresh = target.generate(input_ids=longer, max_new_tokens=30, assistant_model=head, **GREEDY)
    cache = first[CACHE]
    ours = target.generate(input_ids=longer, **{CACHE: cache}, max_new_tokens=30, assistant_model=head, **GREEDY)
    assert torch.equal(ours.sequences, afresh.sequences)
    assert ours.dspark.committed_lengths == afresh.dspark.committed_lengths


def test_a_given_cache_is_brought_up_to_date(pair):
    """As in chat loops that pass the same cache object every turn."""
    target, head = pair
    expected = turns(target, [None, None], PROMPTS[:2]).sequences
    cache = DynamicCache(config=target.config)
    kwargs = {CACHE: cache, "max_new_tokens": 9, "do_sample": False, "assistant_model": head}
    sequences = target.generate(input_ids=PROMPTS[0], **kwargs)
    assert cache.get_seq_length() == sequences.shape[1] - 1
    assert torch.equal(target.generate(input_ids=torch.cat([sequences, PROMPTS[1]], dim=1), **kwargs), expected)


def test_only_new_tokens_with_the_mask_of_all(pair):
    target, head = pair
    first = target.generate(input_ids=PROMPTS[0], max_new_tokens=9, assistant_model=head, **GREEDY)
    new = torch.cat([first.sequences[:, -1:], PROMPTS[1]], dim=1)
    mask = torch.ones(1, first.sequences.shape[1] + 2, dtype=torch.long)
    full = target.generate(input_ids=torch.cat([first.sequences, PROMPTS[1]], dim=1), max_new_tokens=9, do_sample=False)
    found = target.generate(
        input_ids=new, attention_mask=mask, **{CACHE: first[CACHE]}, max_new_tokens=9, do_sample=False,
        assistant_model=head,
    )  # fmt: skip
    assert found[0, 3:].tolist() == full[0, -9:].tolist()


@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE}))
@pytest.mark.parametrize("given", ["all tokens", "new tokens with the mask of all"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_cache_by_every_name_that_the_release_takes(pair, name, given):
    """Filled by a pass of the caller's; afterwards it holds as many tokens as plain decoding leaves in it."""
    target, head = pair
    first = target.generate(input_ids=PROMPTS[0], max_new_tokens=9, do_sample=False)
    whole = torch.cat([first, PROMPTS[1]], dim=1)
    ids = whole if given == "all tokens" else whole[:, first.shape[1] - 1 :]

    def follow(**kwargs):
        cache = DynamicCache(config=target.config)
        with torch.no_grad():
            target(input_ids=first[:, :-1], **{CACHE: cache}, use_cache=True)
        kwargs |= {"attention_mask": torch.ones_like(whole), name: cache, "max_new_tokens": 8, "do_sample": False}
        return target.generate(input_ids=ids, **kwargs)[0, ids.shape[1] :].tolist(), cache.get_seq_length()

    assert follow(assistant_model=head) == follow()


@pytest.mark.parametrize("pattern", ["hh", "ph", "hp"])
def test_batch_of_padded_rows(pattern):
    target = tiny_target(vocab_size=24, sharpness=3)
    head = tiny_head(target)
    ids, mask = torch.randint(4, 24, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    more = torch.randint(4, 24, (3, 2))

    def two_turns(pattern):
        helpers = [{"assistant_model": head} if letter == "h" else {} for letter in pattern]
        first = target.generate(input_ids=ids, attention_mask=mask, max_new_tokens=9, **GREEDY, **helpers[0])
        longer = torch.cat([first.sequences, more], dim=1)
        wider = torch.cat([mask, torch.ones(3, 11, dtype=torch.long)], dim=1)
        return target.generate(
            input_ids=longer, attention_mask=wider, **{CACHE: first[CACHE]}, max_new_tokens=9, **GREEDY,
            **helpers[1],
        ).sequences  # fmt: skip

    assert torch.equal(two_turns(pattern), two_turns("pp"))


def test_no_cache_when_none_is_wanted(pair):
    target, head = pair
    output = target.generate(input_ids=PROMPTS[0], max_new_tokens=5, use_cache=False, assistant_model=head, **GREEDY)
    assert output.get(CACHE) is None


@pytest.mark.parametrize("limit", [1, 2])
def test_short_turns(pair, limit):
    target, head = pair
    output = target.generate(input_ids=PROMPTS[0], max_new_tokens=limit, assistant_model=head, **GREEDY)
    longer = torch.cat([output.sequences, PROMPTS[1]], dim=1)
    plain = target.generate(input_ids=longer, max_new_tokens=9, do_sample=False)
    cache = output[CACHE]
    found = target.generate(input_ids=longer, **{CACHE: cache}, max_new_tokens=9, do_sample=False, assistant_model=head)
    assert torch.equal(found, plain)
