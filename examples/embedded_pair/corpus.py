"""The text the embedded pair is trained on, beside problems.py: GSM8K and Python's own standard library.

Every document is a chat of one turn, `{"prompt": ..., "answer": ...}`.
"""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CODE_REQUEST = "Continue this Python code:\n"
CODE_PROMPT_LINES, CODE_ANSWER_LINES = 8, 24
# Tables of data and test suites: long, and not what one reads when one reads Python.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "site-packages", "__pycache__"}
HELD_OUT_SHARE = 0.05
# `$<<48/2=24>>24 clips`: currency, expression, result, the word behind.
MARK = re.compile(r"(\$?)<<([^<>=]+)=([^<>=]+)>>[\d,.]*\s?([a-z]*)")


def gsm8k_documents(path: str | Path) -> list[dict[str, str]]:
    """Problems and worked solutions from a GSM8K `.jsonl` file, without its `<<48/2=24>>` calculator marks."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{"prompt": row["question"], "answer": re.sub(r"<<.*?>>", "", row["answer"])} for row in rows]


def worked(steps: list[str]) -> str:
    """The regular style of answers: `24 + 36 = 60 marbles` a line, then what the last step came to."""
    lines = [f"{'Then' if number else 'First'}, {step}." for number, step in enumerate(steps)]
    result = steps[-1].split(" = ")[1]
    return "\n".join([*lines, f"So the answer is {result}.", f"#### {result.split()[0]}"])


def worked_gsm8k_documents(path: str | Path) -> list[dict[str, str]]:
    """The problems of a GSM8K `.jsonl` file with answers in the regular style, made of their calculator marks.

    Problems without marks, and those whose last mark is not the answer, are left out.
    """
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    documents = []
    for row in rows:
        steps = [_step(*found, row["question"]) for found in MARK.findall(row["answer"])]
        if steps and all(steps) and _number(steps[-1]) == row["answer"].split("#### ")[1].replace(",", ""):
            documents.append({"prompt": row["question"], "answer": worked(steps)})
    return documents


def _step(currency: str, expression: str, result: str, unit: str, question: str) -> str | None:
    """`48 / 2 = 24 clips`; the unit is the word behind the mark where the question has it too."""
    if not re.fullmatch(r"[\d.+*/()-]+", expression) or not re.fullmatch(r"\d+(\.\d+)?", result):
        return None
    spaced = re.sub(r"([+*/-])", r" \1 ", expression)
    if currency:
        unit = "dollars"
    elif len(unit) < 4 or unit not in question.split():
        unit = ""
    return f"{spaced} = {result} {unit}".strip()


def _number(step: str) -> str:
    return step.split(" = ")[1].split()[0]


def code_documents(held_out: bool = False, middle: bool = False) -> list[dict[str, str]]:
    """Stretches of standard-library source: the first lines are the prompt, the following ones the answer.

    About 5 % of the files, chosen by a hash of their names, are kept out of training; `held_out=True` gives those.
    `middle=True` gives stretches that begin in the middle of the others.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts) or _is_held_out(str(name)) != held_out:
            continue
        documents += _stretches(path.read_text(encoding="utf-8", errors="ignore"), middle)
    return documents


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE


def _stretches(source: str, middle: bool) -> Iterator[dict[str, str]]:
    lines = [line for line in source.splitlines() if line.strip()]
    size = CODE_PROMPT_LINES + CODE_ANSWER_LINES
    for start in range(size // 2 if middle else 0, len(lines) - size + 1, size):
        prompt = "\n".join(lines[start : start + CODE_PROMPT_LINES])
        answer = "\n".join(lines[start + CODE_PROMPT_LINES : start + size])
        yield {"prompt": CODE_REQUEST + prompt, "answer": answer}
