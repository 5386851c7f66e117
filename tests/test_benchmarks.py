"""The nine benchmarks by name, from folders that are laid out as their repositories."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import fails, run

from dspark_hf.embedded import FOLDER
from dspark_hf.evaluation.benchmarks import BENCHMARKS, PAPER, load_benchmark, names_of, paper_of

# File of each repository, a row of it, and what a model is asked.
PROBLEM = "\nPlease reason step by step, and put your final answer within \\boxed{}."
ROWS = {
    "gsm8k": ("main/test.jsonl", {"question": "2+2?", "answer": "#### 4"}, [f"2+2?{PROBLEM}"]),
    "math500": ("test.jsonl", {"problem": "$x$?", "answer": "1", "level": 2}, [f"$x$?{PROBLEM}"]),
    "aime25": ("train.jsonl", {"problem_idx": 1, "problem": "$y$?", "answer": 2}, [f"$y$?{PROBLEM}"]),
    "mbpp": (
        "sanitized/test.jsonl",
        {"prompt": "Add two numbers.", "code": "..", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]},
        ["Add two numbers.\n\nIt must pass:\nassert add(1, 2) == 3\nassert add(0, 0) == 0"],
    ),
    "humaneval": ("test.jsonl", {"prompt": "def f():\n", "test": ".."}, ["```python\ndef f():\n\n```"]),
    "livecodebench": (
        "test.jsonl",
        {"question_content": "Print the sum.", "starter_code": "class S:", "private_test_cases": "x"},
        ["Print the sum.\n\nBegin with this code:\n```python\nclass S:\n```"],
    ),
    "mt-bench": (
        "train.jsonl",
        {"category": "writing", "prompt": ["Write.", "Now shorter."]},
        ["Write.", "Now shorter."],
    ),
    "alpaca": ("train.jsonl", {"instruction": "Sort.", "input": "3, 1", "output": "1, 3"}, ["Sort.\n\n3, 1"]),
    "arena-hard-v2": (
        "data/arena-hard-v2.0/question.jsonl",
        {"uid": "a", "category": "hard_prompt", "prompt": "Explain."},
        ["Explain."],
    ),
}


@pytest.fixture
def repositories(tmp_path, monkeypatch) -> Path:
    """Folders in place of the repositories on the Hub."""
    for name, (file, row, _) in ROWS.items():
        repository, *rest = BENCHMARKS[name].source.split(":")
        folder = tmp_path / repository
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text((json.dumps(row) + "\n") * 3)
        if len(rest) == 2:
            config, split = rest
            data = {"config_name": config, "data_files": [{"split": split, "path": file}]}
            (folder / "README.md").write_text(f"---\nconfigs: {json.dumps([data])}\n---\n")
        for other in BENCHMARKS[name].files:
            if other != file:
                (folder / other).write_text("")
        source = ":".join([str(folder), *rest])
        monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], source=source))
    return tmp_path


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmark(name, repositories):
    found = load_benchmark(name)
    assert found.name == name and len(found.conversations) == 3
    turns = ROWS[name][2]
    assert len(found.conversations[0]) == len(turns)
    for said, expected in zip(found.conversations[0], turns, strict=True):
        assert said.endswith(expected)
    assert len(load_benchmark(name, 2).conversations) == 2


def test_no_more_prompts_than_deepspec_takes(repositories, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "gsm8k", replace(BENCHMARKS["gsm8k"], prompts=1))
    assert len(load_benchmark("gsm8k").conversations) == len(load_benchmark("gsm8k", 3).conversations) == 1


def test_rows_of_another_kind_are_refused(repositories):
    (repositories / "tatsu-lab/alpaca/train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="not those of alpaca .*KeyError.*--data"):
        load_benchmark("alpaca")


def test_names():
    assert names_of(["all"]) == [*ROWS] == [*BENCHMARKS] and names_of(["mbpp"]) == ["mbpp"]
    assert "There is no benchmark 'mmlu'; choose from all, gsm8k" in fails("eval", "--benchmarks", "gsm8k,mmlu")


def test_the_papers_numbers_stand_beside_ours(repositories, tmp_path):
    """For a target that is called like one of the paper's; of the paper's drafters each has a column."""
    assert all(len(row) == 9 for rows in PAPER.values() for row in rows.values())
    assert paper_of("Qwen/Qwen3-14B")["DSpark"]["arena-hard-v2"] == 3.13 and paper_of("embedded") == {}
    target = tmp_path / "Qwen3-4B"
    target.symlink_to(FOLDER / "target")
    options = ["--model", str(target), "--head", str(FOLDER / "head"), "--max-new-tokens", "4", "--limit", "1"]
    results = tmp_path / "results.json"
    printed = run("eval", *options, "--benchmarks", "mt-bench,gsm8k", "--results", str(results))
    (header,) = (line for line in printed.splitlines() if "paper: DSpark" in line)
    assert header.split("accepted")[1].split()[:6] == ["paper:", "Eagle3", "paper:", "DFlash", "paper:", "DSpark"]
    # The first table; that of positions follows.
    lines = {line.split()[0]: line.split() for line in reversed(printed.splitlines()) if line.strip()}
    assert lines["gsm8k"][5:8] == ["5.14", "5.40", "6.11"] and lines["mt-bench"][5:8] == ["2.39", "3.07", "3.64"]
    found = json.loads(results.read_text())
    assert [row["name"] for row in found["results"]] == ["mt-bench", "gsm8k"]
    # Both turns of the one, the only one of the other.
    assert found["results"][0]["tokens"] > 4 >= found["results"][1]["tokens"]
    assert "paper" not in run("eval", "--data", "gsm8k", "--limit", "1", "--max-new-tokens", "4")
