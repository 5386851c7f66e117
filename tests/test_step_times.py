"""Step times: measured once, stored, moved along by what generation sees, and never trusted when damaged."""

import json
from collections import defaultdict
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from conftest import table_of, tiny_head, tiny_target
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dspark_hf.generation import step_times, trial
from dspark_hf.generation.target import Target
from dspark_hf.scheduling import cost
from dspark_hf.scheduling.cost import monotone


def forget_tables(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(step_times, "_tables", {})
    monkeypatch.setattr(step_times, "_known", WeakKeyDictionary())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "HF_HOME", str(tmp_path))
    forget_tables(monkeypatch)
    return tmp_path


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(cost.logger, name, lambda message, *args: seen.append(message))
    return seen


def pair():
    target = tiny_target()
    head = tiny_head(target)
    return Target(target, head.config.target_layer_ids), head


def test_measured_once_and_stored(folder, monkeypatch):
    target, head = pair()
    table = step_times.step_times(target, head, 3)
    assert table.rows == [1, 4] and table.contexts == [192, 251]
    for kind, sizes in cost.sizes_of(4).items():
        times = getattr(table, kind)
        assert times.shape == (2, 2, sizes) and (times > 0).all() and (times < 1).all()
    monkeypatch.setattr(trial, "measure", None)
    assert step_times.step_times(target, head, 2) is table
    forget_tables(monkeypatch)
    stored = step_times.step_times(target, head, 4)
    assert stored is not table and np.allclose(stored.verify, table.verify)


def test_larger_batches_are_added(folder):
    target, head = pair()
    first = step_times.step_times(target, head, 1)
    before = first.verify.copy()
    assert first.rows == [1, 2]
    assert step_times.step_times(target, head, 7).rows == [1, 2, 8]
    assert step_times._row_counts(64) == [1, 4, 16, 64] == step_times._row_counts(1000)
    assert step_times._row_counts(32) == [1, 8, 32]
    moved = first.verify[:, :2] / before
    assert np.allclose(moved, moved[0, 0]), "what was known moves as a whole, to be of one time with what is added"


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_times_of_short_blocks(block_size):
    target = tiny_target()
    samples = defaultdict(list)
    trial.measure(target, tiny_head(target, block_size=block_size), 3, [24, 40], samples, seed=0.5)
    found = trial.settled(samples, [24, 40], block_size)
    for kind, sizes in cost.sizes_of(block_size).items():
        assert found[kind].shape == (2, sizes) and np.isfinite(found[kind]).all()


def test_known_times_are_brought_to_those_of_today(folder):
    """Generation had moved the table to a slower machine: the rows added later must not look quick beside it."""
    target, head = pair()
    table = step_times.step_times(target, head, 1)
    quiet = {kind: getattr(table, kind).copy() for kind in cost.KINDS}
    for kind in cost.KINDS:
        setattr(table, kind, 3 * quiet[kind])
    table.bring_to(2, {kind: times[:, 1] for kind, times in quiet.items()})
    assert all(np.allclose(getattr(table, kind), times) for kind, times in quiet.items())


def test_measuring_leaves_the_seed_alone(folder):
    target, head = pair()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    step_times.step_times(target, head, 2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: json.dumps(content | {"format": 0}),
        lambda content: json.dumps(content | {"identity": content["identity"] | {"device": "another"}}),
        lambda content: json.dumps(content | {"verify": [[[1.0, -1.0]]]}),
        lambda content: json.dumps(content | {"rows": [2, 1]}),
        lambda content: json.dumps(content | {"draft": np.zeros_like(content["draft"]).tolist()}),
        lambda content: json.dumps({key: value for key, value in content.items() if key != "packed"}),
    ],
)
def test_a_damaged_or_foreign_file_is_rebuilt(folder, warnings, monkeypatch, damage):
    target, head = pair()
    table = step_times.step_times(target, head, 1)
    table.path.write_text(damage(json.loads(table.path.read_text())))
    forget_tables(monkeypatch)
    rebuilt = step_times.step_times(target, head, 1)
    assert len(warnings) == 1 and str(table.path) in warnings[0] and "measured again" in warnings[0]
    assert json.loads(table.path.read_text())["verify"] == rebuilt.verify.tolist()
    assert cost.load(rebuilt.identity, 4) is not None and len(warnings) == 1


def test_a_folder_that_cannot_be_written_is_only_warned_about(folder, warnings):
    (folder / "dspark_hf").write_text("a file where a folder should be")
    target, head = pair()
    assert step_times.step_times(target, head, 1).rows == [1, 2]
    assert "could not be stored" in warnings[-1]


def test_pairs_have_their_own_files():
    target, head = pair()
    other = tiny_target(vocab_size=24)
    identities = [
        cost.identity_of(target.model, head, torch.device("cpu")),
        cost.identity_of(other, tiny_head(other), torch.device("cpu")),
        cost.identity_of(target.model.to(torch.bfloat16), head, torch.device("cpu")),
        cost.identity_of(target.model, tiny_head(target.model, block_size=3), torch.device("cpu")),
    ]
    assert len({cost.path_of(identity) for identity in identities}) == len(identities)


def test_interpolation():
    table = table_of(3)
    one, two, four = (table.seconds("verify", rows, 128) for rows in (1, 2, 4))
    assert table.seconds("verify", 3, 128) == pytest.approx((two + four) / 2)
    assert (one < two).all() and (two < four).all()
    beyond, last = (table.seconds("draft", rows, 128) for rows in (128, 64))
    assert (beyond > last).all()


def test_observed_steps_move_the_table():
    """A device that is three times slower than when it was measured: what is used soon says so, the rest follows."""
    table, before = table_of(3), table_of(3)
    for _ in range(60):
        table.observe("verify", 4, 128, 2, 3 * before.seconds("verify", 4, 128)[1])
    assert table.seconds("verify", 4, 128)[1] == pytest.approx(3 * before.seconds("verify", 4, 128)[1], rel=0.1)
    assert (table.seconds("draft", 16, 128) > 1.02 * before.seconds("draft", 16, 128)).all()


def test_what_is_chosen_does_not_come_to_look_quick():
    """Sizes of a kind that drafts keep their proportions, whichever of them is observed."""
    table, before = table_of(3), table_of(3)
    for _ in range(60):
        table.observe("verify", 4, 128, 2, 0.5 * before.seconds("verify", 4, 128)[1])
    moved = table.seconds("verify", 4, 128) / before.seconds("verify", 4, 128)
    assert moved[1:] == pytest.approx(moved[1]) and moved[1] < moved[0] < 1


@given(hnp.arrays(float, st.integers(1, 9), elements=st.floats(0.1, 10)))
def test_times_are_made_to_rise(seconds):
    rising = monotone(seconds)
    assert (np.diff(rising) >= -1e-9).all() and rising.sum() == pytest.approx(seconds.sum())
    assert monotone(np.sort(seconds)) == pytest.approx(np.sort(seconds))
    # Nearest: no step towards any other rising values brings it closer.
    for other in (np.sort(seconds), np.full(len(seconds), seconds.mean()), np.maximum.accumulate(seconds)):
        assert (seconds - rising) @ (other - rising) <= 1e-6


def test_one_interrupted_step_changes_little():
    table, before = table_of(3), table_of(3)
    for _ in range(20):
        table.observe("verify", 4, 128, 2, before.seconds("verify", 4, 128)[1])
    table.observe("verify", 4, 128, 2, 100 * before.seconds("verify", 4, 128)[1])
    assert table.seconds("verify", 4, 128)[1] < 1.15 * before.seconds("verify", 4, 128)[1]


def test_generation_moves_the_table(folder):
    target, head = pair()
    head.generation_config.num_assistant_tokens_schedule = "load"
    table = step_times.step_times(target, head, 2)
    before = table.verify.copy()
    target.model.generate(
        input_ids=torch.ones(2, 4, dtype=torch.long), max_new_tokens=20, do_sample=False, assistant_model=head
    )
    assert not np.array_equal(table.verify, before)


def test_moved_times_are_written_now_and_then(folder, monkeypatch):
    target, head = pair()
    head.generation_config.num_assistant_tokens_schedule = "load"
    kwargs = {"input_ids": torch.ones(2, 4, dtype=torch.long), "max_new_tokens": 20, "do_sample": False}
    table = step_times.step_times(target, head, 2)
    measured = table.path.read_text()
    target.model.generate(**kwargs, assistant_model=head)
    assert table.path.read_text() == measured
    monkeypatch.setattr(step_times, "SECONDS_BETWEEN_WRITES", 0)
    target.model.generate(**kwargs, assistant_model=head)
    assert json.loads(table.path.read_text())["verify"] == table.verify.tolist() and table.path.read_text() != measured


def test_an_information_says_that_it_is_measured(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(step_times.logger, "info", seen.append)
    step_times.step_times(*pair(), 1)
    assert len(seen) == 1 and "Measuring the step times" in seen[0]


def samples_of(right, random, disturbed, rounds=12):
    """Times of rounds, slower by half where the machine was disturbed, which lasts for several in a row."""
    samples = defaultdict(list)
    for _ in range(rounds):
        slower = 1.5 if random.random() < disturbed else 1.0
        for shape in random.permutation(sorted(right)):
            slower = 2.5 - slower if random.random() < 0.1 else slower
            shape = (str(shape[0]), int(shape[1]), int(shape[2]))
            samples[shape].append(slower * right[shape] * np.exp(abs(random.normal(scale=0.01))))
    return samples


def shapes(block):
    right = {("verify", 8, size): 1 + 0.1 * size for size in trial._sizes(block + 1)}
    right |= {
        ("packed", 8, size): 2 * right["verify", 8, size] for size in trial._packed_sizes(trial._sizes(block + 1))
    }
    return right | {("draft", 8, size - 1): 0.5 for size in trial._sizes(block + 1)[1:]} | {("start", 8, 1): 3.0}


def test_turns_of_another_pace_and_a_disturbed_size_leave_the_times_right_to_each_other():
    random = np.random.default_rng(0)
    right = {shape: np.exp(random.normal()) for shape in shapes(7)}
    # Six rounds a turn.
    samples = {shape: [pace * own for pace in (1.8, 1.4) for _ in range(6)] for shape, own in right.items()}
    samples["draft", 8, 3][7] *= 5
    found = trial.settled(samples, [8], 7)
    for kind in ("verify", "draft", "start"):
        for size in (size for k, _, size in right if k == kind):
            assert found[kind][0, size - 1] == pytest.approx(1.4 * right[kind, 8, size], rel=1e-9)
    for size in trial._packed_sizes(trial._sizes(8)):
        assert found["packed"][0, size - 1] == pytest.approx(1.4 * right["packed", 8, size], rel=1e-9)


def test_disturbed_rounds_leave_the_times_right():
    right = shapes(7)
    found = trial.settled(samples_of(right, np.random.default_rng(0), 0.5), [8], 7)
    np.testing.assert_allclose(found["verify"][0], 1 + 0.1 * np.arange(1, 9), rtol=0.02)
    np.testing.assert_allclose(found["draft"][0], 0.5, rtol=0.02)
    np.testing.assert_allclose(found["packed"][0][1:-1], 2 * (1 + 0.1 * np.arange(2, 8)), rtol=0.05)


def test_packed_times_stay_positive_where_an_even_round_was_disturbed():
    right = shapes(4)
    right["verify", 8, 2] = 100.0
    found = trial.settled({shape: [seconds] * 2 for shape, seconds in right.items()}, [8], 4)
    assert (found["packed"] > 0).all()


def test_not_every_size_of_a_long_block_is_measured():
    assert trial._sizes(8) == [1, 2, 3, 4, 6, 8] and trial._sizes(2) == [1, 2]
    assert trial._sizes(16) == [1, 2, 3, 4, 6, 8, 12, 16] and trial._sizes(11)[-3:] == [6, 8, 11]
    assert [trial._packed_sizes(trial._sizes(most)) for most in (2, 3, 8)] == [[], [2], [2, 6]]


@pytest.mark.parametrize("noise, turns", [(0.0, 1), (0.005, 1), (0.1, 2)])
def test_turns_go_on_until_they_agree(folder, monkeypatch, noise, turns):
    random, calls = np.random.default_rng(0), []

    def measured(model, head, rows, contexts, samples, seed):
        calls.append(rows)
        for shape in shapes(4):
            for context in contexts:
                own = samples[shape[0], context, shape[2]]
                own += np.exp(random.normal(scale=noise, size=6)).tolist()

    monkeypatch.setattr(trial, "measure", measured)
    step_times.step_times(*pair(), 2)
    assert calls == [1, 2] * turns


def test_times_are_straightened_by_as_much_as_noise_explains():
    random, sizes = np.random.default_rng(0), np.arange(7)
    line, steps = np.linspace(1, 1.3, 7), np.array([1, 1, 1, 1, 2, 2, 2])
    noisy = line * np.exp(random.normal(scale=0.05, size=(200, 7)))
    straight = np.array([trial.straightened(sizes, times, 0.05**2) for times in noisy])
    assert np.diff(straight).std() < 0.6 * np.diff(noisy).std()
    assert straight.mean(axis=0) == pytest.approx(line, rel=0.02)
    np.testing.assert_allclose(trial.straightened(sizes, steps, 0.01**2), steps, rtol=0.01)
    np.testing.assert_array_equal(trial.straightened(sizes, steps, 0.0), steps)


def test_a_line_goes_through_sizes_that_are_not_evenly_apart():
    sizes = np.array([2, 3, 4, 6, 8])
    np.testing.assert_allclose(trial.straightened(sizes, 1 + 0.05 * sizes, 1.0), 1 + 0.05 * sizes)
