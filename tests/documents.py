"""What the documents hold that can be run: Python snippets, commands and links."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from typer.main import get_command

import dspark_hf
from dspark_hf.cli import app
from dspark_hf.embedded import FOLDER
from dspark_hf.hub import registry
from dspark_hf.hub.registry import PublishedHead

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
SERVER = "http://127.0.0.1:8000"
LOCAL = {
    "Qwen/Qwen3-4B": str(FOLDER / "target"),
    "deepseek-ai/dspark_qwen3_4b_block7": str(FOLDER / "head"),
}
OF_PYTEST = ("--all", "--slow")
# Ways to start the command line.
STARTS = (["dspark-hf"], ["accelerate", "launch", "-m", "dspark_hf.cli"])


def snippets(document: Path) -> list[str]:
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)


def run(code: str, document: Path, monkeypatch) -> None:
    """Run a snippet, with Hub ids resolved to local folders and a server where it talks to one."""
    entry = PublishedHead(str(FOLDER / "head"), str(FOLDER / "target"), "deepspec", "dspark", 7, "this project")
    monkeypatch.setattr(registry, "published_heads", lambda: (entry,))
    for hub_id, folder in LOCAL.items():
        code = code.replace(hub_id, folder)
    with served() if "OpenAI(" in code else nullcontext(SERVER) as address:
        exec(compile(code.replace(SERVER, address), str(document), "exec"), {"__name__": "__main__"})


@contextmanager
def served() -> Iterator[str]:
    """What `dspark-hf serve --api-key secret` serves, at a free port."""
    from test_serve import serving

    from dspark_hf.serving.app import Service

    target, head, tokenizer = dspark_hf.embedded_pair()
    manager = target.init_continuous_batching(assistant_model=head)
    with serving(Service(manager, tokenizer, "dspark-pair", "secret")) as (address, _):
        yield address


def lines(document: Path) -> list[str]:
    """Every line that is indented as code, with those that it goes on in."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL).replace("\\\n", " ")
    return re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE)


def quoted(document: Path) -> list[str]:
    """What stands between backticks, but for Python."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def arguments_of(code: str) -> list[str] | None:
    """Words behind `dspark-hf`, however it is started; `None` for other code."""
    try:
        words = shlex.split(code, comments=True)
    except ValueError:
        return None
    start = next((start for start in STARTS if words[: len(start)] == start), None)
    return None if start is None else words[len(start) :]


def parse(arguments: list[str]) -> None:
    """Have the real command line read a command without running it.

    Raises:
        click.ClickException: for what it does not take.
    """
    name, *rest = arguments
    get_command(app).commands[name].make_context(name, rest).close()


def options() -> dict[str, set[str]]:
    """All options by command."""
    commands = get_command(app).commands
    return {name: {option for one in command.params for option in one.opts} for name, command in commands.items()}


def check_commands(document: Path) -> set[str]:
    """Every line of code is taken by the command that it names, and every option and command that is named between
    backticks exists. Returns the commands of the lines."""
    seen, known = set(), options()
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for code in lines(document):
        arguments = arguments_of(code)
        if arguments is not None:
            parse(arguments)
            seen.add(arguments[0])
    for code in [*lines(document), *quoted(document)]:
        words = code.partition(" #")[0].split()
        if words[:1] == ["make"] and len(words) > 1:
            assert words[1] in phony[1].split(), code
        elif words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), code
        elif code.startswith("--") and words[0] not in OF_PYTEST:
            assert any(words[0] in of_one for of_one in known.values()), code
        else:
            arguments = arguments_of(code)
            if arguments and not arguments[0].startswith("--"):
                assert {word for word in arguments[1:] if word.startswith("--")} <= known[arguments[0]], code
    return seen


def links(document: Path) -> list[str]:
    """Where its links within the repository lead, without the heading."""
    found = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", document.read_text())
    return [link for link in found if not (document.parent / link).exists()]


def anchors(document: Path) -> set[str]:
    """Headings as links name them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_anchors(document: Path) -> list[str]:
    """Links to headings that are not there, of this page or another."""
    found = re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", document.read_text())
    return [f"{to}#{at}" for to, at in found if at not in anchors(document.parent / to if to else document)]
