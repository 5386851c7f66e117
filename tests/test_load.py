"""Load: what else the device is doing."""

import threading

import numpy as np
import pytest
import torch
from conftest import FixedCosts, tiny_head, tiny_target
from transformers import StoppingCriteria, StoppingCriteriaList

from dspark_hf.generation import experience
from dspark_hf.scheduling.load import in_flight


@pytest.fixture
def pair():
    target = tiny_target(sharpness=3)
    return target, tiny_head(target)


def generate(pair, rows=2, head=True, **kwargs):
    target, assistant = pair
    ids = torch.arange(1, 1 + 4 * rows).view(rows, 4)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True} | kwargs
    return target.generate(input_ids=ids, **kwargs, **({"assistant_model": assistant} if head else {}))


def test_rows_of_the_call(pair):
    stats = generate(pair, rows=3).dspark
    assert stats.load[0] == 3 and stats.load == sorted(stats.load, reverse=True)


def test_calls_on_other_devices_do_not_count():
    with in_flight(torch.device("cpu"), 2) as call, in_flight(torch.device("meta"), 5):
        assert call.load(None).total == 2


def test_ended_rows_and_calls_are_taken_off():
    with in_flight(torch.device("cpu"), 2) as call:
        with in_flight(torch.device("cpu"), 5) as other:
            assert (call.load(None).rows, call.load(None).others) == (2, 5)
            other.set_rows(1)
            assert call.load(None).total == 3
        with pytest.raises(RuntimeError), in_flight(torch.device("cpu"), 7):
            raise RuntimeError
        assert call.load(None).others == 0


class Rendezvous(StoppingCriteria):
    """Halts a call until it is told to go on."""

    def __init__(self):
        self.reached, self.released = threading.Event(), threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        self.reached.set()
        assert self.released.wait(60)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("head", [True, False])
def test_other_calls_in_flight(pair, head):
    """With a head or without one."""
    gate = Rendezvous()
    kwargs = {"rows": 3, "head": head, "stopping_criteria": StoppingCriteriaList([gate]), "eos_token_id": 1}
    thread = threading.Thread(target=generate, args=(pair,), kwargs=kwargs)
    thread.start()
    assert gate.reached.wait(60)
    busy = generate(pair, rows=1).dspark.load
    gate.released.set()
    thread.join()
    assert set(busy) == {4}
    assert set(generate(pair, rows=1).dspark.load) == {1}


def test_a_sensor_of_the_application(pair):
    calls = []
    pair[1].load_sensor = lambda: calls.append(1) or 40
    stats = generate(pair, rows=1).dspark
    assert set(stats.load) == {41} and len(calls) == stats.rounds


@pytest.mark.parametrize("value", [-1, 2.5, None])
def test_a_sensor_that_does_not_count_is_refused(pair, value):
    pair[1].load_sensor = lambda: value
    with pytest.raises(ValueError, match="load_sensor"):
        generate(pair)


def test_the_load_shortens_what_is_verified(pair, monkeypatch):
    costs = FixedCosts(4)
    # Free up to 64 tokens a step, and dear beyond.
    costs.verify = lambda rows, context, packed=False: 1 + np.maximum(0, rows * np.arange(1, 6) - 64) / 16
    monkeypatch.setattr(experience, "costs_of", lambda head, target, sampled: costs)
    head = pair[1]
    head.generation_config.num_assistant_tokens_schedule = "load"
    idle = generate(pair, max_new_tokens=60).dspark.verify_length
    head.load_sensor = lambda: 62
    busy = generate(pair, max_new_tokens=60).dspark.verify_length
    assert busy < 0.5 * idle
