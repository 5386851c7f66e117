"""Rows that come and go, with mock models, and with real ones against plain `generate`."""

import gc
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_head, tiny_target
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from dspark_hf.generation import cache
from dspark_hf.generation.cache import SlotCache
from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.engine import Engine
from dspark_hf.generation.observers import Observer
from dspark_hf.generation.processors import BlockProcessors
from dspark_hf.generation.rows import read_rows
from dspark_hf.generation.stopping import Stopping
from dspark_hf.generation.target import Target, TargetOutput
from dspark_hf.modeling_dspark import DraftBlock
from dspark_hf.scheduling.estimates import AcceptanceStats
from dspark_hf.scheduling.load import in_flight
from dspark_hf.scheduling.scheduler import ConstantSchedule
from dspark_hf.scheduling.settings import Settings

VOCABULARY, GAMMA, END = 31, 3, 0
CPU = torch.device("cpu")


def after(token):
    """The text of the mock target."""
    return (3 * token + 1) % VOCABULARY


class MockTarget:
    device, growing, rereads_at, positions, packs, is_stateful = CPU, [], None, None, False, False
    model = SimpleNamespace(tp_size=None)

    def new_cache(self, rows, slots):
        return SlotCache(1, rows, CPU, slots)

    def forward(self, tokens, cache, keep=None, lengths=None, rows=None):
        cache.place(tokens.shape[1], rows=rows)
        logits = torch.nn.functional.one_hot(after(tokens), VOCABULARY).float()
        return TargetOutput(logits if keep is None else logits[:, keep], torch.zeros(*tokens.shape, 1), None, None)


class MockDrafter:
    """Drafts right tokens, but for the last of every block."""

    def __init__(self, rows=0):
        self.head = SimpleNamespace(config=SimpleNamespace(gamma=GAMMA), load_sensor=None)
        self.cache, self.num_pending = SlotCache(1, rows, CPU, 8), [0] * rows

    def add(self, rows):
        self.num_pending += [0] * rows

    def keep(self, rows):
        self.num_pending = [self.num_pending[r] for r in rows]

    def append(self, features, counts):
        assert len(features) == len(counts) == len(self.num_pending)

    def read(self, rows, features, counts):
        assert len(rows) == len(features) == len(counts)

    def flush(self):
        pass

    def draft(self, anchors, length, sampler, rows):
        tokens = [after(anchors if rows is None else anchors[rows])]
        for _ in range(length - 1):
            tokens.append(after(tokens[-1]))
        tokens[-1] = (tokens[-1] + (length == GAMMA)) % VOCABULARY
        return DraftBlock(torch.stack(tokens, dim=1), None, None)


def criteria(limit):
    return StoppingCriteriaList([MaxLengthCriteria(limit), EosTokenCriteria(END)])


def mock_engine(slots, observers=()):
    schedule = ConstantSchedule(Settings(GAMMA, "constant", None), AcceptanceStats.initial(GAMMA), slots)
    return Engine(MockTarget(), MockDrafter(slots), schedule, slots, observers=observers)


def rows_of(*prompts, limits=None, limit=14):
    greedy, rows = BlockProcessors(LogitsProcessorList(), False), []
    for index, (prompt, own) in enumerate(zip(prompts, limits or [limit] * len(prompts), strict=True)):
        rows += read_rows(torch.tensor([prompt]), None, 0, len(prompt), greedy, Stopping(criteria(own)))
        rows[-1].index = index
    return rows


def text_of(prompt, limit=14):
    text = list(prompt)
    while len(text) < limit and (len(text) == len(prompt) or text[-1] != END):
        text.append(after(text[-1]))
    return text[len(prompt) :]


PROMPTS = [[5, 9], [4, 4, 4], [7], [2, 8, 30, 1], [11], [13, 6], [3]]


def run(engine):
    ended = []
    while engine.busy:
        ended += engine.step()
    return ended


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_rows_wait_for_slots_and_write_their_text(slots):
    engine, rows = mock_engine(slots), rows_of(*PROMPTS)
    engine.add(rows)
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, len(engine.rows))
        assert len(engine.state.cache.lengths) >= len(engine.rows) == len(engine.state.anchors) or not engine.rows
    assert most == slots
    assert [row.committed for row in rows] == [text_of(prompt) for prompt in PROMPTS]


def test_lengths_go_to_the_device_once(monkeypatch):
    """A round that nobody joins or leaves adds them up there."""
    sent, on_device = [], cache.on_device
    monkeypatch.setattr(cache, "on_device", lambda values, device: sent.append(values) or on_device(values, device))
    engine = mock_engine(2)
    engine.add(rows_of(*PROMPTS[:2]))
    for _ in range(3):
        sent.clear()
        assert engine.step() == []
        assert engine.state.cache.starts.tolist() == engine.state.cache.lengths
    assert sent == []
    # It would be load to others.
    run(engine)


def test_a_row_that_joins_leaves_the_others_alone():
    engine, rows = mock_engine(4), rows_of(*PROMPTS[:4])
    for row in rows:
        engine.add([row])
        engine.step()
        engine.step()
    run(engine)
    assert [row.committed for row in rows] == [text_of(prompt) for prompt in PROMPTS[:4]]


def test_drafts_save_rounds():
    class Counting(Observer):
        rounds = 0

        def on_round(self, done):
            self.rounds += done.plan is not None

    counting = Counting()
    engine = mock_engine(1, [counting])
    engine.add(rows_of([11], limit=20))
    run(engine)
    # Two drafts are right and one is wrong: three tokens a round.
    assert counting.rounds == -(-(len(text_of([11], 20)) - 1) // GAMMA)


def test_rows_that_end_are_returned_in_the_round_in_which_they_do():
    engine, rows = mock_engine(2), rows_of(*PROMPTS)
    engine.add(rows)
    seen = []
    while engine.busy:
        ended = engine.step()
        assert all(row.ended and row not in engine.rows for row in ended)
        seen += ended
    assert sorted(row.index for row in seen) == list(range(len(PROMPTS)))


def test_an_engine_is_load_for_as_long_as_it_decodes():
    engine = mock_engine(3)
    engine.add(rows_of(*PROMPTS[:3]))
    engine.step()
    with in_flight(CPU, 1) as other:
        assert other.load(None).others == len(engine.rows) > 0
        engine.close()
        assert other.load(None).others == 0


# -- Real models -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("slots, every", [(2, 1), (3, 2), (6, 3)])
def test_rows_that_come_and_go_write_what_they_write_alone(slots, every):
    """In float32, with a head that is rejected often: in whatever order they share the slots."""
    target = tiny_target(vocab_size=40, sharpness=3)
    head, prompts = tiny_head(target), [torch.randint(1, 40, (n,)).tolist() for n in (9, 3, 30, 5, 14, 2, 7)]
    limits = [40, 12, 45, 33, 20, 38, 16]
    expected = [
        target.generate(torch.tensor([p]), max_length=n, do_sample=False, eos_token_id=END)[0, len(p) :].tolist()
        for p, n in zip(prompts, limits, strict=True)
    ]

    runner = Target(target, head.config.target_layer_ids)
    schedule = ConstantSchedule(Settings(GAMMA, "constant", None), AcceptanceStats.initial(head.config.gamma), slots)
    engine = Engine(runner, Drafter(head, target, slots, slots), schedule, slots)
    rows = rows_of(*prompts, limits=limits)
    pending, turns = list(rows), 0
    while pending or engine.busy:
        if pending and turns % every == 0:
            engine.add([pending.pop(0)])
        engine.step()
        turns += 1
    assert [row.committed for row in rows] == expected


# -- Memory ----------------------------------------------------------------------------------------------------------


def resident() -> float:
    """MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.slow
def test_memory_does_not_grow_over_calls():
    target = tiny_target()
    head = tiny_head(target)
    head.generation_config.num_assistant_tokens_schedule = "load"
    kwargs = {"max_new_tokens": 4, "assistant_model": head, "return_dict_in_generate": True}
    for i in range(1200):
        target.generate(torch.randint(1, 16, (1 + i % 3, 3 + i % 5)), do_sample=bool(i % 2), **kwargs)
        if i == 200:
            before = resident()
    assert resident() - before < 5


@pytest.mark.slow
@torch.no_grad()
def test_memory_does_not_grow_over_rounds():
    target = tiny_target(max_position_embeddings=4096)
    head, slots = tiny_head(target), 4
    schedule = ConstantSchedule(Settings(GAMMA, "constant", None), AcceptanceStats.initial(head.config.gamma), slots)
    runner = Target(target, head.config.target_layer_ids)
    engine = Engine(runner, Drafter(head, target, slots, slots), schedule, slots)
    for turn in range(10_000):
        while len(engine.queue) < slots:
            engine.add(rows_of(torch.randint(1, 16, (1 + turn % 7,)).tolist(), limit=60))
        engine.step()
        if turn == 1000:
            before = resident()
    assert resident() - before < 5
