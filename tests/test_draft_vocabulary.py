"""A head that drafts from a part of the vocabulary: the same tokens as without it, or the same distribution."""

import pytest
import test_sampling
import torch
from conftest import tiny_head, tiny_target
from test_sampling import PROMPTS, VOCABULARY, draw, exact_distribution, p_value
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

DRAFTED = [0, 1, 2, 5, 8, 11, 13, 14]


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(VOCABULARY, sharpness=2)
    head = tiny_head(target, draft_vocab_size=len(DRAFTED))
    head.d2t.copy_(torch.tensor(DRAFTED) - torch.arange(len(DRAFTED)))
    return target, head


def test_the_target_has_tokens_outside(pair):
    """Enough of them that exactness depends on how they are handled."""
    p = exact_distribution(pair[0], PROMPTS[0], []).sum(dim=(1, 2))
    assert 0.2 < p[DRAFTED].sum() < 0.8


@pytest.mark.parametrize(("kwargs", "warpers"), [({}, []), ({"top_p": 0.8}, [TopPLogitsWarper(0.8)])])
def test_sampling_is_exact(pair, kwargs, warpers, monkeypatch):
    target, head = pair
    monkeypatch.setattr(test_sampling, "DRAWS", 6000)
    for prompt, tokens in zip(PROMPTS, draw(target, head, list(PROMPTS), **kwargs), strict=True):
        assert p_value(tokens, exact_distribution(target, prompt, warpers)) > 1e-4


def test_drafts_lie_inside_and_some_are_accepted(pair):
    target, head = pair
    logits = torch.randn(5, len(DRAFTED))
    whole = head.in_target_vocabulary(logits, head.share_embeddings(target))
    outside = sorted(set(range(VOCABULARY)) - set(DRAFTED))
    torch.testing.assert_close(whole[:, DRAFTED], logits)
    assert (whole.softmax(-1)[:, outside] == 0).all()
    ids = torch.tensor([PROMPTS[0]]).repeat(100, 1)
    output = target.generate(
        input_ids=ids, do_sample=True, top_k=0, max_new_tokens=8, assistant_model=head, return_dict_in_generate=True
    )
    assert 0.05 < sum(output.dspark.accepted) / sum(output.dspark.verified) < 0.95


class Only(LogitsProcessor):
    """Leaves nothing but the given tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.tokens] = scores[:, self.tokens]
        return kept


@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_that_leave_only_tokens_outside(pair, do_sample):
    """There is nothing sensible to draft, and the output is the target's all the same."""
    target, head = pair
    processors = LogitsProcessorList([Only([3, 4])])
    kwargs = {"max_new_tokens": 12, "logits_processor": processors, "top_k": 0, "eos_token_id": None}
    ids = torch.tensor([PROMPTS[0]])
    with_head = target.generate(input_ids=ids, assistant_model=head, do_sample=do_sample, **kwargs)
    assert set(with_head[0, ids.shape[1] :].tolist()) <= {3, 4}
    if not do_sample:
        assert torch.equal(with_head, target.generate(input_ids=ids, do_sample=False, **kwargs))


def test_a_borrowed_lm_head_gives_the_rows_that_are_drafted(pair):
    target, head = pair
    hidden = torch.randn(2, 3, 32)
    expected = target.lm_head(hidden)[..., DRAFTED]
    torch.testing.assert_close(head.base_logits(hidden, head.share_embeddings(target)), expected)
