"""Rows end at the token where plain `generate` ends them, also inside an accepted block."""

import pytest
import torch
from conftest import tiny_head, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dspark_hf.generation.releases import CACHE


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


class Budgets(StoppingCriteria):
    """Knows the rows by their place: each has so many tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] - 5 >= most for most in [4, 9, 14][: len(input_ids)]])


class AllWrote(StoppingCriteria):
    """Keeps a list of the rows that have written a token, and ends the call when all have."""

    def __init__(self):
        self.done = None

    def __call__(self, input_ids, scores, **kwargs):
        self.done = self.done or [False] * len(input_ids)
        self.done = [done or token == 7 for done, token in zip(self.done, input_ids[:, -1].tolist(), strict=True)]
        return torch.full((len(input_ids),), all(self.done))


class Sure(StoppingCriteria):
    """Reads the scores, which plain `generate` hands over where the call asks for them."""

    def __call__(self, input_ids, scores, **kwargs):
        assert len(scores) == input_ids.shape[1] - 5
        return scores[-1].softmax(dim=-1).amax(dim=-1) > 0.97


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("eos_token_id", [None, 11])
@pytest.mark.parametrize("make", [Budgets, AllWrote, Sure])
def test_criteria_see_the_batch_as_in_plain(pair, make, eos_token_id, rows):
    target, head = pair
    kwargs = {
        "input_ids": torch.randint(1, 12, (rows, 5)),
        "max_new_tokens": 30,
        "do_sample": False,
        "eos_token_id": eos_token_id,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    plain = target.generate(**kwargs, stopping_criteria=StoppingCriteriaList([make()]))
    ours = target.generate(**kwargs, stopping_criteria=StoppingCriteriaList([make()]), assistant_model=head)
    assert torch.equal(ours.sequences, plain.sequences)
    assert rows > 1 or sum(ours.dspark.drafted) > 0


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}])
def test_processors_that_look_at_the_prefix(pair, settings):
    target, head = pair
    ids, mask = torch.randint(1, 12, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "eos_token_id": 3, "do_sample": False}
    plain = target.generate(**kwargs, **settings)
    assert torch.equal(target.generate(**kwargs, **settings, assistant_model=head), plain)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of twelve words for the pair's vocabulary; transformers' criterion needs one of them to be abcdef."""
    names = ["pad", "abcdef", *"abcdefghij"]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="pad"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="pad")


@pytest.mark.parametrize("stop_strings", [["a"], ["b", "h"], ["c d"], ["e", "f g"]])
@pytest.mark.parametrize(("rows", "eos_token_id"), [(1, None), (3, 11), (3, None)])
def test_stop_strings(pair, words, stop_strings, rows, eos_token_id):
    target, head = pair
    kwargs = {
        "input_ids": torch.randint(1, 12, (rows, 4)),
        "stop_strings": stop_strings,
        "tokenizer": words,
        "max_new_tokens": 30,
        "do_sample": False,
        # Without one, plain decoding goes on with the rows of a batch that have ended.
        "eos_token_id": eos_token_id,
    }
    assert torch.equal(target.generate(**kwargs, assistant_model=head), target.generate(**kwargs))


def test_max_time(pair):
    """Plain decoding looks at the clock after every token; with no time at all both end after the first."""
    target, head = pair
    kwargs = {"input_ids": torch.tensor([[3, 4, 5]]), "max_time": 0.0, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(target.generate(**kwargs, assistant_model=head), target.generate(**kwargs))


def test_what_was_accepted_behind_the_end_leaves_no_trace(vanilla):
    """A head that is right about everything, and a stop in the middle of its block."""
    target, head = vanilla.target(), vanilla.head()
    prompt = vanilla.expected["prompts"][1]
    ids = torch.tensor([prompt["input_ids"]])
    lengths = prompt["acceptance_lengths"]
    # The third token of the first round that accepts a whole block.
    r = next(i for i, length in enumerate(lengths) if length >= 7)
    end = 1 + sum(lengths[:r]) + 3

    class StopAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= ids.shape[1] + end] * len(input_ids))

    output = target.generate(
        input_ids=ids,
        assistant_model=head,
        max_new_tokens=60,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([StopAt()]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert output.sequences[0].tolist() == prompt["generate_ids"][: ids.shape[1] + end]
    assert output.dspark.committed_lengths[0] == [*lengths[:r], 3]
    assert sum(output.dspark.accepted) == sum(lengths[:r]) - r + 3
    assert len(output.scores) == end
    assert output[CACHE].get_seq_length() == ids.shape[1] + end - 1
