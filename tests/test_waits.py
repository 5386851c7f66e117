"""The host waits for the device once a round, in `round.to_host`."""

from contextlib import contextmanager

import pytest
import torch
from conftest import FixedCosts, tiny_head, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_hf.generation import engine, experience
from dspark_hf.generation import round as steps
from dspark_hf.generation.engine import Engine

aten = torch.ops.aten
# What makes the host wait on CUDA: reading a value, shapes that depend on values, and draws that check their input.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.multinomial, aten.equal, aten._unique2}
METHODS = ("tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Reads(TorchDispatchMode):
    """Notes what reads a tensor's values, outside of the one transfer."""

    def __init__(self):
        super().__init__()
        self.found, self.allowed = [], False

    def note(self, name):
        if not self.allowed:
            self.found.append(name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or func.overloadpacket in READS:
            self.note(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def reads_noted(monkeypatch):
    reads, transfers = Reads(), []
    with monkeypatch.context() as patch:
        for name in METHODS:
            method = getattr(torch.Tensor, name)

            def noted(self, *args, method=method, name=name, **kwargs):
                reads.note(f"Tensor.{name}")
                return method(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, noted)
        to_host = steps.to_host

        def transfer(*args, **kwargs):
            transfers.append(1)
            reads.allowed = True
            try:
                return to_host(*args, **kwargs)
            finally:
                reads.allowed = False

        patch.setattr(steps, "to_host", transfer)
        with reads:
            yield reads.found, transfers


SETTINGS = {
    "greedy": {"do_sample": False},
    "top-k and top-p": {"do_sample": True, "top_k": 8, "top_p": 0.9},
    "temperature": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "processors": {"do_sample": True, "repetition_penalty": 1.2, "suppress_tokens": [3], "top_k": 8},
}


@pytest.mark.parametrize("schedule", ["constant", "load"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_host_waits_once_a_round(setting, rows, schedule, monkeypatch):
    """On a device of which the host runs ahead. What is new a call, and stop strings, may wait."""
    monkeypatch.setattr(experience, "runs_ahead", lambda device: True)
    monkeypatch.setattr(experience, "costs_of", lambda head, target, sampled: FixedCosts(4))
    target = tiny_target(vocab_size=24, sharpness=3, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    head = tiny_head(target)
    head.config.confidence_temperatures, head.config.confidence_shifts = [1.1] * 4, [0.1] * 4
    head.generation_config.num_assistant_tokens_schedule = schedule
    ids = torch.randint(1, 24, (rows, 6))
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    step, waits = Engine.step, []

    def watched(self):
        with reads_noted(monkeypatch) as (found, transfers):
            ended = step(self)
        waits.append((found, len(transfers)))
        return ended

    monkeypatch.setattr(engine.Engine, "step", watched)
    output = target.generate(
        input_ids=ids,
        attention_mask=mask,
        assistant_model=head,
        max_new_tokens=20,
        return_dict_in_generate=True,
        **SETTINGS[setting],
    )
    assert sum(output.dspark.verified) > 0 and len(waits) > 5
    assert all(count == 1 for _, count in waits)
    # The first round begins what a call needs.
    assert [found for found, _ in waits[2:] if found] == []


def test_a_read_is_seen(monkeypatch):
    """So that the test above can fail."""
    x = torch.arange(4)
    with reads_noted(monkeypatch) as (found, _):
        x.sum().item()
        x[x > 2]
        torch.multinomial(torch.ones(3), 1)
    assert any("Tensor.item" in name for name in found)
    assert {"aten.multinomial.default"} <= set(found) and any("index" in name for name in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("setting", SETTINGS)
def test_cuda_is_waited_for_once_a_round(setting, monkeypatch):
    """As CUDA itself notices."""
    target = tiny_target(vocab_size=24, sharpness=3).to("cuda")
    head = tiny_head(target).to("cuda")
    step, to_host, rounds = Engine.step, steps.to_host, []

    def transfer(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return to_host(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("error" if len(rounds) > 2 else "default")

    def watched(self):
        rounds.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(rounds) > 2 else "default")
        try:
            return step(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(steps, "to_host", transfer)
    monkeypatch.setattr(engine.Engine, "step", watched)
    ids = torch.randint(1, 24, (4, 6), device="cuda")
    target.generate(input_ids=ids, assistant_model=head, max_new_tokens=20, **SETTINGS[setting])
    assert len(rounds) > 5
