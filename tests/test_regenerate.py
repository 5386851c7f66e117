"""`dspark-hf regenerate`: a target's own answers as training data; and how `train` tells other text from them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GSM8K_SAMPLE, tiny_head, tiny_target
from test_cli import fails, run
from test_hybrids import build

from dspark_hf.embedded import FOLDER, embedded_pair
from dspark_hf.training import data_check
from dspark_hf.training import regenerate as module
from dspark_hf.training.data import load_rows
from dspark_hf.training.data_check import compare
from dspark_hf.training.regenerate import (
    Prompt,
    Rows,
    Settings,
    describe_run,
    load_prompts,
    regenerate,
    sampling_config,
)

OPTIONS = ["--data", str(GSM8K_SAMPLE), "--dtype", "float32", "--max-new-tokens", "16", "--temperature", "0"]


@pytest.fixture(scope="module")
def pair():
    return embedded_pair(dtype=torch.float32)


def write(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- The command -------------------------------------------------------------------------------------------------------


def test_train_reads_the_tokens_that_the_target_wrote(pair, tmp_path):
    """Rows in the order of the prompts, whose tokens are those of plain generate, of which the answer is supervised."""
    model, _, tokenizer = pair
    output = tmp_path / "answers.jsonl"
    printed = run("regenerate", *OPTIONS, "--limit", "5", "--output", str(output))
    assert "5 answers" in printed and ", tau " in printed and "train --model embedded" in printed
    rows, questions = lines_of(output), lines_of(GSM8K_SAMPLE)[:5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.run.json"]
    for loaded, row, question in zip(load_rows(str(output), tokenizer, 4096), rows, questions, strict=True):
        chat = [{"role": "user", "content": question["question"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        count = ids["input_ids"].shape[1]
        plain = model.generate(**ids, max_new_tokens=16, do_sample=False)[0].tolist()
        assert loaded == {"input_ids": plain, "loss_mask": [0] * count + [1] * (len(plain) - count)}
        text = tokenizer.decode(plain[count:], skip_special_tokens=True)
        assert row["messages"] == [*chat, {"role": "assistant", "content": text}]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(tmp_path, monkeypatch):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    options = [*OPTIONS[:-1], "1", "--no-draft", "--limit", "6", "--batch-size", "2"]
    run("regenerate", *options, "--output", str(whole))
    append, appended = Rows.append, []

    def killed_at_the_fourth(self, row):
        appended.append(row)
        if len(appended) == 4:
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(Rows, "append", killed_at_the_fourth)
    with pytest.raises(BaseException):  # noqa: B017
        run("regenerate", *options, "--output", str(output))
    part = tmp_path / "killed.part-0.jsonl"
    assert len(lines_of(part)) == 3 and not output.exists()
    # As if a kill had cut the last line short, so that its prompt is answered again.
    part.write_text(part.read_text()[:-20])
    appended[:] = [None] * 4
    run("regenerate", *options, "--output", str(output))
    assert len(appended) == 4 + 4 and output.read_text() == whole.read_text()
    assert not part.exists()

    # Of a run that has ended nothing is decoded again, and no other one writes over it.
    monkeypatch.setattr(module, "regenerate", None)
    run("regenerate", *options, "--output", str(output))
    changed = fails("regenerate", *options, "--seed", "1", "--max-new-tokens", "15", "--output", str(output))
    assert "killed.run.json" in changed and "settings differ" in changed
    assert "sha256 differ" in fails("regenerate", *options, "--limit", "5", "--output", str(output))
    strange = write(tmp_path / "mine.jsonl", {"prompt": "a"})
    assert "no run of `regenerate` wrote it" in fails("regenerate", *options, "--output", strange)


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path):
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    options = ["regenerate", *OPTIONS, "--limit", "5"]
    run(*options, "--output", str(alone))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "-m", "dspark_hf.cli", *options, "--output", str(together)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 answers") == 1
    assert together.read_text() == alone.read_text() and len(list(tmp_path.iterdir())) == 4


def test_what_cannot_be_answered_is_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    output = ["--output", str(tmp_path / "a.jsonl")]
    assert "expected a .jsonl file" in fails("regenerate", *OPTIONS, "--output", str(tmp_path / "a.json"))
    bad = write(tmp_path / "bad.jsonl", {"text": "a"})
    assert "row 1: " in fails("regenerate", "--data", bad, *output)
    assert "no room for an answer within 10" in fails("regenerate", *OPTIONS, "--max-length", "10", *output)


# -- Prompts -----------------------------------------------------------------------------------------------------------


def test_layouts_of_prompts(pair, tmp_path):
    tokenizer = pair[2]
    turn = {"role": "user", "content": "2+2?"}
    chat = [turn, {"role": "assistant", "content": "Five."}, {"role": "user", "content": "Sure?"}]
    answer = {"role": "assistant", "content": "Yes."}

    def ids(messages):
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    texts = [{"prompt": "2+2?"}, {"question": "2+2?", "answer": "4"}, {"prompt": "2+2?", "response": "5"}]
    for row in [*texts, {"messages": [turn, answer]}, {"messages": [turn]}]:
        [prompt] = load_prompts(write(tmp_path / "a.jsonl", row), tokenizer)
        assert prompt == Prompt(ids([turn]), [turn])
    [prompt] = load_prompts(write(tmp_path / "a.jsonl", {"messages": [*chat, answer]}), tokenizer)
    assert prompt == Prompt(ids(chat), chat)
    tokens = {"input_ids": [5, 6, 7, 8, 9, 4], "loss_mask": [0, 1, 0, 0, 1, 1]}
    assert load_prompts(write(tmp_path / "a.jsonl", tokens), tokenizer) == [Prompt([5, 6, 7, 8], None)]


def test_bad_prompts_are_left_out_and_named(pair, tmp_path, monkeypatch):
    rows = [
        {"prompt": "a"},
        {"prompt": None},
        {"messages": [{"role": "assistant", "content": "b"}]},
        {"prompt": "c " * 99},
    ]
    warnings = []
    monkeypatch.setattr("dspark_hf.training.data.logger.warning", warnings.append)
    found = load_prompts(write(tmp_path / "a.jsonl", *rows, {"prompt": "d"}), pair[2], max_length=50)
    assert [prompt.messages[0]["content"] for prompt in found] == ["a", "d"]
    [warning] = warnings
    assert "3 of 5 rows" in warning and "row 3: nothing comes before" in warning and "row 4: a prompt of" in warning


def test_a_data_set_as_the_hub_lays_it_out(pair, tmp_path):
    """By name, config and split; a message's columns that another one has are none of its own."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "test.jsonl", {"question": "a", "answer": "b"})
    write(tmp_path / "set" / "train.jsonl", {"question": "c", "answer": "d"})
    for source, text in [
        (f"{tmp_path}/set", "c"),
        (f"{tmp_path}/set:test", "a"),
        (f"{tmp_path}/set:default:test", "a"),
    ]:
        assert load_prompts(source, pair[2])[0].messages == [{"role": "user", "content": text}]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]
    (tmp_path / "chats").mkdir()
    write(tmp_path / "chats" / "train.jsonl", {"messages": chat})
    assert load_prompts(f"{tmp_path}/chats", pair[2])[0].messages == chat[:1]


@pytest.mark.parametrize("thinking", [True, False])
def test_templates_are_told_whether_to_think(thinking, pair, tmp_path):
    tokenizer = embedded_pair()[2]
    tokenizer.chat_template += "{{ 'thinking' if enable_thinking else 'not' }}"
    [prompt] = load_prompts(write(tmp_path / "a.jsonl", {"prompt": "a"}), tokenizer, thinking=thinking)
    assert tokenizer.decode(prompt.ids).endswith("thinking" if thinking else "not")


# -- How answers are sampled -------------------------------------------------------------------------------------------


def test_settings_of_sampling(pair):
    """Those of the target, but for what a run says."""
    target = tiny_target()
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    target.generation_config.update(**own)

    def said(**settings):
        config = sampling_config(target, Settings(**settings))
        return {name: getattr(config, name) for name in own}

    assert said() == own
    assert said(temperature=0.9) == own | {"temperature": 0.9} and said(top_p=0.5) == own | {"top_p": 0.5}
    assert said(temperature=0) == {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    target.generation_config.update(do_sample=False, temperature=None, top_k=None, top_p=None)
    assert not said()["do_sample"]
    assert said(temperature=0.9) == {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 1.0}
    assert said(top_p=0.5) == {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.5}


@pytest.mark.parametrize("drafting", [True, False])
def test_answers_are_distributed_as_the_target_says(drafting):
    target = tiny_target(vocab_size=8, seed=3, sharpness=2)
    target.generation_config.update(do_sample=True, temperature=1.3, top_k=0)
    head = tiny_head(target) if drafting else None
    prompts = {number: Prompt([1, 2, 3], None) for number in range(400)}
    found = [tuple(answer.tokens) for answer in regenerate(target, head, prompts, Settings(max_new_tokens=2))]
    with torch.no_grad():
        expected = {}
        first = (target(torch.tensor([[1, 2, 3]])).logits[0, -1] / 1.3).softmax(-1)
        for a, p in enumerate(first.tolist()):
            then = (target(torch.tensor([[1, 2, 3, a]])).logits[0, -1] / 1.3).softmax(-1)
            expected |= {(a, b): p * q for b, q in enumerate(then.tolist())}
    statistic = sum((found.count(pair) - 400 * p) ** 2 / (400 * p) for pair, p in expected.items())
    assert statistic < 63 + 4 * (2 * 63) ** 0.5


def test_a_prompts_answer_does_not_depend_on_the_others():
    target = tiny_target(vocab_size=40, sharpness=2)
    target.generation_config.update(do_sample=True)
    prompts = {number: Prompt([1 + number % 7] * (1 + number), None) for number in range(9)}

    def answers(among, **settings):
        settings = Settings(max_new_tokens=8, **{"batch_size": 3} | settings)
        return {a.prompt: a.tokens for a in regenerate(target, None, {n: prompts[n] for n in among}, settings)}

    every = answers(range(9))
    assert answers([2, 5, 8], batch_size=1) == {n: every[n] for n in (2, 5, 8)}
    assert answers(range(9), seed=1) != every


def test_limits_of_an_answer():
    target = tiny_target(vocab_size=40, sharpness=2)
    prompts = {0: Prompt([1, 2], None), 1: Prompt([3] * 9, None)}
    found = {a.prompt: a for a in regenerate(target, None, prompts, Settings(max_new_tokens=6, max_length=12))}
    assert [len(found[n].tokens) for n in (0, 1)] == [6, 3] and found[0].is_cut
    target.generation_config.eos_token_id = found[0].tokens[1]
    [answer] = regenerate(target, tiny_head(target), {0: prompts[0]}, Settings(max_new_tokens=6))
    assert answer.tokens == found[0].tokens[:2] and not answer.is_cut


@pytest.mark.parametrize("family", ["qwen3-next", "lfm2"])
def test_recurrent_targets_without_a_head(family):
    target = build(family)
    prompts = {number: Prompt([3 + number, 7, 5][: 1 + number], None) for number in range(3)}
    for answer in regenerate(target, None, prompts, Settings(max_new_tokens=12, batch_size=2, temperature=0)):
        ids = torch.tensor([prompts[answer.prompt].ids])
        plain = target.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer.tokens == plain.tolist()


def test_a_target_that_writes_no_numbers():
    target = tiny_target()
    with torch.no_grad():
        target.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="Prompt 1 could not be answered: .* hold NaN"):
        list(regenerate(target, None, {0: Prompt([1, 2], None)}, Settings(max_new_tokens=4)))


# -- Whether data look like the target's text --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    """A target, prompts, and its answers to them as training rows."""
    target = tiny_target(vocab_size=40, sharpness=3)
    target.generation_config.update(do_sample=True, top_k=0)
    prompts = {number: Prompt([1 + number % 39, 1 + number // 39], None) for number in range(24)}
    return target, prompts


def rows_of(prompts, answers) -> list[dict]:
    return [
        {"input_ids": prompts[a.prompt].ids + a.tokens, "loss_mask": [0] * 2 + [1] * len(a.tokens)} for a in answers
    ]


def test_text_of_the_target_is_told_from_other_text(texts, monkeypatch):
    target, prompts = texts
    monkeypatch.setattr(data_check, "TOKENS", 40)
    own = rows_of(prompts, regenerate(target, None, prompts, Settings(max_new_tokens=40, seed=1)))
    found = compare(target, own)
    assert not found.differs and found.rows == 16 and abs(np.log(found.data / found.own)) < 4 * found.error
    colder = rows_of(prompts, regenerate(target, None, prompts, Settings(max_new_tokens=40, temperature=0)))
    assert not compare(target, colder).differs
    other = [row | {"input_ids": row["input_ids"][:2] + row["input_ids"][:1:-1]} for row in own]
    found = compare(target, other)
    assert found.differs and found.data > 2 * found.own


def test_perplexity_from_its_definition(texts):
    target, prompts = texts
    [row] = rows_of(prompts, regenerate(target, None, {0: prompts[0]}, Settings(max_new_tokens=5)))
    with torch.no_grad():
        logprobs = target(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    likely = [logprobs[i - 1, token].item() for i, token in enumerate(row["input_ids"])][2:]
    assert compare(target, [row]).data == pytest.approx(np.exp(-np.mean(likely)), rel=1e-5)
    assert not compare(target, [row]).differs


def test_data_are_compared_with_answers_sampled_as_they_were(texts, tmp_path, monkeypatch):
    """Sampled hotter than the target's generation config says, which their run file tells; otherwise with a warning."""
    target, prompts = texts
    settings, warnings = Settings(max_new_tokens=40, temperature=1.5, seed=1), []
    rows, config = rows_of(prompts, regenerate(target, None, prompts, settings)), sampling_config(target, settings)
    monkeypatch.setattr(data_check.logger, "warning", warnings.append)
    monkeypatch.setattr(data_check, "TOKENS", 40)
    source = write(tmp_path / "a.jsonl", *rows)
    Rows(tmp_path / "b.jsonl", describe_run("x", torch.float32, list(prompts.values()), settings, config)).begin()
    assert not data_check.check_data(target, rows, str(tmp_path / "b.jsonl"), target.device).differs
    assert not warnings
    found = data_check.check_data(target, rows, source, target.device)
    [warning] = warnings
    assert f"is {found.data:.2f} under the target" in warning and f"{found.own:.2f}. Drafts" in warning
    assert "in 16 rows" in warning and f"regenerate --data {source}" in warning
    long = {"input_ids": [1] * 2000, "loss_mask": [0] * 1990 + [1] * 10}
    assert data_check.check_data(target, [long], source, target.device) is None


def test_train_compares_before_it_starts(tmp_path, monkeypatch):
    """Answers to other questions."""
    rows = lines_of(GSM8K_SAMPLE)[:7]
    mixed = [{"prompt": a["question"], "response": b["answer"]} for a, b in zip(rows, rows[1:], strict=False)]
    data, warnings, trained = write(tmp_path / "mixed.jsonl", *mixed), [], []
    state = SimpleNamespace(destroy_process_group=lambda: None)
    alone = SimpleNamespace(is_main_process=True, device=torch.device("cpu"), state=state)
    monkeypatch.setattr("dspark_hf.training.trainer.train", lambda *args: trained.append(len(warnings)))
    monkeypatch.setattr("accelerate.Accelerator", lambda **kwargs: alone)
    monkeypatch.setattr(data_check.logger, "warning", warnings.append)
    monkeypatch.setattr(data_check, "TOKENS", 24)
    run("train", "--model", str(FOLDER / "target"), "--data", data, "--output", str(tmp_path / "head"), "--layers", "1")
    assert trained == [1] and "in 6 rows of" in warnings[0]
