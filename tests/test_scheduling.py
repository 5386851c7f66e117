"""Algorithm 1, what it is fed with, and the plans that come of it."""

import itertools

import numpy as np
import pytest
import torch
from conftest import FixedCosts, tiny_head, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dspark_hf.generation.acceptance import accept_sampled
from dspark_hf.generation.experience import acceptance_of
from dspark_hf.scheduling.algorithm import admit, best_length, lower_hull, survival, top_k_by_survival
from dspark_hf.scheduling.cost import CostModel
from dspark_hf.scheduling.estimates import AcceptanceStats, RowEstimates
from dspark_hf.scheduling.load import Load
from dspark_hf.scheduling.plan import Costs, Plan, Step
from dspark_hf.scheduling.scheduler import LoadSchedule
from dspark_hf.scheduling.settings import Settings

CONFIDENCE = hnp.arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.floats(0.01, 0.99))

# -- The counterexample of the paper's appendix A ----------------------------------------------------------------------

DRAWS = 50_000
TARGET, DRAFT = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
SECONDS = 1 / np.array([1.0, 0.5, 0.45])


def first_tokens(lengths_of) -> torch.Tensor:
    """[2] frequencies of the first committed token, when `lengths_of(confidence [2])` are verified of a drafted pair of
    tokens whose second confidence tells what the first token was."""
    drafts = torch.multinomial(DRAFT.expand(DRAWS, -1), 2, replacement=True)
    known = {token: lengths_of(np.array([0.8, 0.9 if token == 0 else 0.0])) for token in (0, 1)}
    lengths = torch.tensor([known[token] for token in drafts[:, 0].tolist()])
    logits = TARGET.log().expand(DRAWS, 3, -1)
    verdict = accept_sampled(logits, drafts, DRAFT.log().expand(DRAWS, 2, -1), lengths)
    first = torch.where(verdict.accepted > 0, drafts[:, 0], verdict.next_tokens)
    return torch.bincount(first, minlength=2) / DRAWS


def algorithm_1(look_past_drops: bool, seconds=SECONDS):
    return lambda confidence: int(admit(survival(confidence)[None], 1.0, seconds, look_past_drops)[0])


# Five standard deviations of a frequency over so many draws.
WITHIN = 5 * (0.7 * 0.3 / DRAWS) ** 0.5


def test_the_early_stop_is_lossless():
    assert first_tokens(algorithm_1(False)).tolist() == pytest.approx([0.70, 0.30], abs=WITHIN)


def test_the_early_stop_over_smoothed_seconds_is_lossless():
    lengths_of = algorithm_1(False, lower_hull(SECONDS))
    assert lengths_of(np.array([0.8, 0.9])) == 2, "smoothing should let it past the local drop"
    assert first_tokens(lengths_of).tolist() == pytest.approx([0.70, 0.30], abs=WITHIN)


def test_without_the_stop_the_output_is_biased():
    """As the paper says, which shows that the tests above can fail."""
    assert first_tokens(algorithm_1(True)).tolist() == pytest.approx([0.85, 0.15], abs=WITHIN)


# -- Algorithm 1 -----------------------------------------------------------------------------------------------------


def seconds_of(data, count):
    steps = data.draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count))
    return np.concatenate(([1.0], 1 + np.cumsum(steps)))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_looking_past_drops_finds_the_best_of_all_schedules(data):
    alive = survival(data.draw(CONFIDENCE))
    rows, positions = alive.shape
    seconds = seconds_of(data, alive.size)
    lengths = admit(alive, rows, seconds, look_past_drops=True)

    def theta(chosen):
        return (rows + sum(alive[r, :n].sum() for r, n in enumerate(chosen))) / seconds[sum(chosen)]

    best = max(theta(chosen) for chosen in itertools.product(range(positions + 1), repeat=rows))
    assert theta(lengths.tolist()) == pytest.approx(best)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_walk_stops_at_the_first_drop(data):
    """From the definition, a token at a time."""
    alive = survival(data.draw(CONFIDENCE))
    rows, positions = alive.shape
    seconds = seconds_of(data, alive.size)
    lengths, tokens, count = [0] * rows, float(rows), 0
    while count < alive.size:
        value, r = max(((alive[r, n], -r) for r, n in enumerate(lengths) if n < positions))
        if (tokens + value) / seconds[count + 1] <= tokens / seconds[count]:
            break
        tokens, count = tokens + value, count + 1
        lengths[-r] += 1
    found = admit(alive, rows, seconds, look_past_drops=False)
    assert found.sum() == count
    assert sum(alive[r, :n].sum() for r, n in enumerate(found)) == pytest.approx(tokens - rows)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_over_smoothed_seconds_the_first_drop_is_the_only_one(data):
    alive = survival(data.draw(CONFIDENCE))
    seconds = lower_hull(np.sort(data.draw(hnp.arrays(float, alive.size + 1, elements=st.floats(1, 3)))))
    stopped, searched = (admit(alive, len(alive), seconds, anywhere) for anywhere in (False, True))
    tokens = [len(alive) + sum(alive[r, :n].sum() for r, n in enumerate(lengths)) for lengths in (stopped, searched)]
    thetas = [t / seconds[lengths.sum()] for t, lengths in zip(tokens, (stopped, searched), strict=True)]
    assert thetas[0] == pytest.approx(thetas[1])


@given(hnp.arrays(float, st.integers(1, 9), elements=st.floats(0.1, 5)))
@settings(max_examples=200, deadline=None)
def test_smoothed_is_the_largest_convex_function_below(seconds):
    found = lower_hull(seconds)
    assert (found <= seconds + 1e-12).all()
    assert (np.diff(found, 2) >= -1e-9).all()
    for n in range(len(seconds)):
        chords = [
            seconds[a] + (seconds[b] - seconds[a]) * (n - a) / (b - a)
            for a in range(n + 1)
            for b in range(n, len(seconds))
            if a < b
        ]
        assert found[n] == pytest.approx(min([seconds[n], *chords]))


@given(CONFIDENCE, st.integers(0, 16))
@settings(max_examples=100, deadline=None)
def test_a_budget_goes_to_the_likeliest_drafts(confidence, budget):
    alive = survival(confidence)
    lengths = top_k_by_survival(torch.from_numpy(alive), budget)
    assert lengths.sum() == min(budget, alive.size)
    kept = sum(alive[r, :n].sum() for r, n in enumerate(lengths.tolist()))
    assert kept == pytest.approx(np.sort(alive.ravel())[::-1][:budget].sum())


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_length_chosen_before_a_draft_is_the_best(data):
    """Of all lengths, each with the schedule that looking past drops finds."""
    alive = survival(data.draw(CONFIDENCE))
    rows, positions = alive.shape
    draft = np.cumsum(data.draw(hnp.arrays(float, positions, elements=st.floats(0.01, 1))))
    sizes = 1 + np.cumsum(data.draw(hnp.arrays(float, positions + 1, elements=st.floats(0.01, 1))))
    theta, length, count = best_length(alive, draft, sizes)

    def rate(g, n):
        best = np.sort(alive[:, :g].ravel())[::-1][:n].sum()
        return (rows + best) / (draft[g - 1] + np.interp(1 + n / rows, np.arange(1, positions + 2), sizes))

    options = {(g, n): rate(g, n) for g in range(1, positions + 1) for n in range(1, rows * g + 1)}
    assert theta == pytest.approx(max(options.values())) == pytest.approx(rate(length, count))


# -- What the rounds have shown --------------------------------------------------------------------------------------


def rounds(estimates, count, confidence, accepted):
    rows = list(range(len(estimates.expected)))
    for _ in range(count):
        c = np.tile(confidence, (len(rows), 1))
        alive = estimates.survival(c, rows)
        estimates.learn(rows, c, alive, np.full(len(rows), c.shape[1]), np.asarray(accepted))


def test_confidence_that_promises_too_much_is_corrected():
    shared = AcceptanceStats.initial(3)
    rounds(RowEstimates(shared, 4), 50, [0.9, 0.9, 0.9], [0, 0, 0, 0])
    assert shared.correction < 0.1
    assert RowEstimates(shared, 1).survival(np.full((1, 3), 0.9), [0])[0, 0] < 0.1


def test_confidence_that_is_right_is_left_alone():
    shared, chance = AcceptanceStats.initial(1), np.random.default_rng(0)
    estimates = RowEstimates(shared, 8)
    for _ in range(100):
        rounds(estimates, 1, [0.6], chance.random(8) < 0.6)
    assert shared.correction == pytest.approx(1, abs=0.06)


def test_a_row_whose_drafts_fail_is_told_from_the_others():
    estimates = RowEstimates(AcceptanceStats.initial(4), 3)
    rounds(estimates, 30, [0.8] * 4, [3, 0, 3])
    assert estimates.corrections[1] < 0.35 * min(estimates.corrections[[0, 2]])


def test_without_a_confidence_head_acceptance_by_position_is_the_estimate():
    shared = AcceptanceStats.initial(3)
    rounds(RowEstimates(shared, 10), 40, [0.5] * 3, [3] * 5 + [1] * 5)
    assert shared.confidence == pytest.approx([1.0, 0.5, 1.0], abs=0.05)


# -- Plans -----------------------------------------------------------------------------------------------------------


def load_schedule(rows, block_size=4, ahead=False, threshold=None, costs=None, shared=None):
    return LoadSchedule(
        Settings(block_size, "load", threshold),
        shared or AcceptanceStats.initial(block_size),
        rows,
        costs or FixedCosts(block_size),
        packs=True,
        runs_ahead=ahead,
    )


def simulate(schedule, accepts, count, confidence=0.8, load=None):
    """Rounds of a schedule whose drafts are accepted up to accepts[r]; what each round planned and verified."""
    rows, history = len(accepts), []
    max_drafts = [100] * rows
    for _ in range(count):
        plan = schedule.plan(max_drafts, 128, load or Load(rows, 0))
        lengths = np.zeros(rows, dtype=int)
        if plan.rows:
            c = np.full((len(plan.rows), plan.length), confidence)
            alive = np.zeros((rows, plan.length))
            alive[plan.rows] = schedule.estimates.survival(c, plan.rows)
            lengths = schedule.choose(plan, alive, max_drafts)
            kept = np.minimum(np.array(accepts), lengths)[plan.rows]
            schedule.estimates.learn(plan.rows, c, alive[plan.rows], lengths[plan.rows], kept)
        history.append((plan, lengths))
    return history


def test_good_drafts_are_verified_and_more_of_them_when_the_device_is_idle():
    means = {}
    for others in (0, 4000):
        costs = FixedCosts(4)
        # A device with room up to some tokens, beyond which time grows with every one.
        costs.verify = lambda rows, context, packed=False: 1 + np.maximum(rows * np.arange(1, 6) - 64, 0) / 64
        history = simulate(load_schedule(8, costs=costs), [4] * 8, 40, load=Load(8, others))
        means[others] = np.mean([lengths.mean() for _, lengths in history])
    assert means[0] > 3 > 1 > means[4000]


def test_drafts_that_all_fail_cost_an_occasional_probe():
    for rows in (1, 16):
        shared = AcceptanceStats.initial(4)
        history = simulate(load_schedule(rows, shared=shared), [0] * rows, 400)
        assert not any(plan.rows for plan, _ in history[-1:]) or history[-1][0].probe
        late = [plan for plan, _ in history[100:] if plan.rows]
        assert all(plan.probe for plan in late) and 1 <= len(late) <= 6, (rows, len(late))
        # A later call with the same pair starts from what is known.
        again = simulate(load_schedule(rows, shared=shared), [0] * rows, 50)
        assert sum(bool(plan.rows) for plan, _ in again) <= 1


def test_rest_goes_on_from_one_call_to_the_next():
    """Calls that are shorter than the rest: without memory of it no call would ever try again."""
    shared = AcceptanceStats.initial(4)
    simulate(load_schedule(4, shared=shared), [0] * 4, 400)
    tries = [
        sum(bool(plan.rows) for plan, _ in simulate(load_schedule(4, shared=shared), [0] * 4, 40)) for _ in range(12)
    ]
    assert 2 <= sum(tries) <= 6


def test_few_rows_of_many_probe_and_others_the_next_time():
    shared = AcceptanceStats.initial(4)
    schedule = load_schedule(16, shared=shared)
    probes = [plan.rows for plan, _ in simulate(schedule, [0] * 16, 300) if plan.probe]
    assert all(len(rows) == 1 for rows in probes) and not set(probes[0]) & set(probes[1])


def test_rows_that_did_not_draft_verify_nothing_where_the_host_runs_ahead():
    schedule = load_schedule(3, ahead=True)
    confidence, max_drafts = torch.full((3, 2), 0.9), torch.tensor([9, 0, 9])
    for plan in (Plan([0, 2], 2, budget=4), Plan([0, 2], 2, True, 4), Plan([0, 2], 2, True, 4, probe=True)):
        assert schedule.choose_on_device(plan, confidence, max_drafts).tolist() == [2, 0, 2]


def test_drafting_does_not_begin_where_reading_the_prompt_costs_more():
    costs = FixedCosts(4, reading=1000.0)
    max_drafts = [40] * 4
    assert load_schedule(4, costs=costs).plan(max_drafts, 128, Load(4, 0)).rows
    assert not load_schedule(4, costs=costs).plan(max_drafts, 128, Load(4, 0), pending=128).rows


def test_drafting_comes_back_when_drafts_succeed_again():
    shared = AcceptanceStats.initial(4)
    schedule = load_schedule(4, shared=shared)
    simulate(schedule, [0] * 4, 100)
    history = simulate(schedule, [4] * 4, 1200)
    assert np.mean([len(plan.rows) for plan, _ in history[-50:]]) > 3


def test_a_threshold_prunes():
    for schedule in (load_schedule(2, threshold=0.7), load_schedule(2, threshold=0.7, ahead=True)):
        alive = np.array([[0.9, 0.8, 0.6, 0.5], [0.6, 0.5, 0.4, 0.3]])
        plan = Plan([0, 1], 4, packed=True, budget=8, costs=Costs(*[np.linspace(1, 1.01, 5)] * 3))
        assert schedule.choose(plan, alive, np.array([9, 9])).tolist() == [2, 0]
        confidence = torch.from_numpy(alive / np.concatenate([[[1], [1]], alive[:, :-1]], axis=1))
        assert schedule.choose_on_device(plan, confidence, torch.tensor([9, 9])).tolist() == [2, 0]


def test_running_ahead_ranks_by_this_round_within_the_budget():
    schedule = load_schedule(2, ahead=True)
    plan = Plan([0, 1], 3, packed=True, budget=3)
    confidence = torch.tensor([[0.95, 0.9, 0.9], [0.5, 0.9, 0.9]], dtype=torch.float64)
    assert schedule.choose_on_device(plan, confidence, torch.tensor([9, 9])).tolist() == [3, 0]
    assert schedule.choose_on_device(plan, confidence, torch.tensor([1, 9])).tolist()[0] == 1


# -- The switch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    target = tiny_target(sharpness=3)
    return target, tiny_head(target)


def lengths_of(pair, rows=3, **kwargs):
    target, head = pair
    ids = torch.arange(1, 1 + 4 * rows).view(rows, 4)
    kwargs = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True} | kwargs
    return target.generate(input_ids=ids, assistant_model=head, **kwargs).dspark


def test_num_assistant_tokens_caps_the_length(pair):
    for most in (1, 2, 99):
        pair[1].generation_config.num_assistant_tokens = most
        longest = max(length for row in lengths_of(pair).verified_lengths for length in row)
        assert longest == min(most, 4)


def test_threshold_of_the_head(pair):
    pair[1].generation_config.assistant_confidence_threshold = 1.0
    stats = lengths_of(pair)
    assert sum(stats.verified) == 0 and sum(stats.drafted) > 0


@pytest.mark.parametrize(
    "setting",
    [
        {"num_assistant_tokens": 0},
        {"num_assistant_tokens_schedule": "heuristic"},
        {"assistant_confidence_threshold": 1.5},
    ],
)
def test_settings_without_a_meaning_are_refused(pair, setting):
    pair[1].generation_config.update(**setting)
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        lengths_of(pair)


def test_a_head_without_a_confidence_head_learns_from_acceptance(drafting_pays):
    target = tiny_target(sharpness=3)
    head = tiny_head(target, enable_confidence_head=False)
    head.generation_config.num_assistant_tokens_schedule = "load"
    drafted = 0
    for rows in (1, 3):
        ids = torch.arange(1, 1 + 4 * rows).view(rows, 4)
        kwargs = {"input_ids": ids, "max_new_tokens": 80, "do_sample": False, "return_dict_in_generate": True}
        output = target.generate(**kwargs, assistant_model=head)
        assert torch.equal(output.sequences, target.generate(**kwargs).sequences)
        drafted += sum(output.dspark.drafted)
    assert drafted > 0
    shared = acceptance_of(head, target)
    assert shared.confidence[0] == pytest.approx(shared.accepted[0] / shared.tested[0], abs=0.15)


def test_statistics_of_a_schedule(pair, drafting_pays):
    """Lengths, expectations and load of every round, and expectations that are near what came."""
    head = pair[1]
    head.generation_config.num_assistant_tokens_schedule = "load"
    stats = lengths_of(pair, max_new_tokens=120)
    assert len(stats.load) == stats.rounds and set(stats.load) <= {1, 2, 3}
    for row in range(3):
        lists = (stats.committed_lengths, stats.verified_lengths, stats.expected_lengths, stats.confidence)
        assert len({len(values[row]) for values in lists}) == 1
        assert [len(c) for c in stats.confidence[row]] == stats.drafted_lengths[row]
        assert [len(tokens) for tokens in stats.draft_tokens[row]] == stats.drafted_lengths[row]
    rounds_of_rows = sum(map(len, stats.committed_lengths))
    expected = sum(map(sum, stats.expected_lengths)) / rounds_of_rows
    assert expected == pytest.approx(stats.tau, rel=0.25)
    assert stats.schedule_seconds > 0


def test_what_is_known_of_positions_is_kept_while_they_are_not_drafted():
    shared = AcceptanceStats.initial(3)
    shared.learn(np.array([100, 80, 60]), np.array([80, 60, 20]), np.array([80.0, 60.0, 20.0]))
    last = shared.confidence[2]
    for _ in range(100):
        shared.learn(np.array([16]), np.array([8]), np.array([8.0]))
    assert shared.confidence[2] == last and shared.confidence[0] == pytest.approx(0.5, abs=0.02)


def test_a_length_that_is_hardly_known_is_tried():
    costs = FixedCosts(4)
    dear = lambda rows, context, pending=0: FixedCosts.draft(costs, rows, context) + np.array([0, 0, 0.75, 0.9])  # noqa: E731
    tried = {}
    for unsure in (0.0, 0.4):
        costs.draft, costs.unsure = dear, lambda rows, context, own=unsure: np.array([0, 0, 0, own, own])
        history = simulate(load_schedule(1, costs=costs, ahead=True), [4], 200)
        tried[unsure] = {plan.length for plan, _ in history[20:]}
    assert tried[0.0] == {2} and max(tried[0.4]) > 2


def test_a_plan_that_is_found_right_again_lasts_longer():
    schedule, made = load_schedule(2), []
    best = schedule._best
    schedule._best = lambda *args: made.append(1) or best(*args)
    simulate(schedule, [4, 4], 200)
    assert 12 < len(made) < 24


def test_before_anything_is_known_of_the_device_nothing_is_drafted():
    costs = CostModel(4, 0.3, "cpu")
    schedule = load_schedule(1, costs=costs)
    assert not schedule.plan([40], 20, Load(1, 0)).rows
    schedule.observe(Step(0, 0, 0, 1, 1, False, 20), Load(1, 0), 0.0, 0.01)
    assert costs.pace == pytest.approx(0.01, rel=0.05) and schedule.plan([40], 21, Load(1, 0)).rows


def test_rounds_beside_others_say_only_how_fast_the_device_is():
    costs = CostModel(4, 0.3, "cpu")
    schedule = load_schedule(1, costs=costs)
    step = Step(0, 0, 0, 1, 1, False, 20)
    schedule.observe(step, Load(1, 5), 0.0, 0.01)
    pace = costs.pace
    schedule.observe(step, Load(1, 5), 0.0, 0.04)
    assert costs.pace == pace
    schedule.observe(step, Load(1, 0), 0.0, 0.04)
    assert costs.pace > pace
