"""The demo without a browser: what its tabs compute from real runs of the embedded pair."""

import itertools
import re
import sys
import tomllib
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import tiny_head, tiny_target, whole_blocks
from transformers import PreTrainedTokenizerFast, TextStreamer

import dspark_hf
from dspark_hf.evaluation.verify import BROKEN, IDENTICAL
from dspark_hf.generation.engine import Engine as Rounds

gr = pytest.importorskip("gradio", reason="the demo needs the extra `demo`")

from dspark_hf.demo import chat, load, parts, race, rounds  # noqa: E402
from dspark_hf.demo.engine import (  # noqa: E402
    REPLACEMENT,
    Committed,
    Engine,
    Finished,
    Generation,
    Ready,
    Stop,
)

ROOT = Path(__file__).parents[1]
PROMPT = [{"role": "user", "content": race.EXAMPLES[0]}]
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="module")
def engine() -> Engine:
    model, head, tokenizer = dspark_hf.embedded_pair(dtype=torch.float32)
    return Engine(model, whole_blocks(head), tokenizer)


def plain_tokens(engine: Engine, ids: list[int], most: int) -> list[int]:
    return engine.generate(ids, None, max_new_tokens=most, do_sample=False).sequences[0, len(ids) :].tolist()


# -- Engine ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_what_generate_commits(engine):
    ids = engine.encode(PROMPT)
    events = [event for event in engine.stream(Generation(ids, 40, draft=True), Stop()) if event is not None]
    assert isinstance(events[0], Ready) and events[0].plain_step > 0
    assert isinstance(events[-1], Finished) and events[-1].stats.rounds == len(events) - 3
    tokens = [token for event in events if isinstance(event, Committed) for token in event.tokens]
    assert tokens == plain_tokens(engine, ids, 40)
    times = [event.seconds for event in events[1:]]
    assert times == sorted(times) and times[0] > 0


@pytest.mark.parametrize("how", ["stop", "close"])
def test_the_model_is_free_at_once(engine, how):
    """After a stop, and after a visitor who left: another one's work need not wait for the rest of the answer."""
    ids, stop, passes = engine.encode(PROMPT), Stop(), []
    events = engine.stream(Generation(ids, engine.most_new_tokens, draft=False, temperature=1.5), stop)
    next(event for event in events if isinstance(event, Committed))
    counting = engine.model.register_forward_pre_hook(lambda *args: passes.append(1))
    try:
        if how == "stop":
            stop.requested = True
            assert not any(isinstance(event, Finished) for event in events)
        else:
            events.close()
        next(event for event in engine.stream(Generation(ids, 1, draft=False), Stop()) if isinstance(event, Ready))
    finally:
        counting.remove()
    assert len(passes) < engine.most_new_tokens / 2


def test_one_after_the_other(engine):
    """Work that is asked for while another one's runs begins behind it."""
    ids = engine.encode(PROMPT)
    first = engine.stream(Generation(ids, 60, draft=False), Stop())
    next(event for event in first if isinstance(event, Committed))
    second = engine.stream(Generation(ids, 4, draft=False), Stop())
    assert next(second) is None
    list(first)
    assert [type(event) for event in second if event is not None] == [Ready, *[Committed] * 4, Finished]


@pytest.mark.parametrize("text, message", [("  ", "Write a prompt"), ("many words " * 600, "takes 512 tokens")])
def test_prompts_that_are_refused(engine, text, message):
    with pytest.raises(gr.Error, match=message):
        engine.encode([{"role": "user", "content": text}])


def test_very_long_text_is_refused_before_it_is_read(engine):
    with pytest.raises(gr.Error, match="10,000,000 characters"):
        engine.encode([{"role": "user", "content": "a" * 10_000_000}])


def test_the_longest_prompt_and_answer_fit(engine):
    positions = engine.model.config.max_position_embeddings
    assert engine.most_prompt_tokens + engine.most_new_tokens + engine.head.config.block_size <= positions


def test_a_target_of_few_positions(engine):
    """All tabs work, with a smaller slider; nothing is read behind the last position."""
    model = tiny_target(vocab_size=len(engine.tokenizer), max_position_embeddings=32)
    short = Engine(model, tiny_head(model), engine.tokenizer)
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
    assert any(
        isinstance(event, load.Measured)
        for event in short.stream(
            load.Slice(2, True, tuple(map(short.own_prompt, load.DEFAULT_PROMPTS)), seconds=0.1), Stop()
        )
    )
    assert max(lengths) < 32
    with pytest.raises(gr.Error, match="takes 16 tokens"):
        short.encode(PROMPT)
    with pytest.raises(ValueError, match="The target has 9 positions: too few"):
        model.config.max_position_embeddings = 9
        Engine(model, short.head, engine.tokenizer)


def test_emptied_fields_count_as_their_defaults(engine):
    ids = engine.encode(PROMPT)
    assert engine.generation(ids, True) == Generation(ids, 256, True, 0.0, 1.0)
    assert engine.generation(ids, False, None, None, None) == engine.generation(ids, False)
    assert engine.generation(ids, True, 7, 0.5, 0.9) == Generation(ids, 7, True, 0.5, 0.9)
    with gr.Blocks() as page:
        for tab in (race.tab, rounds.tab, load.tab, lambda of: chat.tab(of, True)):
            tab(engine)
    fields = [block for block in page.blocks.values() if isinstance(block, gr.Slider) and block.visible]
    assert len(fields) == 8 and [field.preprocess(None) for field in fields] == [None] * 8
    assert [field.preprocess(field.value) for field in fields] == [field.value for field in fields]
    with pytest.raises(gr.Error, match="greater than maximum"):
        fields[0].preprocess(10_000)
    for work in (race.race, rounds.run):
        assert list(work(engine, engine.encode([{"role": "user", "content": "Hi"}]), None, None, Stop()))


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: bytes of characters that it has no token for, which it decodes a run at a time."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\N{LOWER ONE EIGHTH BLOCK}": 256}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("fallback", [False, True])
def test_characters_are_shown_when_they_are_whole(engine, fallback):
    """However rounds cut a text into tokens, what is shown grows, and holds nothing that is put right later."""
    tokenizer = byte_fallback_tokenizer() if fallback else engine.tokenizer
    text = "a Ω 🙂🙂 你好 \N{REPLACEMENT CHARACTER} b 🙂"
    tokens = list(text.encode()) if fallback else tokenizer.encode(text)
    assert len(tokens) > len(text) and tokenizer.decode(tokens) == text
    other = Engine(engine.model, engine.head, tokenizer)
    shown = [other.decode(tokens[:count], ended=False) for count in range(len(tokens) + 1)]
    assert all(text.startswith(part) for part in shown) and shown[-1] == text
    assert [len(part) for part in shown] == sorted(len(part) for part in shown)
    whole = [part for part in shown if REPLACEMENT not in part]
    assert set(whole) >= {text[:count] for count in range(text.index(REPLACEMENT)) if text[count - 1 : count] != " "}
    # A text that ends in half a character says so.
    assert other.decode(tokens[:-1]).endswith(REPLACEMENT)


@pytest.mark.parametrize("fallback", [False, True])
def test_the_streamer_of_the_command_shows_whole_characters(engine, fallback):
    """`dspark-hf generate` streams blocks of any length through transformers' own."""

    class Printed(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            printed.append(text)

    tokenizer = byte_fallback_tokenizer() if fallback else engine.tokenizer
    text = "a Ω 🙂🙂 你好\n🙂 你🙂好 b"
    tokens = list(text.encode()) if fallback else tokenizer.encode(text)
    for size in range(1, 8):
        printed, streamer = [], Printed(tokenizer)
        for start in range(0, len(tokens), size):
            streamer.put(torch.tensor(tokens[start : start + size]))
        streamer.end()
        assert "".join(printed) == text and not any(REPLACEMENT in part for part in printed)


def test_a_failure_is_a_message_and_leaves_the_model_free(engine):
    def fails(engine, emit, stop):
        raise RuntimeError("no memory left")

    with pytest.raises(gr.Error, match="RuntimeError: no memory left"):
        list(engine.stream(fails, Stop()))
    assert any(isinstance(event, Ready) for event in engine.stream(Generation([5], 1, draft=False), Stop()))


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
    events = Engine(model, whole_blocks(head), tokenizer).stream(Generation([5, 6], 2, draft=True), Stop())
    assert any(isinstance(event, Finished) for event in events) and calls == ["_events"]


# -- Race -----------------------------------------------------------------------------------------------------------


def test_greedy_race(engine):
    *_, result = race.race(engine, engine.encode(PROMPT), 60, 0.0, Stop())
    assert result.plain.tokens == result.dspark.tokens and len(result.plain.tokens) == 60
    assert result.verdict.startswith(f"{IDENTICAL}: the same 60 tokens") and result.kind == "good"
    assert result.plain.tau == 1 and result.dspark.tau > 1
    assert result.speedup == pytest.approx(result.plain.seconds / result.dspark.seconds)


def test_a_race_that_samples_claims_no_identity(engine):
    *_, result = race.race(engine, engine.encode(PROMPT), 20, 1.0, Stop())
    assert IDENTICAL not in result.verdict and "exact in distribution" in result.verdict


def test_a_wrong_token_is_called_broken(engine):
    ids = engine.encode(PROMPT)
    *_, result = race.race(engine, ids, 12, 0.0, Stop())
    wrong = next(token for token in itertools.count(100) if token != result.plain.tokens[5])
    result.dspark.commits = [Committed(0.1, [*result.plain.tokens[:5], wrong])]
    verdict, kind = race._verdict(engine, ids, result, 0.0, Stop())
    assert verdict.startswith(f"{BROKEN}: token 6") and kind == "bad"
    best = list(engine.stream(race.Gap(ids + result.plain.tokens[:5], result.plain.tokens[5]), Stop()))
    assert best[-1] is True


def test_a_stopped_race_has_no_verdict(engine):
    stop = Stop()
    seen = []
    for result in race.race(engine, engine.encode(PROMPT), engine.most_new_tokens, 1.5, stop):
        seen.append(result.verdict)
        stop.requested = True
    assert seen == ["", "Stopped."] and not result.kind


def test_a_replay_keeps_the_times_of_the_runs(monkeypatch):
    monkeypatch.setattr(race, "REPLAY_SECONDS", 0.5)
    commits = [Committed(0.1 * i, [i]) for i in range(1, 11)]
    slow, fast = race.Run(False, commits, 1.0, True), race.Run(True, [Committed(0.3, list(range(10)))], 0.3, True)
    for clock, slowed, plain, dspark in race.replay(race.Race(slow, fast)):
        assert slowed == 1
        assert len(plain.tokens) == sum(commit.seconds <= clock for commit in commits) or clock == 1.0
        assert dspark.ended == (clock >= 0.3)
    assert clock == 1.0 and plain.ended and len(plain.tokens) == 10


# -- Chat -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_what_plain_generate_says(engine):
    *_, answer = chat.answer(engine, PROMPT, 60, 0.0, 1.0, Stop())
    assert answer.ended and answer.tokens == plain_tokens(engine, engine.encode(PROMPT), 60)
    figures = answer.figures()
    assert figures["tokens"] == "60" and float(figures["tau"]) > 1 and float(figures["speed-up"][:-1]) > 0


def test_numbers_of_an_answer():
    answer = chat.Answer(plain_step=0.01)
    assert answer.figures()["speed-up"] == "-"
    for event in (Committed(1.0, [1]), Committed(1.02, [2, 3, 4]), Committed(1.03, [5])):
        answer.take(event)
    assert answer.figures() == {"tokens/s": "133", "speed-up": "1.33x", "tau": "2.00", "tokens": "5"}


# -- Inside a round -------------------------------------------------------------------------------------------------


def test_the_story_adds_up_to_the_text(engine):
    ids = engine.encode(PROMPT)
    *_, told = rounds.run(engine, ids, 60, 0.0, Stop())
    tokens = [told.first]
    for one in told.rounds:
        assert len(one.drafts) == len(one.confidence) >= one.verified >= one.accepted
        tokens += one.drafts[: one.accepted]
        if one.own is not None:
            tokens.append(one.own)
            # A correction differs from the draft that it replaced.
            assert one.own_kind != rounds.CORRECTION or one.own != one.drafts[one.accepted]
    assert tokens == plain_tokens(engine, ids, 60)
    shown = re.sub("<br>", "", rounds.text(engine, told, len(told.rounds)))
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


def hostile_story(engine: Engine) -> rounds.Story:
    """A story whose every text would be markup."""
    tokens = engine.tokenizer.encode(HOSTILE)
    accepted = rounds.Round(tokens, [0.5] * len(tokens), len(tokens), len(tokens), tokens[0])
    rejected = rounds.Round(tokens, [0.5] * len(tokens), len(tokens), 0, tokens[0])
    return rounds.Story(tokens[0], [accepted, rejected], [1.0, 1.0], len(tokens))


def test_text_of_a_model_is_never_markup(engine):
    told = hostile_story(engine)
    shown = rounds.text(engine, told, 2) + rounds.strips(engine, told, 2) + parts.note(HOSTILE)
    shown += chat.shown([{"role": "user", "content": HOSTILE}])[0]["content"]
    assert set(re.findall(r"<(\w+)", shown)) <= {"div", "span", "br", "code", "small", "i", "b"}
    assert "&lt;script" in shown


def test_characters_of_several_tokens(engine):
    text = "a Ω 🙂 b"
    texts = parts.token_texts(engine.tokenizer, engine.tokenizer.encode(text))
    assert "".join(texts) == text and "" in texts


# -- Load -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [True, False])
def test_a_slice_of_concurrent_requests(engine, draft):
    prompts = (engine.encode(PROMPT), engine.encode([{"role": "user", "content": "What is 3 times 4?"}]))
    events = list(engine.stream(load.Slice(3, draft, prompts, seconds=0.3), Stop()))
    measured = events[-1]
    assert measured.speed > 0 and (measured.verified > 0) == (measured.tau > 1) == draft


def test_concurrent_requests_share_an_engine(engine, monkeypatch):
    rows, step = [], Rounds.step
    monkeypatch.setattr(Rounds, "step", lambda self: rows.append(len(self.rows)) or step(self))
    list(engine.stream(load.Slice(3, True, (engine.encode(PROMPT),), seconds=0.3), Stop()))
    assert max(rows) == 3


def test_failures_of_requests_that_share_an_engine_are_not_lost(engine, monkeypatch):
    monkeypatch.setattr(Rounds, "step", lambda self: 1 / 0)
    with pytest.raises(gr.Error, match="ZeroDivisionError"):
        list(engine.stream(load.Slice(2, True, (engine.encode(PROMPT),), seconds=0.1), Stop()))


def test_load_takes_turns_and_stops(engine, monkeypatch):
    monkeypatch.setattr(load, "SLICE_SECONDS", 0.1)
    stop, level, found = Stop(), load.Level(2), []
    for news in load.run(engine, level, stop):
        if news is not None:
            found.append(news[1])
            level.requests = 1
            stop.requested = len(found) == 3
    assert [(one.slice.draft, one.slice.requests) for one in found] == [(True, 2), (False, 1), (True, 1)]


def test_failures_of_requests_are_not_lost(engine):
    with pytest.raises(gr.Error, match="model failed|Error"):
        list(engine.stream(load.Slice(2, False, ([10**9],), seconds=0.1), Stop()))


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
def test_memory_does_not_grow(engine):
    """Resident memory after 30 more generations of every kind of work, against that after the first ten."""

    def generations(count: int) -> None:
        for i in range(count):
            *_, _ = race.race(engine, engine.encode(PROMPT), 128, 0.0, Stop())
            *_, _ = rounds.run(engine, engine.encode(PROMPT), 128, 1.0, Stop())
            list(engine.stream(load.Slice(1 + i % 4, i % 2 == 0, (engine.encode(PROMPT),), 0.2), Stop()))

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 2**20

    generations(10)
    before = resident()
    generations(30)
    print(f"resident memory: {before:.0f} MiB, after 30 more generations {resident():.0f} MiB")
    assert resident() - before < 20
