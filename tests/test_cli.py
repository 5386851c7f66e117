"""The commands as a user types them, on the embedded pair."""

import io
import itertools
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import GSM8K_SAMPLE
from rich.console import Console
from typer.testing import CliRunner

import dspark_hf
from dspark_hf.cli import app, common, main
from dspark_hf.embedded import FOLDER
from dspark_hf.evaluation.bench import (
    BenchRecord,
    Cell,
    MethodRun,
    _is_settled,
    _records,
    as_table,
    bench,
    cells_of,
    estimate,
    expectation,
    median_polish,
)
from dspark_hf.evaluation.prompts import DEFAULT_PROMPTS, encode, read_prompts
from dspark_hf.hub.registry import published_heads
from dspark_hf.training.check import Check

# The embedded target is less sure of code than of what it answers.
CODE = str(Path(dspark_hf.__file__).parent / "evaluation" / "data" / "code.jsonl")

PROMPT = "Tom has 3 boxes with 12 pencils each. He gives away 10 pencils. How many pencils are left?"


def run(*args: str) -> str:
    """What the command prints to stdout."""
    return ran(*args).stdout


def ran(*args: str):
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def fails(*args: str) -> str:
    """What the command prints to stderr when it refuses."""
    printed = io.StringIO()
    with redirect_stderr(printed), patch.object(sys, "argv", ["dspark-hf", *args]), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code != 0
    return " ".join(printed.getvalue().split())


@pytest.mark.slow
def test_the_installed_command():
    command = [str(Path(sys.executable).with_name("dspark-hf")), "bench", "--batch-sizes", "1,two"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert fails(*command[1:]) in " ".join(result.stderr.split())


def plain_text(max_new_tokens: int) -> str:
    model, _, tokenizer = dspark_hf.embedded_pair()
    inputs = encode([PROMPT], tokenizer, model.device)
    sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_streams_text_and_says_how_fast():
    output = run("generate", PROMPT, "--max-new-tokens", "48", "--dtype", "float32")
    assert "tokens/s" in output and "tau" in output
    text = output.rsplit("\n", 2)[0]
    assert len(text.split()) > 5


def test_generate_json_equals_plain_generate():
    record = json.loads(run("generate", PROMPT, "--max-new-tokens", "48", "--json"))
    again = json.loads(run("generate", PROMPT, "--max-new-tokens", "48", "--json", "--no-draft"))
    assert record["text"] == again["text"] == plain_text(48)
    assert record["tau"] > 1 and again["tau"] is None
    assert record["tokens"] / record["seconds"] == pytest.approx(record["tokens_per_second"])


def test_generate_samples_with_a_temperature():
    texts = set()
    for seed in range(3):
        torch.manual_seed(seed)
        texts.add(json.loads(run("generate", PROMPT, "--max-new-tokens", "24", "--temperature", "2", "--json"))["text"])
    assert len(texts) > 1


def test_generate_with_a_model_and_a_head_folder():
    output = run("generate", PROMPT, "--max-new-tokens", "8", "--json", *pair_options())
    assert json.loads(output)["tokens"] <= 8


def pair_options() -> list[str]:
    return ["--model", str(FOLDER / "target"), "--head", str(FOLDER / "head")]


def test_bench_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "bench.json"
    options = ["--batch-sizes", "1,2", "--methods", "plain,stock,dspark", "--limit", "2", "--max-new-tokens", "6"]
    result = ran("bench", *options, "--dtype", "float32", "--json", str(file), "--seconds", "3600")
    assert "plain" in result.stdout and "stock" in result.stdout and "dspark" in result.stdout
    assert "2 of 8 prompts" in result.stdout
    expected = "plain, stock, dspark at batch 1; plain, dspark at batch 2; 2 prompts: 9 turns or up to twice as many"
    assert expected in result.stderr and "at most 3600 s" in result.stderr and "\x1b" not in result.stderr
    records = [BenchRecord(**record) for record in json.loads(file.read_text())]
    found = [(record.batch_size, record.method) for record in records]
    assert found == [(1, "plain"), (1, "stock"), (1, "dspark"), (2, "plain"), (2, "dspark")]
    for record in records:
        assert record.identical is True and record.tokens_per_second > 0
        assert record.prompts == 2 and not record.cut_short
        assert 6 // record.batch_size <= record.turns <= 12 // record.batch_size
    plain, _, ours = records[:3]
    assert plain.speedup == 1 and plain.tau is None
    assert ours.speedup == pytest.approx(ours.tokens_per_second / plain.tokens_per_second)
    assert 1 <= ours.tau <= 8 and ours.draft_ms > 0 and ours.verify_ms > 0 and ours.ceiling > 0


class FakeClock:
    """A clock that stands almost still, but for a turn, which takes so many seconds."""

    def __init__(self, turn: float):
        self.now, self.turn = 0.0, turn

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def pass_turn(self, text: str) -> None:
        self.now += self.turn


@pytest.mark.parametrize(
    ("seconds", "turn", "turns"),
    [
        (180, 10, [12, 6]),
        # Too short: of 12 and 6 turns every cell has as many as its share of the time allows.
        (100, 10, [7, 3]),
        (40, 10, [3, 1]),
        # Slower than was expected: the limit is over with the first turn, and each has one.
        (40, 100, [1, 1]),
    ],
)
def test_bench_ends_at_its_limit(seconds, turn, turns):
    model, head, tokenizer = dspark_hf.embedded_pair(dtype=torch.float32)
    cells = cells_of(head, list(DEFAULT_PROMPTS[:4]), [1, 2], ["plain", "fixed-1"])
    clock = FakeClock(turn)
    limits = {"max_new_tokens": 2, "seconds": seconds}
    records = list(bench(model, head, tokenizer, cells, [10.0, 10.0], **limits, report=clock.pass_turn, clock=clock))
    assert [record.turns for record in records] == [n for n in turns for _ in range(2)]
    assert all(record.cut_short == (turns != [12, 6]) for record in records)
    # Every prompt has a turn before one has two.
    expected = [min(4, size * n) for size, n in zip((1, 2), turns, strict=True)]
    assert [record.prompts for record in records] == [n for n in expected for _ in range(2)]
    for record in records:
        of_batches = record.turns * record.batch_size / record.prompts
        assert (record.noise is None) == (of_batches < 2) and record.identical


def test_bench_refuses_a_limit_that_is_too_short():
    cells = [Cell([["a"]], ["plain"]), Cell([["a", "b"]], ["plain"])]
    with pytest.raises(ValueError, match="--seconds 39 is too short .* takes about 40 s. Give --seconds 80, or fewer"):
        next(bench(None, None, None, cells, [12.0, 8.0], seconds=39))


def test_bench_says_what_it_will_do():
    model, head, tokenizer = dspark_hf.embedded_pair(dtype=torch.float32)
    cells = cells_of(head, list(DEFAULT_PROMPTS[:5]), [1, 4], ["plain", "stock"])
    clock = itertools.count(step=2)
    # Two seconds a call, of 8 tokens.
    turn_seconds = estimate(model, head, tokenizer, cells, 40, lambda: next(clock))
    assert turn_seconds == [2 * 40 / 8 * 2, 2 * 40 / 8]
    text = expectation(cells, turn_seconds, 400)
    assert text.startswith("plain, stock at batch 1; plain at batch 4; 5 prompts: 18 turns or up to twice as many, ")
    assert text.endswith("about 360 s or up to twice as long, at most 400 s")
    assert expectation(cells, turn_seconds, 120).endswith("cut short at 120 s")


def test_bench_takes_32_prompts_unless_told_otherwise(tmp_path):
    prompts, file = tmp_path / "prompts.txt", tmp_path / "bench.json"
    prompts.write_text("".join(f"{n}\n" for n in range(40)))
    options = ["--prompts", str(prompts), "--methods", "plain", "--max-new-tokens", "1", "--json", str(file)]
    assert "32 of 40 prompts" in run("bench", *options, "--batch-sizes", "32")
    assert [record["prompts"] for record in json.loads(file.read_text())] == [32]
    assert "there are 32: give" in fails("bench", *options, "--batch-sizes", "33")
    assert "36 of 40 prompts" in run("bench", *options, "--batch-sizes", "33", "--limit", "36")
    assert [record["prompts"] for record in json.loads(file.read_text())] == [33]


def test_tables_say_what_was_cut_short():
    records = [BenchRecord("plain", size, 10.0, None, 4, 7, size == 2, "code") for size in (1, 2)]
    printed = io.StringIO()
    Console(file=printed, width=200).print(as_table(records))
    rows = [line.split() for line in printed.getvalue().splitlines() if line.split()[:1] == ["plain"]]
    assert [row[1:5] for row in rows] == [["1", "4", "7", "10.0"], ["2", "4", "7", "cut"]]


def test_progress_without_a_terminal_is_a_plain_line_now_and_then(monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(common, "errors", Console(file=printed, markup=False, force_terminal=False))
    now = 0
    with common.progress("measuring", lambda: now) as report:
        for now in (1, 9, 10, 11, 19, 25):
            report(f"at [{now}]")
    assert printed.getvalue() == "measuring\nat [10]\nat [25]\n"


@pytest.mark.parametrize(
    ("command", "last"),
    [
        (["eval", "--data", "code", "--limit", "1", "--max-new-tokens", "4"], "evaluated 1 of 1 prompts"),
        (["verify", "--limit", "1", "--max-new-tokens", "4"], "verified 1 of 1 prompts"),
        (
            ["verify", "--prompts", CODE, "--limit", "1", "--sampling", "--draws", "100"],
            "comparing with the target's distribution",
        ),
        (["calibrate", "--limit", "64", "--max-new-tokens", "32"], "drafted for 64 of 64 prompts"),
    ],
)
def test_long_commands_show_progress(command, last, monkeypatch):
    monkeypatch.setattr(common, "PROGRESS_EVERY", 0.0)
    result = ran(*command)
    lines = result.stderr.splitlines()
    assert len(lines) > 1 and lines[-1] == last and last not in result.stdout


def test_bench_reads_prompt_files(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"turns": ["a", "b"]}, {"prompt": "c"}, {"question": "d"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_prompts(path) == ["a", "c", "d"]
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert read_prompts(text) == ["one", "two"]
    assert read_prompts(None) == list(DEFAULT_PROMPTS)
    path.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"Line 1 .*\['text'\]"):
        read_prompts(path)
    for content, message in [
        ("\n{not json\n", "Line 2 of .* not JSON"),
        ("[1]\n", "Line 1 .* no JSON object"),
        ('{"turns": []}\n', r"should hold text.*; it holds '\[\]'"),
        ('{"prompt": 4}\n', "should hold text.*; it holds '4'"),
        ("\n", "holds no prompts"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="prompts.jsonl' is no text in UTF-8"):
        read_prompts(path)


def test_train_writes_a_head_that_generates(tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"What is {a} + {b}?", "response": f"It is {a + b}, as {a} + {b} = {a + b}."}
        for a in range(3, 9)
        for b in range(11, 14)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--layers", "1", "--markov-rank", "8", "--anchors", "4", "--epochs", "1", "--batch-size", "6"]
    head = tmp_path / "head"
    run("train", "--model", str(FOLDER / "target"), "--data", str(data), "--output", str(head), *options)
    log = [json.loads(line) for line in (head / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3 and log[-1]["total"] > 0
    output = run("generate", PROMPT, "--max-new-tokens", "8", "--json", *pair_options()[:2], "--head", str(head))
    assert json.loads(output)["tokens"] <= 8


def test_train_packs_a_head_of_another_kind(tmp_path):
    data, head = tmp_path / "data.jsonl", tmp_path / "head"
    rows = [{"prompt": f"What is {a} + 2?", "response": f"It is {a + 2}."} for a in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--layers", "1", "--markov-rank", "8", "--anchors", "4", "--epochs", "1", "--batch-size", "1", "--pack"]
    keys = {"sample_from_anchor": False, "draft_vocab_size": 256, "layer_types": ["sliding_attention"]}
    options += ["--max-length", "96", "--config", json.dumps(keys | {"sliding_window": 16})]
    printed = ran(
        "train", "--model", str(FOLDER / "target"), "--data", str(data), "--output", str(head), *options
    ).output
    assert "100.0% of the supervised tokens are in the draft vocabulary of 256" in " ".join(printed.split())
    config = json.loads((head / "config.json").read_text())
    assert {key: config[key] for key in keys} == keys and json.loads((head / "log.jsonl").read_text())["step"] < 9
    output = run("generate", PROMPT, "--max-new-tokens", "8", "--json", *pair_options()[:2], "--head", str(head))
    assert json.loads(output)["tokens"] <= 8


@pytest.mark.parametrize("passes", [True, False])
def test_train_check_ends_with_what_it_found(passes, tmp_path, monkeypatch):
    """Nothing is written; the exit status says whether training works."""
    data, output = tmp_path / "data.jsonl", tmp_path / "head"
    data.write_text(json.dumps({"prompt": "What is 3 + 2?", "response": "It is 5."}) + "\n")
    monkeypatch.setattr("dspark_hf.training.check.check", lambda *_, **__: Check(7.5 if passes else 1.5, 8, 100, 9.0))
    args = ["--model", str(FOLDER / "target"), "--data", str(data), "--output", str(output), "--layers", "1", "--check"]
    result = CliRunner().invoke(app, ["train", *args])
    assert result.exit_code == (0 if passes else 1) and not output.exists()
    assert ("check passed: tau 7.50 of 8" if passes else "check failed: tau 1.50 of 8") in " ".join(
        result.output.split()
    )


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["generate", "x", "--model", "no/such-model"], "No published head"),
        (["generate", "x", "--head", "somewhere"], "--model embedded"),
        (["bench", "--batch-sizes", "1,two"], "1,two"),
        (["bench", "--batch-sizes", "99"], "99"),
        (["bench", "--methods", "plain,magic"], "magic"),
        (["bench", "--prompts", "/no/such/file.jsonl"], "/no/such/file.jsonl"),
        (["bench", "--prompts", "[demo]/file.jsonl"], "[demo]/file.jsonl"),
        (["bench", "--batch-sizes", "0"], "--batch-sizes 0: '0' is no number from 1 up"),
        (["bench", "--batch-sizes", "2,-1"], "--batch-sizes 2,-1: '-1' is no number from 1 up"),
        (["bench", "--batch-sizes", ""], "--batch-sizes '' has an empty entry"),
        (["bench", "--sweep-batch", "4,,8"], "--sweep-batch '4,,8' has an empty entry"),
        (["bench", "--sweep-batch", ""], "--sweep-batch '' has an empty entry"),
        (["bench", "--methods", "plain,"], "--methods 'plain,' has an empty entry"),
        (["eval", "--data", "gsm8k,"], "--data 'gsm8k,' has an empty entry"),
        (
            [
                "train",
                "--model",
                str(FOLDER / "target"),
                "--data",
                "d",
                "--output",
                "o",
                "--head",
                "h",
                "--config",
                "{}x",
            ],
            "--config '{}x' is no JSON",
        ),
        (
            ["train", "--model", str(FOLDER / "target"), "--data", "d", "--output", "o", "--head", "h"]
            + ["--config", '{"block_size": 4}'],
            "--config is for fresh heads",
        ),
        (["profile", "--dtype", "nonsense"], "--dtype nonsense: expected one of auto, float64, float32, bfloat16"),
        (["profile", "--plot", "times.foo"], "'times.foo' names no picture: expected one of"),
    ],
)
def test_errors_name_the_value(args, named):
    error = fails(*args)
    assert error.startswith("error: ") and named in error


@pytest.mark.parametrize("source", ["./foo", "/tmp/no/foo", "/foo", "foo/", "a/b/c", "~/foo", "../foo"])
def test_a_folder_that_does_not_exist_is_called_that(source):
    data = ["--data", "x.jsonl", "--output", "y"]
    for args in (
        ["inspect", source],
        ["inspect", str(FOLDER / "head"), "--model", source],
        ["generate", "x", "--model", source],
        ["generate", "x", "--model", str(FOLDER / "target"), "--head", source],
        ["export", source, "out", "--to", "deepspec"],
        ["export", str(FOLDER / "head"), "out", "--to", "deepspec", "--model", source],
        ["card", source, "--repo", "a/b"],
        ["calibrate", "--model", str(FOLDER / "target"), "--head", source],
        ["train", "--model", source, *data],
    ):
        assert fails(*args) == f"error: There is no folder {source!r}.", args


def test_ids_of_the_hub_are_not_taken_for_folders():
    for source in ("gpt2", "Qwen/Qwen3-0.6B", "a.b/c_d-e"):
        assert "folder" not in fails("inspect", source)


HIDDEN = """
import os, sys

for name in ("accelerate", "datasets", "gradio", "matplotlib"):
    sys.modules[name] = None
from dspark_hf.cli import main

for command in {commands}:
    sys.argv = ["dspark-hf", *command]
    os.environ["WORLD_SIZE"] = "2" if "gsm8k" in command else "1"
    try:
        main()
    except SystemExit as end:
        assert end.code == 1
"""


@pytest.mark.slow
def test_a_missing_extra_is_one_line_that_names_it():
    wanted = {
        ("train", "--model", "m", "--data", "d", "--output", "o"): ("accelerate", "train"),
        ("demo",): ("gradio", "demo"),
        ("bench", "--sweep-batch", "1", "--plot", "x.png"): ("matplotlib", "plot"),
        ("profile", "--plot", "x.png"): ("matplotlib", "plot"),
        ("eval", "--plot", "x.png"): ("matplotlib", "eval"),
        ("eval", "--data", "some/data"): ("datasets", "eval"),
        # In two processes.
        ("eval", "--data", "gsm8k"): ("accelerate", "eval"),
    }
    code = HIDDEN.format(commands=list(wanted))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"error: `dspark-hf {command[0]}` needs {package}, which is not installed: pip install 'dspark-hf[{extra}]'"
        for command, (package, extra) in wanted.items()
    ]


def test_a_package_of_no_extra_is_a_traceback(monkeypatch):
    """It is a fault of the installation or of ours."""

    def broken(*args):
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    monkeypatch.setattr("dspark_hf.hub.inspection.inspect_head", broken)
    with patch.object(sys, "argv", ["dspark-hf", "inspect", "x"]), pytest.raises(ModuleNotFoundError, match="nowhere"):
        main()


def test_version():
    assert run("--version").startswith(f"dspark-hf {dspark_hf.__version__}, transformers ")


def test_ids_and_paths_are_printed_whole(tmp_path):
    """At 80 columns, which a terminal of unknown width has."""
    printed = run("heads").split()
    for head in published_heads():
        assert head.head in printed and head.target in printed
    folder = tmp_path / ("a folder with a long name, so that nothing fits in one line of the terminal" * 2)
    shutil.copytree(FOLDER / "head", folder)
    config = json.loads((folder / "config.json").read_text())
    config["target_name_or_path"] = (
        "someone-with-a-long-name/and-a-model-with-a-name-so-long-that-it-is-not-in-one-line"
    )
    (folder / "config.json").write_text(json.dumps(config))
    printed = run("inspect", str(folder))
    assert str(folder) in printed and config["target_name_or_path"] in printed
    file = tmp_path / "new [bold] folder" / "deeper" / "card.md"
    options = ["--repo", "someone/head", "--model", "someone/target", "--output", str(file)]
    assert run("card", str(folder), *options) == f"card written to {file}\n"
    assert file.read_text().startswith("---")


def test_profile_shows_what_was_learnt(tmp_path):
    plot, file = tmp_path / "profile.png", tmp_path / "profile.json"
    output = run("profile", "--rows", "2", "--again", "--plot", str(plot), "--json", str(file))
    times = json.loads(file.read_text())
    assert times["rows"] == [1, 2] and Path(times["path"]).is_file()
    assert f"{1000 * times['verify'][0][0]:.2f}" in output and plot.read_bytes()[:4] == b"\x89PNG"
    again = tmp_path / "again.json"
    run("profile", "--rows", "2", "--json", str(again))
    assert json.loads(again.read_text()) == times
    run("profile", "--rows", "2", "--again", "--json", str(again))
    assert json.loads(again.read_text())["verify"] != times["verify"]


def test_calibrate_writes_into_the_config_of_the_head(tmp_path):
    head, plot, file = tmp_path / "head", tmp_path / "reliability.png", tmp_path / "report.json"
    shutil.copytree(FOLDER / "head", head)
    config = json.loads((head / "config.json").read_text())
    for name in ("confidence_temperatures", "confidence_shifts"):
        del config[name]
    (head / "config.json").write_text(json.dumps(config))
    args = ["--model", str(FOLDER / "target"), "--head", str(head), "--prompts", str(GSM8K_SAMPLE)]
    run("calibrate", *args, "--max-new-tokens", "64", "--plot", str(plot), "--json", str(file))
    report = json.loads(file.read_text())
    written = json.loads((head / "config.json").read_text())
    assert written["confidence_temperatures"] == report["temperatures"]
    assert written["confidence_shifts"] == report["shifts"]
    assert written.keys() - config.keys() == {"confidence_temperatures", "confidence_shifts"}
    assert [p["position"] for p in report["positions"]] == list(range(1, 8))
    assert all(0 <= p["ece_after"] <= 1 and p["auc_before"] > 0.5 for p in report["positions"][:3])
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_a_sweep_compares_load_with_every_fixed_length(tmp_path, monkeypatch):
    # Nothing here is about speed: a turn of two batches each.
    for name in ("BATCHES", "RUNS"):
        monkeypatch.setattr(f"dspark_hf.evaluation.sweep.{name}", 2)
    plot, file = tmp_path / "sweep.png", tmp_path / "sweep.json"
    args = ["--prompts", str(GSM8K_SAMPLE), "--limit", "2", "--max-new-tokens", "6", "--plot", str(plot)]
    output = run("bench", "--sweep-batch", "1,2", *args, "--json", str(file))
    records = json.loads(file.read_text())
    methods = ["plain", *(f"fixed-{k}" for k in range(1, 8)), "load"]
    assert [(r["batch_size"], r["method"]) for r in records] == [(n, m) for n in (1, 2) for m in methods]
    assert all(r["identical"] in (True, False) and r["domain"] == "gsm8k_test_24" for r in records)
    assert records[3]["verify_length"] <= 3 and "of best" in output and plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "args, message",
    [
        (["bench", "--plot", "x.png"], "--sweep-batch"),
        (["bench", "--compile", "--sweep-batch", "1"], "--compile adds methods"),
        (["bench", "--methods", "fixed-9"], "fixed-9"),
        (["calibrate", "--model", "m", "--head", "some/hub-id"], "--output"),
        (["calibrate", "--limit", "2", "--max-new-tokens", "4"], "at least 100"),
    ],
)
def test_errors_of_the_scheduler_commands(args, message):
    assert message in fails(*args)


def test_compiled_passes_want_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = fails("bench", "--compile", "--batch-sizes", "1")
    assert "no-such-compiler" in message and "CXX" in message


def test_methods_are_compared_within_their_turns():
    random = np.random.default_rng(0)
    right = np.array([1.0, 0.5, 0.7])
    slow = random.choice([1.0, 1.5], size=(12, 1))
    seconds = right * slow * np.exp(random.normal(scale=0.005, size=(12, 3)))
    seconds[2, 0], seconds[7, 1] = 9.0, 0.1
    found, errors = median_polish(seconds)
    np.testing.assert_allclose(found / found[0], right, rtol=0.01)
    assert seconds[:, 0].min() < found[0] < 1.6
    assert (errors < 0.005).all()
    assert np.isinf(median_polish(seconds[:1])[1]).all()


def test_standard_errors_are_those_of_repeated_measurements():
    random = np.random.default_rng(0)
    measured = [median_polish(np.exp(random.normal(scale=0.05, size=(24, 9)))) for _ in range(200)]
    seconds, errors = (np.array(values) for values in zip(*measured, strict=True))
    beside = np.log(seconds) - np.log(seconds).mean(axis=1, keepdims=True)
    assert errors.mean() == pytest.approx(beside.std(), rel=0.15)


@pytest.mark.parametrize("scale, batches, sure", [(0.01, 1, True), (0.08, 1, False), (0.08, 8, True)])
def test_turns_go_on_until_speeds_are_sure(scale, batches, sure):
    random = np.random.default_rng(0)
    runs = [[MethodRun(float(s), [], None) for s in np.exp(random.normal(scale=scale, size=24))] for _ in range(3)]
    assert _is_settled(runs, 13, batches) == sure


def test_turns_are_as_many_as_asked_and_at_most_twice_as_many():
    def runs(*seconds):
        return [[MethodRun(s, [], None) for s in seconds], [MethodRun(1.0, [], None) for _ in seconds]]

    assert not _is_settled([[], []], 3, 1)
    assert not _is_settled(runs(1.0), 1, 1)
    assert not _is_settled(runs(1.0, 1.0), 3, 1)
    assert _is_settled(runs(1.0, 1.0, 1.0), 3, 1)
    assert not _is_settled(runs(1.0, 2.0, 3.0, 4.0, 5.0), 3, 1)
    assert _is_settled(runs(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 3, 1)


def test_speeds_are_those_of_all_tokens():
    def runs(*seconds):
        return [MethodRun(s, [[1, 2, 3]], None) for s in seconds]

    plain, other = [runs(4.0, 2.0, 2.0), runs(6.0, 6.0, 6.0)], [runs(2.0, 1.0, 1.0), runs(3.0, 3.0, 3.0)]
    measured = {"plain": plain, "other": other}
    cell = Cell([["a"], ["b"]], list(measured))
    plain, other = _records(measured, cell, False)
    assert plain.tokens_per_second == pytest.approx(6 / 8)
    assert plain.noise == pytest.approx(0.0)
    assert other.speedup == pytest.approx(2) and other.identical
    measured["other"][1][2] = MethodRun(3.0, [[1, 2, 4]], None)
    assert not list(_records(measured, cell, False))[1].identical
