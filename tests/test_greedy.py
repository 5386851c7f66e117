"""Greedy decoding with a head gives what plain `generate` gives."""

import json
from pathlib import Path

import pytest
import torch
from conftest import GSM8K_SAMPLE, tiny_head, tiny_target
from shares import rest_slow
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import dspark_hf
from dspark_hf.evaluation.prompts import encode
from dspark_hf.generation.hook import stock_loop

GSM8K_TEST = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"


@pytest.fixture(scope="module")
def pair():
    return dspark_hf.embedded_pair(dtype=torch.float32)


def questions(path: Path, count: int) -> list[str]:
    return [json.loads(line)["question"] for line in path.read_text().splitlines()[:count]]


def check_identical(pair, prompts, batch_size, max_new_tokens):
    model, head, tokenizer = pair
    for start in range(0, len(prompts), batch_size):
        inputs = encode(prompts[start : start + batch_size], tokenizer, model.device)
        plain = model.generate(**inputs, max_new_tokens=max_new_tokens)
        ours = model.generate(**inputs, max_new_tokens=max_new_tokens, assistant_model=head)
        assert ours.dtype == plain.dtype
        assert ours.tolist() == plain.tolist(), f"prompts {start} to {start + batch_size}"


@pytest.mark.parametrize(
    ("batch_size", "count"),
    [(1, 2), (3, 6), *(pytest.param(*own, marks=pytest.mark.slow) for own in [(1, 8), (3, 24), (8, 24)])],
)
def test_embedded_pair_on_gsm8k(pair, batch_size, count):
    check_identical(pair, questions(GSM8K_SAMPLE, count), batch_size, 96)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_embedded_pair_on_200_prompts(pair, batch_size):
    check_identical(pair, questions(GSM8K_TEST, 200), batch_size, 128)


def test_batch_of_64(pair):
    model, head, _ = pair
    ids = torch.randint(5, 4000, (64, 6))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 24}
    assert torch.equal(model.generate(**kwargs, assistant_model=head), model.generate(**kwargs))


@pytest.mark.parametrize("head_type", rest_slow(["vanilla", "gated", "rnn", None], quick=["vanilla", "rnn"]))
@pytest.mark.parametrize("eos_token_id", [None, 3, [3, 7]])
def test_untrained_head(head_type, eos_token_id):
    """Most drafts fail: rows reject in every position, and end in different rounds."""
    target = tiny_target(vocab_size=24, sharpness=4)
    head = tiny_head(target, markov_head_type=head_type, markov_rank=8 if head_type else 0)
    ids, mask = torch.randint(1, 24, (5, 9)), torch.ones(5, 9, dtype=torch.long)
    for row, padding in enumerate([0, 3, 8, 1, 0]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    kwargs = {"input_ids": ids, "attention_mask": mask, "eos_token_id": eos_token_id, "do_sample": False}
    for limit in ({"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_new_tokens": 40}, {"max_length": 30}):
        plain = target.generate(**kwargs, **limit)
        assert torch.equal(target.generate(**kwargs, **limit, assistant_model=head), plain)


def test_stock_loop_with_our_candidates_gives_the_same_tokens(vanilla):
    target, head = vanilla.target(), vanilla.head()
    for prompt in vanilla.expected["prompts"]:
        kwargs = {"input_ids": torch.tensor([prompt["input_ids"]]), "max_new_tokens": 48, "do_sample": False}
        ours = target.generate(**kwargs, assistant_model=head)
        with stock_loop():
            stock = target.generate(**kwargs, assistant_model=head)
        assert torch.equal(stock, ours)
        assert ours[0].tolist() == prompt["generate_ids"][: ours.shape[1]]


def test_stock_loop_drafts_more_than_one_token_a_pass(vanilla):
    """The stock loop really verifies our blocks: it calls the target far less often than once a token."""
    target, head = vanilla.target(), vanilla.head()
    calls = []
    target.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([vanilla.expected["prompts"][1]["input_ids"]])
    with stock_loop():
        target.generate(input_ids=ids, max_new_tokens=48, do_sample=False, assistant_model=head)
    assert len(calls) < 24


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer_gets_the_tokens_of_every_round(vanilla):
    target, head = vanilla.target(), vanilla.head()
    prompt = vanilla.expected["prompts"][0]
    recorder = Recorder()
    output = target.generate(
        input_ids=torch.tensor([prompt["input_ids"]]),
        assistant_model=head,
        max_new_tokens=40,
        do_sample=False,
        streamer=recorder,
        return_dict_in_generate=True,
    )
    prompt_put, first, *rounds = recorder.puts
    assert prompt_put == prompt["input_ids"] and len(first) == 1 and recorder.ended
    assert [len(put) for put in rounds] == output.dspark.committed_lengths[0]
    assert sum(recorder.puts, []) == output.sequences[0].tolist()


def test_text_streamers(pair, capsys):
    model, head, tokenizer = pair
    inputs = encode(["Tom has 3 apples and buys 4 more. How many apples does he have?"], tokenizer, model.device)
    width = inputs["input_ids"].shape[1]
    sequences = model.generate(**inputs, max_new_tokens=40)
    text = tokenizer.decode(sequences[0, width:], skip_special_tokens=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=40, assistant_model=head, streamer=streamer)
    assert capsys.readouterr().out.strip() == text.strip()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=40, assistant_model=head, streamer=streamer)
    assert "".join(streamer) == text


def test_statistics_add_up(vanilla):
    target, head = vanilla.target(), vanilla.head()
    ids = torch.tensor([prompt["input_ids"][-5:] for prompt in vanilla.expected["prompts"]])
    output = target.generate(
        input_ids=ids, assistant_model=head, max_new_tokens=40, do_sample=False, return_dict_in_generate=True
    )
    stats = output.dspark
    for row, lengths in enumerate(stats.committed_lengths):
        new = [token for token in output.sequences[row, 5:].tolist() if token != target.config.pad_token_id]
        # The first token is the prefill's and belongs to no round.
        assert sum(lengths) + 1 == len(new)
        assert stats.accepted[row] + len(lengths) == sum(lengths)
        assert stats.accepted[row] <= stats.verified[row] <= stats.drafted[row]
    assert stats.rounds == max(map(len, stats.committed_lengths))
    assert sum(stats.accepted_at) == sum(stats.accepted) and sum(stats.drafted_at) == sum(stats.drafted)
    assert stats.verified_at == sorted(stats.verified_at, reverse=True)
    rounds = sum(map(len, stats.committed_lengths))
    assert stats.tau == pytest.approx(sum(map(sum, stats.committed_lengths)) / rounds)
    assert min(stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds, stats.other_seconds) > 0
