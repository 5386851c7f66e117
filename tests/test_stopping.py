"""Rows end at the token where plain `generate` ends them, also inside an accepted block."""

import pytest
import torch
from conftest import tiny_head, tiny_target
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


class AfterPair(StoppingCriteria):
    """Ends a row when its last two tokens sum to a multiple of five."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] + input_ids[:, -2]) % 5 == 0


class NoRepeat(LogitsProcessor):
    """Forbids the last token: looks at the prefix, so that every position needs its own."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(vocab_size=12, sharpness=6)
    return target, tiny_head(target)


@pytest.mark.parametrize("seed", range(6))
def test_user_criteria_and_processors(pair, seed):
    target, head = pair
    torch.manual_seed(seed)
    ids = torch.randint(1, 12, (1, 5))
    kwargs = {
        "input_ids": ids,
        "max_new_tokens": 30,
        "do_sample": False,
        "stopping_criteria": StoppingCriteriaList([AfterPair()]),
        "logits_processor": LogitsProcessorList([NoRepeat()]),
    }
    plain = target.generate(**kwargs)
    assert torch.equal(target.generate(**kwargs, assistant_model=head), plain)


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}])
def test_processors_that_look_at_the_prefix(pair, settings):
    target, head = pair
    ids, mask = torch.randint(1, 12, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "eos_token_id": 3, "do_sample": False}
    plain = target.generate(**kwargs, **settings)
    assert torch.equal(target.generate(**kwargs, **settings, assistant_model=head), plain)
