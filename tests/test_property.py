"""Whatever is asked of `generate`, a head changes nothing: cases drawn at random, compared with plain decoding.

50 cases by default; DSPARK_CASES=500 draws more.
"""

import functools
import os
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from conftest import FixedCosts, lengths_compared, shuffled_scheduler, tiny_head, tiny_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hybrids import KINDS
from test_hybrids import build as hybrid
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dspark_hf.generation import experience, generate

VOCABULARY = 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}


# Beside those of attention one of each kind of recurrent or convolutional layer.
FAMILIES = ["qwen3", "llama", "mistral", "gpt-neox", *KINDS]


@functools.cache
def target_of(family: str):
    if family in KINDS:
        return hybrid(family, vocab_size=VOCABULARY)
    torch.manual_seed(3)
    if family == "qwen3":
        return tiny_target(vocab_size=VOCABULARY, sharpness=3)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)).eval()
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval()


@functools.cache
def head_of(family: str, head_type: str | None, block_size: int):
    rank = 8 if head_type else 0
    return tiny_head(target_of(family), block_size=block_size, markov_head_type=head_type, markov_rank=rank)


class SumStop(StoppingCriteria):
    """Ends a row when its last two tokens sum to a multiple of `divisor`."""

    def __init__(self, divisor: int):
        self.divisor = divisor

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] + input_ids[:, -2]) % self.divisor == 0


PROCESSORS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "min_new_tokens": st.integers(1, 12),
        "suppress_tokens": st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=4, unique=True),
        "bad_words_ids": st.just([[3], [5, 6]]),
        "sequence_bias": st.just({(4,): 2.0, (5, 6): 4.0}),
    },
)
LIMITS = st.one_of(
    st.builds(lambda n: {"max_new_tokens": n}, st.integers(1, 30)),
    st.builds(lambda n: {"max_length": n}, st.integers(11, 40)),
)


@contextmanager
def load(head):
    head.generation_config.num_assistant_tokens_schedule = "load"
    yield
    head.generation_config.num_assistant_tokens_schedule = "constant"


@contextmanager
def shuffled(head):
    with mock.patch.object(generate, "scheduler_for", shuffled_scheduler):
        yield


@contextmanager
def load_that_pays(head, ahead=False):
    """The load schedule with step costs under which it drafts, on a device that runs ahead of the host or not."""
    costs = FixedCosts(head.config.gamma)
    with (
        load(head),
        mock.patch.object(experience, "costs_of", lambda *args: costs),
        mock.patch.object(experience, "runs_ahead", lambda device: ahead),
    ):
        yield


SCHEDULES = [nullcontext, shuffled, load, load_that_pays, functools.partial(load_that_pays, ahead=True)]


@given(data=st.data())
@settings(
    max_examples=int(os.environ.get("DSPARK_CASES", 50)),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_a_head_changes_nothing(data):
    family = data.draw(st.sampled_from(FAMILIES))
    head_type = data.draw(st.sampled_from(["vanilla", "gated", "rnn", None]))
    target, head = target_of(family), head_of(family, head_type, data.draw(st.integers(1, 8)))
    lengths = data.draw(st.lists(st.integers(2, 10), min_size=1, max_size=5))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = torch.randint(1, VOCABULARY, (length,)), 1
    kwargs = {"input_ids": ids, "attention_mask": mask, "do_sample": False}
    kwargs |= data.draw(PROCESSORS) | data.draw(LIMITS)
    if kwargs.get("no_repeat_ngram_size") == 1:
        # Longer texts may come to where no token is left, which is an error with a head.
        kwargs.pop("max_length", None)
        kwargs["max_new_tokens"] = data.draw(st.integers(1, 5))
    kwargs["eos_token_id"] = data.draw(st.sampled_from([None, 7, [3, 11]]))
    divisor = data.draw(st.sampled_from([None, 5, 9]))
    if divisor:
        kwargs["stopping_criteria"] = StoppingCriteriaList([SumStop(divisor)])
    plain = target.generate(**kwargs)
    with data.draw(st.sampled_from(SCHEDULES))(head), lengths_compared():
        ours = target.generate(**kwargs, assistant_model=head)
    assert ours.tolist() == plain.tolist()
