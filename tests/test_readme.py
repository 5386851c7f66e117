"""Every Python snippet of the README runs, in order, with Hub ids resolved to local folders."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from test_serve import serving

import dspark_hf
from dspark_hf.embedded import FOLDER
from dspark_hf.hub import registry
from dspark_hf.hub.registry import PublishedHead
from dspark_hf.serving.app import Service

README = Path(__file__).parents[1] / "README.md"
SERVER = "http://127.0.0.1:8000"
LOCAL = {
    "Qwen/Qwen3-4B": str(FOLDER / "target"),
    "deepseek-ai/dspark_qwen3_4b_block7": str(FOLDER / "head"),
}


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_are_snippets():
    assert len(snippets()) >= 4


@pytest.mark.parametrize("code", snippets())
def test_snippet(code, capsys, monkeypatch):
    entry = PublishedHead(str(FOLDER / "head"), str(FOLDER / "target"), "deepspec", "dspark", 7, "this project")
    monkeypatch.setattr(registry, "published_heads", lambda: (entry,))
    for hub_id, folder in LOCAL.items():
        code = code.replace(hub_id, folder)
    with served() if "OpenAI(" in code else nullcontext(SERVER) as address:
        exec(compile(code.replace(SERVER, address), str(README), "exec"), {"__name__": "__main__"})


@contextmanager
def served() -> Iterator[str]:
    """What `dspark-hf serve --api-key secret` serves, at a free port."""
    target, head, tokenizer = dspark_hf.embedded_pair()
    manager = target.init_continuous_batching(assistant_model=head)
    with serving(Service(manager, tokenizer, "dspark-pair", "secret")) as (address, _):
        yield address


def codes() -> list[str]:
    """Every line of the README that is indented as code, and what stands between backticks, but for Python."""
    text = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL).replace("\\\n", " ")
    lines = re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE)
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def test_commands_of_the_readme_exist():
    """Each names a command, and options that this command has; options that are named alone are one's."""
    from typer.main import get_command

    from dspark_hf.cli import app

    commands = get_command(app).commands
    known = {name: {option for one in command.params for option in one.opts} for name, command in commands.items()}
    phony = re.search(r"^\.PHONY: (.*)$", (README.parent / "Makefile").read_text(), flags=re.MULTILINE)
    targets = set(phony[1].split())
    seen, options = set(), set()
    for code in codes():
        words = code.partition(" #")[0].split()
        for start in (["make"], ["dspark-hf"], ["accelerate", "launch", "-m", "dspark_hf.cli"]):
            if words[: len(start)] != start or words == start:
                continue
            name, *rest = words[len(start) :]
            if start == ["make"]:
                assert name in targets, code
            else:
                used = {word for word in rest if word.startswith("--")}
                assert used <= known[name], code
                seen.add(name)
                options |= used
        if code.startswith("--"):
            assert any(words[0] in of_one for of_one in known.values()), code
    assert len(seen) > 10 and len(options) > 15


def test_version_is_the_package_version():
    from importlib.metadata import version

    assert version("dspark-hf") == dspark_hf.__version__
