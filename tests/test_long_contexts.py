"""Long contexts: a window of the context is all that the head keeps where it is told to, prompts are read in pieces,
and what is written stays the target's."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_head, tiny_target
from shares import rest_slow
from test_batching import alone, config, results
from test_compiled import static
from test_compressed import batch as v4_batch
from test_compressed import pair as v4_pair
from test_hybrids import build as build_hybrid
from test_targets import DYNAMIC, LONGROPE, build
from transformers import GenerationConfig, LogitsProcessorList
from typer.testing import CliRunner

from dspark_hf import DSparkHead
from dspark_hf.cli import app
from dspark_hf.generation import drafting, pieces
from dspark_hf.generation.drafting import Drafter, window_of
from dspark_hf.generation.engine import Engine
from dspark_hf.generation.experience import costs_of
from dspark_hf.generation.processors import BlockProcessors
from dspark_hf.generation.releases import CACHE
from dspark_hf.generation.target import Target

ROWS, WINDOW = 3, 12
GREEDY = {"do_sample": False, "return_dict_in_generate": True}


def long_target(positions: int = 512, **kwargs):
    return tiny_target(vocab_size=40, sharpness=3, max_position_embeddings=positions, **kwargs)


def windowed(head: DSparkHead, window: int | None = WINDOW) -> DSparkHead:
    head.generation_config.draft_window = window
    return head


def prompts(length: int, rows: int = ROWS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded, each row a few tokens shorter than the one before."""
    ids = torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 5 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def unbounded(monkeypatch):
    """Calling it makes drafters that keep the whole context, whatever window their head has."""

    def drafter(head, target, rows):
        with monkeypatch.context() as patch:
            patch.setattr(drafting, "window_of", lambda head: None)
            return Drafter(head, target, rows)

    return drafter


# -- What a block sees ------------------------------------------------------------------------------------------------

SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": WINDOW, "num_hidden_layers": 2}
RULES = {
    "by row": SLIDING,
    "by block": SLIDING | {"window_counted_from": "block"},
    "by block, not causal": SLIDING | {"window_counted_from": "block", "sliding_is_causal": False},
    "shorter than a block": SLIDING | {"sliding_window": 3},
}


@torch.no_grad()
def compare(bounded: Drafter, whole: Drafter, rounds: int = 60) -> None:
    """Both draft the same after prompts and rounds of any length, in which some rows do not draft."""
    chance = torch.Generator().manual_seed(0)
    sampler = BlockProcessors(LogitsProcessorList(), do_sample=False).draft_sampler(None)
    for turn in range(rounds):
        longest = 40 if turn % 20 == 0 else 5
        features = torch.randn(ROWS, longest, 32, generator=chance)
        counts = torch.randint(1, longest + 1, (ROWS,), generator=chance).tolist()
        rows = [None, [0, 2], [1]][turn % 3]
        found = []
        for drafter in (bounded, whole):
            drafter.append(features.clone(), counts)
            anchors = torch.arange(1, 1 + ROWS)
            found.append(drafter.draft(anchors, drafter.head.config.gamma, sampler, rows))
        assert torch.equal(found[0].tokens, found[1].tokens)
        torch.testing.assert_close(found[0].confidence_logits, found[1].confidence_logits, atol=1e-5, rtol=1e-5)
    assert bounded.cache.lengths == whole.cache.lengths and min(bounded.cache.lengths) > 5 * WINDOW
    for layer in bounded.cache.layers:
        assert layer.keys.shape[2] == bounded.ring + 1 < whole.cache.layers[0].keys.shape[2]


@pytest.mark.parametrize("rule", RULES)
def test_heads_whose_layers_all_slide_keep_their_window_only(rule, unbounded):
    target = long_target()
    head = tiny_head(target, **RULES[rule])
    compare(Drafter(head, target, ROWS), unbounded(head, target, ROWS))


def test_a_window_that_the_user_chose_is_that_of_a_layer_that_slides(unbounded):
    target = long_target()
    head = windowed(tiny_head(target, num_hidden_layers=2))
    slides = tiny_head(target, **RULES["by block, not causal"])
    slides.load_state_dict(head.state_dict())
    compare(Drafter(head, target, ROWS), unbounded(slides, target, ROWS))


def test_the_narrower_of_two_windows_counts():
    target = tiny_target()
    assert window_of(tiny_head(target)) is None and window_of(windowed(tiny_head(target))) == WINDOW
    assert window_of(windowed(tiny_head(target, **SLIDING), 5)) == 5
    assert window_of(windowed(tiny_head(target, **SLIDING), 50)) == WINDOW
    mixed = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
    assert window_of(tiny_head(target, **mixed)) is None and window_of(windowed(tiny_head(target, **mixed), 9)) == 9


@pytest.mark.parametrize("window", [0, -1, 2.5, "2048", True])
def test_windows_that_mean_nothing_are_refused(window):
    target = tiny_target()
    with pytest.raises(ValueError, match="draft_window"):
        target.generate(torch.tensor([[1, 2]]), assistant_model=windowed(tiny_head(target), window), max_new_tokens=2)


def test_a_window_is_saved_with_the_head(tmp_path):
    windowed(tiny_head(tiny_target())).save_pretrained(tmp_path)
    assert window_of(DSparkHead.from_pretrained(tmp_path)) == WINDOW


def test_a_draft_costs_no_more_behind_its_window():
    target = tiny_target()
    head = tiny_head(target)
    growing = costs_of(head, Target(target, [0]))
    flat = costs_of(windowed(head), Target(target, [0]))
    assert (growing.draft(1, 4000) > growing.draft(1, WINDOW)).all()
    assert (flat.draft(1, 4000) == flat.draft(1, WINDOW)).all()
    assert (flat.verify(1, 4000) > flat.verify(1, WINDOW)).all()


# -- What is written --------------------------------------------------------------------------------------------------


@pytest.fixture
def engines(monkeypatch) -> list[Engine]:
    """Those that calls have made."""
    made, init = [], Engine.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Engine, "__init__", noted)
    return made


@pytest.mark.parametrize("window", [2, WINDOW])
def test_the_text_is_plain_to_the_last_position_and_memory_is_bounded(window, engines):
    target = long_target(128)
    head = windowed(tiny_head(target), window)
    kwargs = prompts(60) | {"max_length": 128} | GREEDY
    found = target.generate(**kwargs, assistant_model=head)
    assert found.sequences.shape[1] == 128
    assert torch.equal(found.sequences, target.generate(**kwargs).sequences)
    assert 0 < sum(found.dspark.accepted) < sum(found.dspark.verified)
    [layer] = engines[0].drafter.cache.layers
    assert layer.keys.shape[2] <= engines[0].drafter.ring + 1 < 30


def test_samples_with_a_window_are_reproducible_beside_others():
    target = long_target()
    head = windowed(tiny_head(target))
    chat = torch.randint(1, 40, (50,)).tolist()
    settings = GenerationConfig(do_sample=True, max_new_tokens=60)
    texts = []
    for others in (0, 3):
        with target.continuous_batching_context_manager(
            settings, continuous_batching_config=config(4), assistant_model=head
        ) as manager:
            for length in range(others):
                manager.add_request(chat[: 10 + length])
            own = manager.add_request(chat, seed=7)
            texts.append(results(manager, 1 + others)[own].generated_tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("rows", ["shuffled", "load"])
def test_any_schedule(rows, request):
    target = long_target()
    head = windowed(tiny_head(target))
    head.generation_config.num_assistant_tokens_schedule = "load"
    if rows == "shuffled":
        request.getfixturevalue("shuffled")
    kwargs = prompts(40) | {"max_new_tokens": 40} | GREEDY
    found = target.generate(**kwargs, assistant_model=head)
    assert torch.equal(found.sequences, target.generate(**kwargs).sequences)


@pytest.mark.slow
def test_compiled_rounds():
    target = long_target(1024)
    head, kwargs = windowed(tiny_head(target)), prompts(60) | {"max_new_tokens": 60} | GREEDY
    eager = target.generate(**kwargs, assistant_model=head)
    found = target.generate(**kwargs, assistant_model=head, **static())
    assert torch.equal(found.sequences, target.generate(**kwargs).sequences)
    assert found.dspark.draft_tokens == eager.dspark.draft_tokens


def test_a_conversation_goes_on_with_the_window_that_it_had():
    """As many drafts are accepted as when the whole text is read anew."""
    target = long_target()
    head = windowed(tiny_head(target))
    first = target.generate(**prompts(30), max_new_tokens=20, assistant_model=head, **GREEDY)
    ids = torch.cat([first.sequences, prompts(6, seed=1)["input_ids"]], dim=1)
    mask = torch.cat([prompts(30)["attention_mask"], torch.ones(ROWS, ids.shape[1] - 30, dtype=torch.long)], dim=1)
    kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 30, "assistant_model": head} | GREEDY
    afresh = target.generate(**kwargs)
    keys = first[CACHE].dspark.rows[0].draft[0][0]
    assert keys.shape[1] == WINDOW
    again = target.generate(**kwargs, **{CACHE: first[CACHE]})
    assert torch.equal(again.sequences, afresh.sequences)
    assert again.dspark.draft_tokens == afresh.dspark.draft_tokens


@pytest.mark.parametrize("pieces", [16, 512])
def test_requests_that_share_a_beginning(pieces):
    target = long_target()
    head = windowed(tiny_head(target))
    text = torch.randint(1, 40, (200,)).tolist()
    drafts = {}
    for shares in (True, False):
        with target.continuous_batching_context_manager(
            GenerationConfig(do_sample=False, max_new_tokens=20),
            continuous_batching_config=config(allow_block_sharing=shares, max_batch_tokens=pieces),
            assistant_model=head,
        ) as manager:
            manager.add_request(text)
            (answer,) = results(manager, 1).values()
            follow_up = text + answer.generated_tokens + [4, 8, 15]
            # The next turn; and a prompt that leaves the known text where the head has forgotten what came before.
            for prompt in (follow_up, text[:100] + [7, 7, 7]):
                manager.add_request(prompt)
                (found,) = results(manager, 1).values()
                assert found.generated_tokens == alone(target, prompt)
                drafts.setdefault(shares, []).append(found.rounds)
    assert drafts[True][0] == drafts[False][0]


# -- Prompts in pieces ------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, int]]:
    """Rows and tokens a row, at most, of every pass of the target by our rounds."""
    made: list[tuple[int, int]] = []

    def noted(method):
        def call(self, tokens, *args, **kwargs):
            # A packed pass is given in parts.
            shown = [tokens] if torch.is_tensor(tokens) else [part.tokens for part in tokens]
            made.extend(tuple(own.shape) for own in shown)
            return method(self, tokens, *args, **kwargs)

        return call

    for name in ("forward", "forward_packed"):
        monkeypatch.setattr(Target, name, noted(getattr(Target, name)))
    return made


def check_pieces(target, head, kwargs: dict, passes: list[tuple[int, int]], piece: int = 16) -> None:
    kwargs = kwargs | {"max_new_tokens": 16} | GREEDY
    plain = target.generate(**kwargs).sequences
    found = target.generate(**kwargs, assistant_model=head, prefill_chunk_size=piece)
    assert torch.equal(found.sequences, plain)
    assert max(tokens for _, tokens in passes) == piece and sum(tokens == piece for _, tokens in passes) >= 2
    passes.clear()
    whole = target.generate(**kwargs, assistant_model=head)
    assert max(tokens for _, tokens in passes) > piece
    assert found.dspark.draft_tokens == whole.dspark.draft_tokens


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_long_prompt_is_read_in_pieces(window, passes):
    target = long_target()
    check_pieces(target, windowed(tiny_head(target), window), prompts(60), passes)


def test_pieces_of_prompts_of_any_lengths(passes):
    target = long_target()
    kwargs = prompts(60)
    kwargs["attention_mask"][1, :50] = 0
    check_pieces(target, tiny_head(target), kwargs, passes)


@pytest.mark.parametrize("family", ["qwen3-sliding", "gpt-neox"])
def test_pieces_for_families_of_targets(family, passes):
    target = build(family)
    check_pieces(target, tiny_head(target), prompts(60), passes)


@pytest.mark.parametrize("family", ["qwen3-next", "falcon-h1", "lfm2"])
def test_pieces_for_targets_that_keep_states(family, passes):
    target = build_hybrid(family)
    check_pieces(target, tiny_head(target), prompts(60), passes)


@pytest.mark.slow
def test_pieces_for_compressed_caches(passes):
    # Alone: plain decoding of a padded batch reads the padding too.
    target, texts, head = v4_pair((0, 1, 2, 1))
    check_pieces(target, head, v4_batch([texts[0][:50]]), passes, piece=6)


@pytest.mark.parametrize("rope", [LONGROPE | {"original_max_position_embeddings": 64}, DYNAMIC])
def test_pieces_for_rotary_embeddings_that_go_by_the_length(rope, passes):
    target = build("llama", rope_parameters=rope, max_position_embeddings=64)
    check_pieces(target, tiny_head(target), prompts(90), passes)


def test_states_of_a_long_prompt_are_not_held_at_once(monkeypatch):
    """Also without `prefill_chunk_size`, and for prompts of requests that come and go."""
    target, most = long_target(), []
    head, read, append = tiny_head(target), Drafter.read, Drafter.append
    monkeypatch.setattr(pieces, "PIECE", 16)
    monkeypatch.setattr("dspark_hf.generation.generate.PIECE", 16)

    def noted(method):
        def call(self, *args):
            features = args[-2]
            most.append(features.shape[1])
            return method(self, *args)

        return call

    monkeypatch.setattr(Drafter, "read", noted(read))
    monkeypatch.setattr(Drafter, "append", noted(append))
    kwargs = prompts(200) | {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(target.generate(**kwargs, assistant_model=head), target.generate(**kwargs))
    assert max(most) == 16 and sum(count == 16 for count in most) > 10
    most.clear()
    prompt = kwargs["input_ids"][0].tolist()
    outputs = target.generate_batch(
        [prompt],
        generation_config=GenerationConfig(max_new_tokens=10, do_sample=False),
        continuous_batching_config=config(max_batch_tokens=16),
        assistant_model=head,
    )
    (output,) = outputs.values()
    assert output.generated_tokens == alone(target, prompt, max_new_tokens=10) and max(most) == 16


def test_recorded_states_are_of_whole_prompts(passes):
    target = long_target()
    kwargs = prompts(60, rows=1) | {"max_new_tokens": 5, "output_hidden_states": True} | GREEDY
    found = target.generate(**kwargs, assistant_model=tiny_head(target), prefill_chunk_size=16)
    plain = target.generate(**kwargs)
    assert found.hidden_states[0][1].shape == plain.hidden_states[0][1].shape == (1, 60, 32)


# -- What the docs say ------------------------------------------------------------------------------------------------

DOCS = (Path(__file__).parents[1] / "docs" / "long_contexts.md").read_text()


def test_the_snippet_of_the_docs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    exec(compile(code, "docs/long_contexts.md", "exec"), {"__name__": "__main__"})
    assert "What is 3 times 4?" in capsys.readouterr().out


@pytest.mark.parametrize("command", rest_slow(["bench", "doctor"], quick=["bench"]))
def test_the_commands_of_the_docs_take_a_window(command, tmp_path, monkeypatch):
    (line,) = re.findall(rf"^    dspark-hf ({command} .*)$", DOCS, flags=re.MULTILINE)
    prompts, found, windows = tmp_path / "prompts.jsonl", tmp_path / "found.json", set()
    questions = [f"Tom has {n} boxes of 12 pencils. How many pencils has he?" for n in range(2, 7)]
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    line = line.replace("prompts.jsonl", str(prompts)).replace("2048", "3")
    line += f" --max-new-tokens 24 --limit 5 --dtype float32 --json {found}"
    line += " --batch-sizes 5 --methods plain,dspark" if command == "bench" else ""

    def noted(head):
        windows.add(window_of(head))
        return window_of(head)

    monkeypatch.setattr(drafting, "window_of", noted)
    result = CliRunner().invoke(app, line.split(), env={"COLUMNS": "200"})
    assert isinstance(result.exception, SystemExit | None), result.exception
    written = json.loads(found.read_text())
    if command == "bench":
        assert result.exit_code == 0 and windows == {3} and written[1]["identical"]
    else:
        # The doctor finds that it takes away what the head needs.
        assert result.exit_code == 1 and windows >= {3, None} and written["findings"][0]["name"] == "draft_window"
