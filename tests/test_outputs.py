"""Scores, logits, hidden states, attentions: one entry a token, equal to plain `generate`'s."""

import pytest
import torch
from conftest import tiny_head, tiny_target

NAMES = ("scores", "logits", "hidden_states", "attentions")
EVERYTHING = {f"output_{name}": True for name in NAMES} | {"return_dict_in_generate": True, "do_sample": False}


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(vocab_size=24, sharpness=3)
    target.set_attn_implementation("eager")
    return target, tiny_head(target)


def both(pair, **kwargs):
    target, head = pair
    return target.generate(**kwargs, **EVERYTHING), target.generate(**kwargs, **EVERYTHING, assistant_model=head)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.2}])
def test_one_prompt(pair, settings):
    plain, ours = both(pair, input_ids=torch.tensor([[3, 9, 4, 7, 1]]), max_new_tokens=18, **settings)
    assert torch.equal(plain.sequences, ours.sequences)
    for name in NAMES:
        expected, found = getattr(plain, name), getattr(ours, name)
        assert len(expected) == len(found) == 18
        for a, b in zip(expected, found, strict=True):
            if torch.is_tensor(a):
                close(b, a)
            else:
                assert len(a) == len(b)
                for x, y in zip(a, b, strict=True):
                    close(y, x)


def test_batch_with_padding_and_early_ends(pair):
    ids, mask = torch.randint(4, 24, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    paddings = [0, 4, 2]
    for row, padding in enumerate(paddings):
        ids[row, :padding], mask[row, :padding] = 0, 0
    plain, ours = both(pair, input_ids=ids, attention_mask=mask, max_new_tokens=20, eos_token_id=[5, 6, 7])
    assert torch.equal(plain.sequences, ours.sequences)
    new = ours.sequences[:, 7:]
    ends = [next((i + 1 for i, t in enumerate(row) if t in (5, 6, 7)), len(row)) for row in new.tolist()]
    assert min(ends) < max(ends)
    for row, (padding, end) in enumerate(zip(paddings, ends, strict=True)):
        for i in range(end):
            for name in ("scores", "logits"):
                close(getattr(ours, name)[i][row], getattr(plain, name)[i][row])
            first = padding if i == 0 else 0
            for x, y in zip(ours.hidden_states[i], plain.hidden_states[i], strict=True):
                assert x.shape == y.shape
                close(x[row, first:], y[row, first:])
            for x, y in zip(ours.attentions[i], plain.attentions[i], strict=True):
                assert x.shape == y.shape
                close(x[row, :, first:], y[row, :, first:])
    assert len(ours.scores) == new.shape[1]


def test_transition_scores(pair):
    target, _ = pair
    plain, ours = both(pair, input_ids=torch.tensor([[3, 9, 4]]), max_new_tokens=12)
    expected, found = (
        target.compute_transition_scores(out.sequences, out.scores, normalize_logits=True) for out in (plain, ours)
    )
    close(found, expected)


def test_nothing_is_kept_unless_asked(pair):
    target, head = pair
    out = target.generate(
        input_ids=torch.tensor([[3, 9]]), max_new_tokens=4, assistant_model=head, return_dict_in_generate=True
    )
    assert out.scores is None and out.logits is None and out.hidden_states is None and out.attentions is None
