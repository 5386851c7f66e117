"""Every Python snippet of the README runs, in order, with Hub ids resolved to local folders."""

import re
from pathlib import Path

import pytest

import dspark_hf
from dspark_hf.embedded import FOLDER
from dspark_hf.hub import registry
from dspark_hf.hub.registry import PublishedHead

README = Path(__file__).parents[1] / "README.md"
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
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})


def test_commands_of_the_readme_exist():
    """Each `dspark-hf` and `make` line names a command and options that exist."""
    from typer.main import get_command

    from dspark_hf.cli import app

    commands = get_command(app).commands
    targets = re.search(r"^\.PHONY: (.*)$", (README.parent / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    lines = re.findall(r"^ {4}(?:dspark-hf|make) .*$", README.read_text(), flags=re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        tool, name, *rest = line.split()
        if tool == "make":
            assert name in targets, line
            continue
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line


def test_version_is_the_package_version():
    from importlib.metadata import version

    assert version("dspark-hf") == dspark_hf.__version__
