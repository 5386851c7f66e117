"""The demo without a browser: what its tabs compute from real runs of the embedded pair."""

import itertools
import pickle
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import tiny_head, tiny_target, whole_blocks
from transformers import PreTrainedTokenizerFast, TextStreamer

import dspark_hf
from dspark_hf.evaluation.prompts import sampling
from dspark_hf.evaluation.verify import BROKEN, IDENTICAL
from dspark_hf.generation.engine import Engine as Rounds
from dspark_hf.serving.request import RequestOutput

gr = pytest.importorskip("gradio", reason="the demo needs the extra `demo`")

from dspark_hf.demo import chat, load, parts, race, rounds  # noqa: E402
from dspark_hf.demo.generation import Committed, Finished, Generation  # noqa: E402
from dspark_hf.demo.requests import Requests  # noqa: E402
from dspark_hf.demo.session import REPLACEMENT, DemoSession, Stop, measure  # noqa: E402

ROOT = Path(__file__).parents[1]
PROMPT = [{"role": "user", "content": race.EXAMPLES[0]}]
MATHS = [{"role": "user", "content": "What is 3 times 4?"}]
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="module")
def session() -> Iterator[DemoSession]:
    model, head, tokenizer = dspark_hf.embedded_pair(dtype=torch.float32)
    made = DemoSession(model, whole_blocks(head), tokenizer)
    yield made
    made.manager.stop(hard_stop=True)


def generation(session: DemoSession, ids: list[int], most: int, draft: bool, temperature: float = 0.0) -> Generation:
    return Generation(ids, draft, session.settings(most, temperature))


def plain_tokens(session: DemoSession, ids: list[int], most: int) -> list[int]:
    return session.generate(ids, None, max_new_tokens=most, do_sample=False).sequences[0, len(ids) :].tolist()


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds, for as long as a machine may be slow."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- Engine ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_what_generate_commits(session):
    ids = session.encode(PROMPT)
    events = [event for event in session.stream(generation(session, ids, 40, True), Stop()) if event is not None]
    assert isinstance(events[-1], Finished) and events[-1].stats.rounds == len(events) - 2
    tokens = [token for event in events if isinstance(event, Committed) for token in event.tokens]
    assert tokens == plain_tokens(session, ids, 40)
    times = [event.seconds for event in events]
    assert times == sorted(times) and times[0] > 0


@pytest.mark.parametrize("how", ["stop", "close"])
def test_the_model_is_free_at_once(session, how):
    """After a stop, and after a visitor who left: another one's work need not wait for the rest of the answer."""
    ids, stop, passes = session.encode(PROMPT), Stop(), []
    events = session.stream(generation(session, ids, session.most_new_tokens, False, temperature=1.5), stop)
    next(event for event in events if isinstance(event, Committed))
    counting = session.model.register_forward_pre_hook(lambda *args: passes.append(1))
    try:
        if how == "stop":
            stop.requested = True
            assert not any(isinstance(event, Finished) for event in events)
        else:
            events.close()
        list(session.stream(measure, Stop()))
    finally:
        counting.remove()
    assert len(passes) < session.most_new_tokens / 2


def test_a_generation_has_the_model_to_itself(session, monkeypatch):
    """A request that is asked for meanwhile decodes when it is over."""
    happened, step, generate = [], Rounds.step, session.generate
    alone = Generation(session.encode(PROMPT), False, session.settings(200) | {"min_new_tokens": 200})
    measuring = session.stream(alone, Stop())
    monkeypatch.setattr(Rounds, "step", lambda self: happened.append("round") or step(self))
    monkeypatch.setattr(session, "generate", lambda *a, **k: (generate(*a, **k), happened.append("generated"))[0])
    next(event for event in measuring if isinstance(event, Committed))
    answering = chat.answer(session, MATHS, 10, None, None, Stop())
    assert next(answering) is None
    *_, answer = answering
    assert answer.ended and happened[0] == "generated" and set(happened[1:]) == {"round"}


@pytest.mark.parametrize("text, message", [("  ", "Write a prompt"), ("many words " * 600, "takes 512 tokens")])
def test_prompts_that_are_refused(session, text, message):
    with pytest.raises(gr.Error, match=message):
        session.encode([{"role": "user", "content": text}])


def test_very_long_text_is_refused_before_it_is_read(session):
    with pytest.raises(gr.Error, match="10,000,000 characters"):
        session.encode([{"role": "user", "content": "a" * 10_000_000}])


def test_the_longest_prompt_and_answer_fit(session):
    positions = session.model.config.max_position_embeddings
    assert session.most_prompt_tokens + session.most_new_tokens + session.head.config.block_size <= positions


def test_a_target_of_few_positions(session):
    """All tabs work, with a smaller slider; nothing is read behind the last position."""
    model = tiny_target(vocab_size=len(session.tokenizer), max_position_embeddings=32)
    short = DemoSession(model, tiny_head(model), session.tokenizer)
    assert short.most_prompt_tokens == 16 and short.most_new_tokens == 32 - 16 - 4
    with gr.Blocks():
        slider = parts.max_tokens(short.most_new_tokens)
    assert (slider.minimum, slider.maximum, slider.value) == (1, 12, 12)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    *_, answer = chat.answer(short, [{"role": "user", "content": "Hi"}], None, None, None, Stop())
    assert answer.ended and len(answer.tokens) == 12 and answer.plain_step > 0
    prompts = tuple(map(short.own_prompt, load.DEFAULT_PROMPTS))
    events = short.stream(load.Load(load.Level(2), prompts, 0.1), Stop())
    next(event for event in events if isinstance(event, load.Turn) and event.users == 2)
    events.close()
    short.manager.stop(hard_stop=True)
    assert max(lengths) < 32
    with pytest.raises(gr.Error, match="takes 16 tokens"):
        short.encode(PROMPT)
    with pytest.raises(ValueError, match="The target has 9 positions: too few"):
        model.config.max_position_embeddings = 9
        DemoSession(model, short.head, session.tokenizer)


def test_emptied_fields_count_as_their_defaults(session):
    assert session.settings() == {"max_new_tokens": 256} | sampling(0)
    assert session.settings(None, None, 0.5) == session.settings(256, 0.0, None)
    assert session.settings(7, 0.5) == {"max_new_tokens": 7} | sampling(0.5)
    assert session.settings(7, 0.5, 0.9) == {"max_new_tokens": 7} | sampling(0.5) | {"top_p": 0.9}
    with gr.Blocks() as page:
        for tab in (race.tab, rounds.tab, load.tab, lambda of: chat.tab(of, True)):
            tab(session)
    fields = [block for block in page.blocks.values() if isinstance(block, gr.Slider) and block.visible]
    assert len(fields) == 8 and [field.preprocess(None) for field in fields] == [None] * 8
    assert [field.preprocess(field.value) for field in fields] == [field.value for field in fields]
    with pytest.raises(gr.Error, match="greater than maximum"):
        fields[0].preprocess(10_000)
    for work in (race.race, rounds.run):
        assert list(work(session, session.encode([{"role": "user", "content": "Hi"}]), None, None, Stop()))


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: bytes of characters that it has no token for, which it decodes a run at a time."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\N{LOWER ONE EIGHTH BLOCK}": 256}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("fallback", [False, True])
def test_characters_are_shown_when_they_are_whole(session, fallback):
    """However rounds cut a text into tokens, what is shown grows, and holds nothing that is put right later."""
    tokenizer = byte_fallback_tokenizer() if fallback else session.tokenizer
    text = "a Ω 🙂🙂 你好 \N{REPLACEMENT CHARACTER} b 🙂"
    tokens = list(text.encode()) if fallback else tokenizer.encode(text)
    assert len(tokens) > len(text) and tokenizer.decode(tokens) == text
    other = DemoSession(session.model, session.head, tokenizer)
    shown = [other.decode(tokens[:count], ended=False) for count in range(len(tokens) + 1)]
    assert all(text.startswith(part) for part in shown) and shown[-1] == text
    assert [len(part) for part in shown] == sorted(len(part) for part in shown)
    whole = [part for part in shown if REPLACEMENT not in part]
    assert set(whole) >= {text[:count] for count in range(text.index(REPLACEMENT)) if text[count - 1 : count] != " "}
    # A text that ends in half a character says so.
    assert other.decode(tokens[:-1]).endswith(REPLACEMENT)


@pytest.mark.parametrize("fallback", [False, True])
def test_the_streamer_of_the_command_shows_whole_characters(session, fallback):
    """`dspark-hf generate` streams blocks of any length through transformers' own."""

    class Printed(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            printed.append(text)

    tokenizer = byte_fallback_tokenizer() if fallback else session.tokenizer
    text = "a Ω 🙂🙂 你好\n🙂 你🙂好 b"
    tokens = list(text.encode()) if fallback else tokenizer.encode(text)
    for size in range(1, 8):
        printed, streamer = [], Printed(tokenizer)
        for start in range(0, len(tokens), size):
            streamer.put(torch.tensor(tokens[start : start + size]))
        streamer.end()
        assert "".join(printed) == text and not any(REPLACEMENT in part for part in printed)


def test_a_failure_is_a_message_and_leaves_the_model_free(session):
    def fails(session):
        yield None
        raise RuntimeError("no memory left")

    with pytest.raises(gr.Error, match="RuntimeError: no memory left"):
        list(session.stream(fails, Stop()))
    events = list(session.stream(generation(session, [5], 1, False), Stop()))
    assert isinstance(events[-1], Finished)


def test_a_failing_generation_is_a_message_too(session):
    with pytest.raises(gr.Error, match="model failed|Error"):
        list(session.stream(generation(session, [10**9], 4, True), Stop()))
    assert isinstance(list(session.stream(generation(session, [5], 1, False), Stop()))[-1], Finished)


def test_the_decorator_of_zero_gpu_spaces(monkeypatch):
    """Where `spaces` is installed, all work on the model goes through its decorator."""

    class Spaces:
        @staticmethod
        def GPU(work):
            def decorated(*args):
                calls.append(work.__name__)
                yield from work(*args)

            return decorated

    calls = []
    monkeypatch.setitem(sys.modules, "spaces", Spaces)
    model, head, tokenizer = dspark_hf.embedded_pair(dtype=torch.float32)
    other = DemoSession(model, whole_blocks(head), tokenizer)
    works = [
        generation(other, [5, 6], 2, True),
        chat.Question([5, 6], other.settings(2)),
        load.Load(load.Level(), (), 1.0),
    ]
    assert list(map(pickle.dumps, works))
    events = other.stream(works[0], Stop())
    assert any(isinstance(event, Finished) for event in events) and calls == ["_events"]
    other.manager.stop(hard_stop=True)


# -- Race -----------------------------------------------------------------------------------------------------------


def test_greedy_race(session):
    *_, result = race.race(session, session.encode(PROMPT), 60, 0.0, Stop())
    assert result.plain.tokens == result.dspark.tokens and len(result.plain.tokens) == 60
    assert result.verdict.startswith(f"{IDENTICAL}: the same 60 tokens") and result.kind == "good"
    assert result.plain.tau == 1 and result.dspark.tau > 1
    assert result.speedup == pytest.approx(result.plain.seconds / result.dspark.seconds)


def test_a_race_that_samples_claims_no_identity(session):
    *_, result = race.race(session, session.encode(PROMPT), 20, 1.0, Stop())
    assert IDENTICAL not in result.verdict and "exact in distribution" in result.verdict


def test_a_wrong_token_is_called_broken(session):
    ids = session.encode(PROMPT)
    *_, result = race.race(session, ids, 12, 0.0, Stop())
    wrong = next(token for token in itertools.count(100) if token != result.plain.tokens[5])
    result.dspark.commits = [Committed(0.1, [*result.plain.tokens[:5], wrong])]
    verdict, kind = race._verdict(session, ids, result, 0.0, Stop())
    assert verdict.startswith(f"{BROKEN}: token 6") and kind == "bad"
    best = list(session.stream(race.Gap(ids + result.plain.tokens[:5], result.plain.tokens[5]), Stop()))
    assert best[-1] is True


def test_a_stopped_race_has_no_verdict(session):
    stop = Stop()
    seen = []
    for result in race.race(session, session.encode(PROMPT), session.most_new_tokens, 1.5, stop):
        seen.append(result.verdict)
        stop.requested = True
    assert seen == ["", "Stopped."] and not result.kind


def test_a_replay_keeps_the_times_of_the_runs(monkeypatch):
    monkeypatch.setattr(race, "REPLAY_SECONDS", 0.5)
    commits = [Committed(0.1 * i, [i]) for i in range(1, 11)]
    slow, fast = race.Side(False, commits, 1.0, True), race.Side(True, [Committed(0.3, list(range(10)))], 0.3, True)
    for clock, slowed, plain, dspark in race.replay(race.Race(slow, fast)):
        assert slowed == 1
        assert len(plain.tokens) == sum(commit.seconds <= clock for commit in commits) or clock == 1.0
        assert dspark.ended == (clock >= 0.3)
    assert clock == 1.0 and plain.ended and len(plain.tokens) == 10


# -- Chat -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_what_plain_generate_says(session):
    *_, answer = chat.answer(session, PROMPT, 60, 0.0, 1.0, Stop())
    assert answer.ended and answer.tokens == plain_tokens(session, session.encode(PROMPT), 60)
    figures = answer.figures()
    assert figures["tokens"] == "60" and float(figures["tau"]) > 1 and float(figures["speed-up"][:-1]) > 0


def test_numbers_of_an_answer():
    def answer(tokens: list[int], times: list[float], **counts) -> chat.Answer:
        return chat.Answer(RequestOutput("a", generated_tokens=tokens, timestamps=times, **counts), 3, 0.01)

    assert answer([1], [1.0]).figures() == chat.NO_FIGURES | {"tokens": "1", "others in the batch": "3"}
    figures = answer([1, 2, 3, 4, 5], [1.0, 1.02, 1.02, 1.02, 1.03], rounds=2).figures()
    assert figures == {"tokens/s": "133", "speed-up": "1.33x", "tau": "2.00", "tokens": "5", "others in the batch": "3"}


def test_the_next_turn_of_a_chat_reads_only_what_is_new(session):
    *_, first = chat.answer(session, MATHS, 30, None, None, Stop())
    said = {"role": "assistant", "content": session.decode(first.tokens)}
    history = [*MATHS, said, {"role": "user", "content": "And 5 times 4?"}]
    lengths = []
    seen = session.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["position_ids"].shape[-1]), with_kwargs=True
    )
    try:
        *_, second = chat.answer(session, history, 30, None, None, Stop())
    finally:
        seen.remove()
    ids = session.encode(history)
    assert second.tokens == plain_tokens(session, ids, 30)
    assert lengths[0] < len(ids) - len(session.encode(MATHS))


def test_a_visitor_who_leaves_frees_the_row(session, monkeypatch):
    """Rounds wait until then, from the third on; of an answer of a dozen rounds one is under way at most."""
    rounds_begun, left, step = [], threading.Event(), Rounds.step

    def held(self):
        rounds_begun.append(1)
        assert len(rounds_begun) < 3 or left.wait(60)
        return step(self)

    monkeypatch.setattr(Rounds, "step", held)
    answering = chat.answer(session, PROMPT, session.most_new_tokens, None, None, Stop())
    next(answer for answer in answering if answer is not None)
    wait_for(lambda: len(rounds_begun) == 3)
    assert session.manager.num_running == 1
    answering.close()
    left.set()
    wait_for(lambda: session.manager.num_running == 0)
    assert len(rounds_begun) <= 4


# -- Inside a round -------------------------------------------------------------------------------------------------


def test_the_story_adds_up_to_the_text(session):
    ids = session.encode(PROMPT)
    *_, trace = rounds.run(session, ids, 60, 0.0, Stop())
    tokens = [trace.first]
    for one in trace.rounds:
        assert len(one.drafts) == len(one.confidence) >= one.verified >= one.accepted
        tokens += one.drafts[: one.accepted]
        if one.own is not None:
            tokens.append(one.own)
            # A correction differs from the draft that it replaced.
            assert one.own_kind != rounds.CORRECTION or one.own != one.drafts[one.accepted]
    assert tokens == plain_tokens(session, ids, 60)
    shown = re.sub("<br>", "", rounds.text(session, trace, len(trace.rounds)))
    assert len(re.findall("<span", shown)) == 60


def test_acceptance_by_position():
    whole = rounds.Round([1, 2], [0.9, 0.5], verified=2, accepted=2, own=3)
    half = rounds.Round([1, 2], [0.7, 0.5], verified=2, accepted=1, own=3)
    short = rounds.Round([1, 2], [0.8, 0.1], verified=1, accepted=0, own=3)
    ended = rounds.Round([1, 2], [1.0, 1.0], verified=2, accepted=1, own=None)
    table = rounds.acceptance([whole, half, short, ended], 3).set_index(["what", "position"])["share"]
    assert table["survived"].to_dict() == pytest.approx({1: 3 / 4, 2: 1 / 2})
    assert table["predicted"].to_dict() == pytest.approx({1: 3.4 / 4, 2: (0.45 + 0.35) / 2})
    assert rounds.acceptance([], 3) is None


def test_own_tokens_are_named():
    kinds = [rounds.Round([1, 2], [1, 1], v, a, 3).own_kind for v, a in ((2, 2), (2, 1), (0, 0))]
    assert kinds == [rounds.BONUS, rounds.CORRECTION, rounds.OWN]


def hostile_story(session: DemoSession) -> rounds.Trace:
    """A story whose every text would be markup."""
    tokens = session.tokenizer.encode(HOSTILE)
    accepted = rounds.Round(tokens, [0.5] * len(tokens), len(tokens), len(tokens), tokens[0])
    rejected = rounds.Round(tokens, [0.5] * len(tokens), len(tokens), 0, tokens[0])
    return rounds.Trace(tokens[0], [accepted, rejected], [1.0, 1.0], len(tokens))


def test_text_of_a_model_is_never_markup(session):
    trace = hostile_story(session)
    shown = rounds.text(session, trace, 2) + rounds.strips(session, trace, 2) + parts.note(HOSTILE)
    shown += chat.shown([{"role": "user", "content": HOSTILE}])[0]["content"]
    assert set(re.findall(r"<(\w+)", shown)) <= {"div", "span", "br", "code", "small", "i", "b"}
    assert "&lt;script" in shown


def test_characters_of_several_tokens(session):
    text = "a Ω 🙂 b"
    texts = parts.token_texts(session.tokenizer, session.tokenizer.encode(text))
    assert "".join(texts) == text and "" in texts


# -- Load -----------------------------------------------------------------------------------------------------------


def turns(session: DemoSession, count: int, level: load.Level, stop: Stop | None = None) -> list[load.Turn]:
    """The first turns of a load."""
    events = load.run(session, level, stop or Stop())
    found = list(itertools.islice((event for event in events if isinstance(event, load.Turn)), count))
    events.close()
    return found


@pytest.fixture
def short_turns(monkeypatch):
    monkeypatch.setattr(load, "TURN_SECONDS", 0.2)


def test_users_double_up_to_the_level_and_both_ways_take_turns(session, short_turns):
    found = turns(session, 6, load.Level(3))
    assert [(turn.users, turn.draft) for turn in found] == [(n, draft) for n in (1, 2, 3) for draft in (True, False)]
    for turn in found:
        assert turn.counts.seconds >= 0.2 and turn.counts.speed > 0
        if turn.draft:
            assert turn.counts.verified > 0 and turn.counts.tau > 1
        else:
            assert turn.counts.verified == 0 and turn.counts.tau == 1


def test_a_turn_does_not_wait_for_a_request_that_ended_before_it(session):
    with Requests(session.manager) as requests:
        users = load.Users(session, requests, (session.encode(MATHS),))
        users.most = 4
        users.become(2)
        wait_for(lambda: session.manager.num_running == session.manager.num_waiting == 0)
        events = itertools.islice(users.turn(True, 0.1), 100)
        assert next(event for event in events if isinstance(event, load.Turn)).counts.tokens > 0


def test_load_and_chat_share_a_batch(session, short_turns, monkeypatch):
    """And nothing that they do beside each other changes what is written."""
    rows, step = [], Rounds.step
    monkeypatch.setattr(Rounds, "step", lambda self: rows.append(len(self.rows)) or step(self))
    events = load.run(session, load.Level(2), Stop())
    next(event for event in events if isinstance(event, load.Turn) and event.users == 2)
    rows.clear()
    *_, answer = chat.answer(session, PROMPT, 40, None, None, Stop())
    # One of the two may just have ended.
    assert max(rows) >= 2 and answer.beside >= 1
    events.close()
    assert answer.tokens == plain_tokens(session, session.encode(PROMPT), 40)


def test_requests_of_a_load_join_and_leave(session, short_turns):
    level, batches = load.Level(4), []
    for event in load.run(session, level, Stop()):
        if isinstance(event, load.Batch):
            batches.append(event)
            # From four users to one: three requests are given up.
            if len(event.rows) == 4:
                level.users = 1
            elif level.users == 1:
                break
    assert {len(batch.rows) for batch in batches} >= {1, 4}
    for batch in batches:
        assert batch.joined - batch.left == len(batch.rows)
        assert all(0 <= share <= 1 for _, share, _ in batch.rows)
        numbers = [number for number, *_ in batch.rows]
        assert len(set(numbers)) == len(numbers) and max(numbers) <= batch.joined
    wait_for(lambda: session.manager.num_running == 0)
    assert session.manager.drafts


def test_what_a_load_shows():
    result = load.Result()
    assert result.speeds() is None and result.lengths() is None and set(result.figures().values()) == {"-"}
    result.take(load.Turn(2, True, load.Counts(1.0, 30, 10, 25, 20)))
    result.take(load.Turn(2, True, load.Counts(1.0, 50, 10, 15, 20)))
    result.take(load.Batch([(3, 0.25, True), (4, 0.5, False)], True, 3, 4, 2))
    # One line alone would be the only one that the plot ever has.
    assert result.speeds() is None
    result.take(load.Turn(2, False, load.Counts(2.0, 40, 40)))
    assert result.speeds().values.tolist() == [[2, 20.0, "plain"], [2, 40.0, "DSpark"]]
    assert result.lengths().values.tolist() == [[2, 3.0, "tau"], [2, 2.0, "drafts verified"]]
    assert result.figures() == {
        "in the batch": "3", "joined": "4", "left": "2", "DSpark tokens/s": "40", "plain tokens/s": "20",
        "speed-up": "2.00x", "tau": "3.00", "drafts verified": "2.00",
    }  # fmt: skip
    shown = load.rows(result.batch)
    assert re.findall(r'class="row( new)?"><span>#(\d)', shown) == [(" new", "3"), ("", "4")]


def test_a_stopped_load_ends(session, short_turns):
    stop = Stop()
    for event in load.run(session, load.Level(2), stop):
        stop.requested = isinstance(event, load.Turn)
    assert stop.requested
    wait_for(lambda: session.manager.num_running == 0)


def test_failures_of_requests_are_not_lost(session, short_turns, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Rounds, "step", lambda self: 1 / 0)
        with pytest.raises(gr.Error, match="ZeroDivisionError"):
            turns(session, 1, load.Level(2))
    assert turns(session, 1, load.Level(1))


# -- The Space and the command --------------------------------------------------------------------------------------


def test_the_space_asks_for_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["demo"]}
    assert set((ROOT / "demo" / "requirements.txt").read_text().split()) == wanted


def test_the_front_matter_of_the_space():
    import yaml

    front = yaml.safe_load((ROOT / "demo" / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and (ROOT / "demo" / front["app_file"]).exists()
    lowest = re.search(r"gradio>=([\d.]+)", (ROOT / "demo" / "requirements.txt").read_text()).group(1)
    assert tuple(map(int, front["sdk_version"].split("."))) >= tuple(map(int, lowest.split(".")))
    assert front["short_description"] and len(front["short_description"]) <= 60


@pytest.mark.slow
def test_memory_does_not_grow():
    """In a process of its own, as a demo is one: what other tests have freed would hide or add some."""
    script = Path(__file__).with_name("demo_memory.py")
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 10
