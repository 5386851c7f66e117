"""`dspark-hf eval`: rounds counted as the reference counts them, data sets, interruptions, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Case, case_of, cases, tiny_head, tiny_target
from test_cli import pair_options, run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dspark_hf
from dspark_hf.embedded import FOLDER
from dspark_hf.evaluation import evaluate
from dspark_hf.evaluation.acceptance import EvalRecord, summarise
from dspark_hf.evaluation.data_sets import DataSet, load_data_set, load_data_sets
from dspark_hf.evaluation.evaluate import Batch, EvalSettings, decode
from dspark_hf.evaluation.results import fingerprint
from dspark_hf.generation.stats import DSparkStats


def with_tokenizer(case: Case, folder: Path) -> Path:
    """The target of a fixture with a tokenizer that writes token 17 as "17"."""
    case.any_target().save_pretrained(folder)
    return add_tokenizer(folder)


def add_tokenizer(folder: Path) -> Path:
    """A folder of a model with a tokenizer that writes token 17 as "17"."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = ["<pad>", "<eos>", *map(str, range(2, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", cases())
def test_the_references_acceptance_lengths(name, tmp_path):
    """Accepted length to the last digit, and every single round, by the command and files of prompts."""
    case = case_of(name)
    prompts = case.expected["prompts"]
    model, results = with_tokenizer(case, tmp_path / "target"), tmp_path / "results.json"
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"turns": [" ".join(map(str, p["input_ids"]))]}) + "\n" for p in prompts))
    args = ["--model", str(model), "--head", str(case.folder / "head"), "--data", str(data), "--dtype", "float32"]
    tokens = str(case.expected["max_new_tokens"])
    run("eval", *args, "--max-new-tokens", tokens, "--results", str(results), "--batch-size", "3")

    [found] = json.loads(results.read_text())["results"]
    lengths = [length for p in prompts for length in p["acceptance_lengths"]]
    assert found["accepted_length"] == np.mean(lengths) and found["proposals"] == len(lengths)
    assert found["tokens"] == len(prompts) * int(tokens)
    drafts = len(prompts[0]["rounds"][0]["draft_tokens"])
    assert found["proposal_length"] == drafts and len(found["positions"]) == drafts
    assert found["verify_rate"] == pytest.approx(np.mean(lengths) / (drafts + 1))
    for k, position in enumerate(found["positions"]):
        assert position["acceptance"] == np.mean([length > k + 1 for length in lengths])
    lines = [json.loads(line) for line in (tmp_path / "results.prompts-0.jsonl").read_text().splitlines()[1:]]
    assert [line["accepted"] for line in lines] == [p["acceptance_lengths"] for p in prompts]
    confident = json.loads((case.folder / "head" / "config.json").read_text()).get("enable_confidence_head")
    if confident:
        assert 0 < found["ece"] < 1 and 0.5 < found["auc"] <= 1 and 0 < found["brier"] < 1


def test_scores_of_the_confidence_from_their_definitions():
    chance = np.random.default_rng(0)
    confidence = chance.random((200, 3)).round(6)
    kept = (chance.random((200, 3)) < confidence).cumprod(axis=1).sum(axis=1)
    record = EvalRecord("x", 0, 9, (kept + 1).tolist(), [3] * 200, kept.tolist(), confidence.tolist())
    result = summarise("x", [record])
    survival = confidence.cumprod(axis=1)
    for k, position in enumerate(result.positions):
        happened = kept > k
        pairs = survival[happened, k][:, None] - survival[~happened, k]
        assert position.auc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
        assert position.brier == pytest.approx(((survival[:, k] - happened) ** 2).mean())
        assert position.survival == pytest.approx(survival[:, k].mean())
    assert result.brier == pytest.approx(np.mean([p.brier for p in result.positions]))


def test_a_round_that_ends_with_a_draft():
    """Drafts behind a kept end-of-sequence token count as not proposed, and such a round has no bonus."""
    from dspark_hf.evaluation.acceptance import record_of

    stats = DSparkStats(4, [[5, 2]], [[4, 4]], [[4, 4]], [[4, 2]], [[0, 0]], [[[1] * 4] * 2], [[[0.5] * 4] * 2])
    record = record_of("x", 0, 8, stats, 0, 100, True)
    assert record.proposed == [4, 2] and record.accepted == [5, 2] and list(map(len, record.confidence)) == [4, 2]
    result = summarise("x", [record])
    assert result.verify_rate == 7 / 8 and [p.proposals for p in result.positions] == [2, 2, 1, 1]
    assert record_of("x", 0, 8, stats, 0, 5, True).accepted == [5]


def test_turns_are_answered_one_after_the_other():
    """The second turn's prompt holds the answer to the first: its tokens are those of plain generate on that chat."""
    model, head, tokenizer = dspark_hf.embedded_pair(dtype=torch.float32)
    turns = ["Ann has 3 apples and buys 4. How many has she?", "And if she eats one?"]
    data = DataSet("talk", "talk", [turns, turns[:1]])
    batch, settings = Batch(0, data, range(2)), EvalSettings(max_new_tokens=40)
    both, one = decode(model, head, tokenizer, batch, settings)
    first_only = decode(model, head, tokenizer, batch, EvalSettings(max_new_tokens=40, first_turn=True))
    for prompt, found in enumerate(first_only):
        # Which rows share a pass rounds the last digits of a confidence.
        assert vars(found) | {"confidence": None} == vars(one) | {"confidence": None, "prompt": prompt}
        assert sum(found.confidence, []) == pytest.approx(sum(one.confidence, []), abs=1e-4)

    chat, tokens = [], 0
    for turn in turns:
        chat.append({"role": "user", "content": turn})
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        new = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        chat.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)})
        tokens += len(new)
    assert both.tokens == tokens and both.accepted[: len(one.accepted)] == one.accepted


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_table(tmp_path, monkeypatch):
    options = ["--data", "gsm8k", "--limit", "5", "--max-new-tokens", "16", "--batch-size", "2", "--temperature", "1"]
    whole, results = tmp_path / "whole.json", tmp_path / "results.json"
    expected = run("eval", *options, "--results", str(whole))

    decoded = []

    def killed_at_the_second(*args):
        decoded.append(args[3].number)
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(evaluate, "decode", killed_at_the_second)
    with pytest.raises(BaseException):  # noqa: B017
        run("eval", *options, "--results", str(results))
    log = tmp_path / "results.prompts-0.jsonl"
    assert len(log.read_text().splitlines()) == 3 and not results.exists()
    log.write_text(log.read_text()[:-20])
    decoded[:] = [None, None]
    assert run("eval", *options, "--results", str(results)) == expected
    assert decoded[2:] == [0, 1, 2]
    same = [{k: v for k, v in json.loads(file.read_text()).items() if k != "date"} for file in (whole, results)]
    assert same[0] == same[1]
    assert run("eval", *options, "--results", str(results)) == expected and len(decoded) == 5
    with pytest.raises(ValueError, match="another run: settings differ"):
        run("eval", *options, "--seed", "1", "--results", str(results))


@pytest.mark.slow
def test_two_processes_give_the_same_table(tmp_path):
    options = ["eval", "--data", "gsm8k,code", "--limit", "3", "--max-new-tokens", "16", "--batch-size", "1"]
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    threads = torch.get_num_threads()
    # As the two processes have: sums over more threads round differently.
    torch.set_num_threads(1)
    try:
        run(*options, "--dtype", "float32", "--results", str(alone))
    finally:
        torch.set_num_threads(threads)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += ["-m", "dspark_hf.cli"]
    done = subprocess.run(
        [*launch, *options, "--dtype", "float32", "--results", str(together), "--plot", str(tmp_path / "eval.png")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accepted: tokens a round") == 1
    found = [json.loads(file.read_text())["results"] for file in (alone, together)]
    assert found[0] == found[1]
    logs = [(tmp_path / f"together.prompts-{i}.jsonl").read_text().splitlines() for i in range(2)]
    assert [len(log) for log in logs] == [4, 4]
    assert (tmp_path / "eval.png").read_bytes()[:4] == b"\x89PNG"


def test_data_sets(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [{"turns": ["a", "b"]}, {"prompt": "c"}, {"question": "d"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_data_set(str(path)).conversations == [["a", "b"], ["c"], ["d"]]
    assert load_data_set(str(path), 1).conversations == [["a", "b"]]
    assert len(load_data_set("code").conversations) == 64
    path.write_text('{"question": "e", "answer": "f"}\n')
    (tmp_path / "train.jsonl").write_text('{"question": "g", "answer": "h"}\n')
    assert load_data_set(f"{tmp_path}/").conversations == [["e"]]
    assert load_data_set(f"{tmp_path}:train").conversations == [["g"]]
    with pytest.raises(ValueError, match="no split 'dev', only"):
        load_data_set(f"{tmp_path}:dev")
    for source, message in [("nothing", "is no data set"), ("/no/such.jsonl", "no file '/no/such.jsonl'")]:
        with pytest.raises(ValueError, match=message):
            load_data_set(source)
    with pytest.raises(ValueError, match="Several data sets are called gsm8k"):
        load_data_sets(["gsm8k", "gsm8k"])
    for content, message in [
        ('{"text": "x"}\n', "has the keys"),
        ("{nor json\n", "is not JSON"),
        ("[1]\n", "no JSON object"),
        ('{"turns": [1]}\n', "should hold text"),
        ("\n", "holds no prompts"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_data_set(str(path))


def test_chats_need_a_template(tmp_path, vanilla):
    model, data = with_tokenizer(vanilla, tmp_path / "target"), tmp_path / "talk.jsonl"
    data.write_text('{"turns": ["5 6 7", "8 9"]}\n')
    options = ["--model", str(model), "--head", str(vanilla.folder / "head"), "--data", str(data)]
    with pytest.raises(ValueError, match="no chat template"):
        run("eval", *options)
    assert "accepted" in run("eval", *options, "--first-turn", "--max-new-tokens", "4")


def test_fingerprints_tell_heads_apart(tmp_path):
    target = tiny_target()
    head = tiny_head(target)
    mark = fingerprint(head)
    assert fingerprint(tiny_head(target)) == mark != fingerprint(tiny_head(target, seed=2))
    assert fingerprint(tiny_head(target).to(torch.bfloat16)) == mark
    head.save_pretrained(tmp_path)
    assert fingerprint(dspark_hf.DSparkHead.from_pretrained(tmp_path)) == mark
    head.config.confidence_temperatures = [1.1] * 4
    assert fingerprint(head) != mark
    own = dspark_hf.DSparkHead.from_pretrained(FOLDER / "head")
    assert fingerprint(own) == fingerprint(dspark_hf.embedded_pair(dtype=torch.float32)[1])


def test_model_and_head_folders():
    assert "verify rate" in run("eval", *pair_options(), "--data", "code", "--limit", "1", "--max-new-tokens", "4")
