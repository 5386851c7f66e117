"""The text the embedded pair is trained on: GSM8K problems and Python's own standard library.

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


def gsm8k_documents(path: str | Path) -> list[dict[str, str]]:
    """Problems and worked solutions from a GSM8K `.jsonl` file, without its `<<48/2=24>>` calculator marks."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{"prompt": row["question"], "answer": re.sub(r"<<.*?>>", "", row["answer"])} for row in rows]


def code_documents(held_out: bool = False) -> list[dict[str, str]]:
    """Stretches of standard-library source: the first lines are the prompt, the following ones the answer.

    About 5 % of the files, chosen by a hash of their names, are kept out of training; `held_out=True` gives those.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts) or _is_held_out(str(name)) != held_out:
            continue
        documents += _stretches(path.read_text(encoding="utf-8", errors="ignore"))
    return documents


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT_SHARE


def _stretches(source: str) -> Iterator[dict[str, str]]:
    lines = [line for line in source.splitlines() if line.strip()]
    size = CODE_PROMPT_LINES + CODE_ANSWER_LINES
    for start in range(0, len(lines) - size + 1, size):
        prompt = "\n".join(lines[start : start + CODE_PROMPT_LINES])
        answer = "\n".join(lines[start + CODE_PROMPT_LINES : start + size])
        yield {"prompt": CODE_REQUEST + prompt, "answer": answer}
