"""Rounds run in torch's inference mode, but where somebody else sees their tensors."""

import copy

import pytest
import torch
from conftest import tiny_head, tiny_target, whole_blocks
from transformers import LogitsProcessor

from dspark_hf.generation.target import Target

IDS = torch.tensor([[1, 5, 9, 2], [3, 3, 7, 4]])


@pytest.fixture
def pair():
    target = tiny_target(sharpness=3)
    return target, whole_blocks(tiny_head(target))


@pytest.fixture
def modes(monkeypatch):
    """Of every pass whether it was in inference mode."""
    seen, run = [], Target.run

    def noting(self, *args, **kwargs):
        seen.append(torch.is_inference_mode_enabled())
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Target, "run", noting)
    return seen


def generate(pair, **kwargs):
    target, head = pair
    return target.generate(IDS, assistant_model=head, **{"max_new_tokens": 12, "do_sample": False} | kwargs)


def test_rounds_of_stock_models_are(pair, modes):
    sequences = generate(pair)
    assert modes and all(modes) and not sequences.is_inference()
    assert sequences.tolist() == pair[0].generate(IDS, max_new_tokens=12, do_sample=False).tolist()


class Kept(LogitsProcessor):
    """Changes, later, what it was given."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores)
        return scores


def test_rounds_that_others_watch_are_not(pair, modes):
    """Hooks, recorded outputs, processors: what they hold can be changed and trained on."""
    states, processor = [], Kept()
    hook = pair[0].model.layers[0].register_forward_hook(lambda module, args, output: states.append(output))
    generate(pair)
    hook.remove()
    output = generate(pair, return_dict_in_generate=True, output_hidden_states=True, output_scores=True)
    generate(pair, logits_processor=[processor])
    assert not any(modes)
    held = [states[-1] if torch.is_tensor(states[-1]) else states[-1][0], output.hidden_states[-1][-1]]
    for tensor in (*held, output.scores[-1], processor.scores[-1]):
        probe = torch.nn.Linear(tensor.shape[-1], 1)
        probe(tensor).sum().backward()
        tensor.add_(1)


def test_a_model_in_which_a_forward_was_replaced_is_watched(pair, modes):
    layer = pair[0].model.layers[1]
    layer.forward = layer.forward
    generate(pair)
    assert modes and not any(modes)


def test_a_returned_cache_is_of_ordinary_tensors(pair):
    """It can be copied, changed, and continued with a head, without one, and by rounds that are watched."""
    target, head = pair
    output = generate(pair, return_dict_in_generate=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    more = torch.cat([output.sequences, torch.tensor([[6], [8]])], dim=1)
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    expected = target.generate(more, **kwargs).tolist()
    for settings in ({}, {"assistant_model": head}, {"assistant_model": head, "output_scores": True}):
        own = copy.deepcopy(cache)
        continued = target.generate(more, **{name: own}, return_dict_in_generate=True, **settings, **kwargs)
        assert continued.sequences.tolist() == expected
    keys = cache.layers[0].keys
    assert not keys.is_inference()
    keys.add_(1)


def test_a_streamer_is_given_ordinary_tensors(pair):
    class Streamer:
        given = []

        def put(self, value):
            self.given.append(value)

        def end(self):
            pass

    generate(pair, streamer=Streamer())
    assert Streamer.given and not any(value.is_inference() for value in Streamer.given)
