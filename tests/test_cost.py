"""What steps cost: learnt from rounds that write text, stored, and never trusted when damaged."""

import json
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from conftest import tiny_head, tiny_target
from hypothesis import given
from hypothesis import strategies as st

from dspark_hf.generation import experience
from dspark_hf.generation.target import Target
from dspark_hf.scheduling.cost import CostModel

BLOCK = 4


def device(rows, tokens, context, packed=False, step=0.01):
    """Seconds of a pass on a machine that the model's guess does not know."""
    return step * (0.7 + 0.1 * rows + 0.05 * tokens + 0.02 * rows * context / 256 + 0.2 * (tokens > rows))


def drafting(rows, positions, context, step=0.01):
    return step * (0.5 + 0.02 * rows + 0.06 * positions + 0.01 * rows * positions)


def learn(costs, count, random=None, disturbed=0.0, step=0.01, rows=(1, 2, 4)):
    """Rounds of all kinds, some of them slowed down threefold."""
    random = random or np.random.default_rng(0)
    for i in range(count):
        n, drafts, context = int(random.choice(rows)), i % (BLOCK + 1), 20 + i % 200
        slow = 3.0 if random.random() < disturbed else 1.0
        slow *= np.exp(random.normal(scale=0.02))
        costs.learn_verify(n, n * (1 + drafts), context, False, slow * device(n, n * (1 + drafts), context, step=step))
        if drafts:
            costs.learn_draft(n, drafts, context, 0, slow * drafting(n, drafts, context, step))


def off(costs, rows, step=0.01, context=100):
    """[block + 1] by how much rounds of 0, 1, .. drafts are misjudged."""
    drafts = np.arange(BLOCK + 1)
    right = np.array([device(rows, rows * (1 + n), context, step=step) for n in drafts])
    right[1:] += [drafting(rows, n, context, step) for n in drafts[1:]]
    found = costs.verify(rows, context)
    found[1:] += costs.draft(rows, context)
    return np.abs(np.log(found / right))


def test_a_guess_takes_its_scale_from_the_first_round():
    for kind in ("cpu", "cuda"):
        costs = CostModel(BLOCK, 0.3, kind)
        costs.learn_verify(1, 1, 0, False, 0.02)
        assert costs.verify(1, 0)[0] == pytest.approx(0.02, rel=0.01)
        assert (np.diff(costs.verify(1, 0)) > 0).all() and (costs.draft(1, 0) < 0.02).all()
        assert (costs.verify(8, 100) > costs.verify(1, 100)).all()
    # Further tokens cost a GPU next to nothing.
    assert costs.verify(1, 0)[BLOCK] < 1.2 * 0.02


def test_coefficients_are_learnt():
    costs = CostModel(BLOCK, 0.3, "cpu")
    learn(costs, 1)
    before = off(costs, 4)
    learn(costs, 60)
    assert off(costs, 4).max() < 0.05 < before.max() and off(costs, 1).max() < 0.06


def test_rounds_that_something_interrupted_say_little():
    costs = CostModel(BLOCK, 0.3, "cpu")
    learn(costs, 200, disturbed=0.05)
    assert off(costs, 2).max() < 0.12


def test_a_machine_that_slows_down_is_followed():
    costs = CostModel(BLOCK, 0.3, "cpu")
    learn(costs, 100)
    learn(costs, 100, step=0.02)
    assert off(costs, 4, step=0.02).max() < 0.08


def test_what_is_not_seen_follows_the_pace_of_what_is():
    """Rounds without drafts on a machine that has become twice as slow: those with drafts have too."""
    costs = CostModel(BLOCK, 0.3, "cpu")
    learn(costs, 100)
    for _ in range(200):
        costs.learn_verify(2, 2, 100, False, device(2, 2, 100, step=0.02))
    before, after = (drafting(2, BLOCK, 100, step) for step in (0.01, 0.02))
    assert costs.draft(2, 100)[-1] > before + 0.6 * (after - before)


def test_one_is_unsure_of_what_was_not_tried():
    costs = CostModel(BLOCK, 0.3, "cpu")
    for _ in range(50):
        costs.learn_verify(1, 1, 50, False, device(1, 1, 50))
    unsure = costs.unsure(1, 50)
    assert unsure[0] < 0.02 < 0.04 < unsure[1]
    learn(costs, 60)
    assert (costs.unsure(1, 50) < 0.04).all()


def test_what_is_known_is_not_forgotten_over_rounds_of_another_kind():
    costs = CostModel(BLOCK, 0.3, "cpu")
    learn(costs, 100)
    before = costs.unsure(2, 50)[2:]
    for _ in range(2000):
        costs.learn_verify(1, 1, 50, False, device(1, 1, 50))
    assert (costs.unsure(2, 50)[2:] < 2.5 * before).all() and off(costs, 2).max() < 0.1


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, BLOCK), st.floats(1e-4, 10)), min_size=1, max_size=60))
def test_no_step_costs_less_for_more(rounds):
    """Whatever was measured."""
    costs = CostModel(BLOCK, 0.3, "cpu")
    for rows, drafts, seconds in rounds:
        costs.learn_verify(rows, rows * (1 + drafts), 50, bool(drafts), seconds)
        if drafts:
            costs.learn_draft(rows, drafts, 50, 0, seconds)
    for values in (costs.verify(3, 50), costs.draft(3, 50), costs.unsure(3, 50)):
        assert np.isfinite(values).all() and (values > 0).all()
    assert (np.diff(costs.verify(3, 50)) >= 0).all() and (costs.verify(4, 50) >= costs.verify(3, 50)).all()
    assert (np.diff(costs.draft(3, 50)) >= 0).all() and (costs.draft(3, 50, pending=100) >= costs.draft(3, 50)).all()


def test_another_process_goes_on_at_the_pace_of_its_first_round():
    known, costs = CostModel(BLOCK, 0.3, "cpu"), CostModel(BLOCK, 0.3, "cpu")
    learn(known, 100)
    costs.take_over(known.as_json())
    assert np.array_equal(costs.verify(2, 50), known.verify(2, 50))
    costs.learn_verify(2, 6, 50, False, device(2, 6, 50, step=0.03))
    assert off(costs, 2, step=0.03).max() < 0.08


# -- From process to process -----------------------------------------------------------------------------------------


def in_a_new_process(monkeypatch):
    monkeypatch.setattr(experience, "_kept", WeakKeyDictionary())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(experience, "HF_HOME", str(tmp_path))
    in_a_new_process(monkeypatch)
    return tmp_path


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(experience.logger, name, lambda message, *args: seen.append(message))
    return seen


def pair():
    target = tiny_target()
    head = tiny_head(target)
    head.generation_config.num_assistant_tokens_schedule = "load"
    return Target(target, head.config.target_layer_ids), head


def generate(target, head, rows=2):
    ids = torch.ones(rows, 4, dtype=torch.long)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    return target.model.generate(input_ids=ids, assistant_model=head, **kwargs)


def file_in(folder):
    (path,) = (folder / "dspark_hf" / "step_costs").iterdir()
    return path


def test_generation_learns_and_stores(folder, monkeypatch):
    target, head = pair()
    passes = []
    target.model.register_forward_pre_hook(lambda *_: passes.append(1))
    output = generate(target, head)
    costs = experience.costs_of(head, target)
    assert 0 < costs.pace < 1 and 0 < costs.verify(2, 10)[0] < 1
    # No pass is made for the sake of measuring.
    assert len(passes) == 1 + output.dspark.rounds
    assert file_in(folder) == experience.path_of(experience.identity_of(target.model, head, target.device))
    stored = json.loads(file_in(folder).read_text())
    assert stored["pace"] == costs.pace
    in_a_new_process(monkeypatch)
    again = experience.costs_of(head, target)
    assert again is not costs and again.pace == costs.pace and np.array_equal(again.verify(2, 9), costs.verify(2, 9))


def test_it_is_written_now_and_then(folder, monkeypatch):
    target, head = pair()
    generate(target, head)
    first = file_in(folder).read_text()
    generate(target, head)
    assert file_in(folder).read_text() == first
    monkeypatch.setattr(experience, "SECONDS_BETWEEN_WRITES", 0)
    generate(target, head)
    assert json.loads(file_in(folder).read_text())["pace"] == experience.costs_of(head, target).pace


def test_learning_leaves_the_seed_alone(folder):
    target, head = pair()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    generate(target, head)
    assert torch.equal(torch.rand(3), expected)


def with_line(content, **parts):
    lines = content["lines"]
    return json.dumps(content | {"lines": lines | {"verify": lines["verify"] | parts}})


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: json.dumps(content | {"format": 0}),
        lambda content: json.dumps(content | {"identity": content["identity"] | {"device": "another"}}),
        lambda content: json.dumps(content | {"pace": -1.0}),
        lambda content: json.dumps(content | {"pace": None}),
        lambda content: json.dumps(content | {"lines": {}}),
        lambda content: with_line(content, mean=[1.0]),
        lambda content: with_line(content, mean=[-1.0] * 6),
        lambda content: with_line(content, information=np.zeros((6, 6)).tolist()),
    ],
)
def test_a_damaged_or_foreign_file_is_not_used(folder, warnings, monkeypatch, damage):
    target, head = pair()
    generate(target, head)
    path = file_in(folder)
    path.write_text(damage(json.loads(path.read_text())))
    in_a_new_process(monkeypatch)
    assert experience.costs_of(head, target).pace is None
    assert len(warnings) == 1 and str(path) in warnings[0] and "learnt again" in warnings[0]
    generate(target, head)
    in_a_new_process(monkeypatch)
    assert experience.costs_of(head, target).pace > 0 and len(warnings) == 1


def test_a_folder_that_cannot_be_written_is_only_warned_about(folder, warnings):
    (folder / "dspark_hf").write_text("a file where a folder should be")
    target, head = pair()
    generate(target, head)
    assert "could not be stored" in warnings[-1]


def test_pairs_have_their_own_files():
    target, head = pair()
    other = tiny_target(vocab_size=24)
    identities = [
        experience.identity_of(target.model, head, torch.device("cpu")),
        experience.identity_of(other, tiny_head(other), torch.device("cpu")),
        experience.identity_of(target.model.to(torch.bfloat16), head, torch.device("cpu")),
        experience.identity_of(target.model, tiny_head(target.model, block_size=3), torch.device("cpu")),
    ]
    assert len({experience.path_of(identity) for identity in identities}) == len(identities)
