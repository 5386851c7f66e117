"""Which tests a run has: all but the slow ones, all, or a share of the slow ones and those about what has changed."""

import re
import subprocess
from collections.abc import Container, Iterable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def add_options(parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--slow", metavar="I/N", help="run the I-th of N shares of the tests that take minutes, no others")
    parser.addoption("--changed", metavar="COMMIT", help="with --slow: also those about what has changed since then")


def choose(config, items: list[pytest.Item]) -> None:
    """Skip or leave out what the options do not ask for."""
    if config.getoption("--slow"):
        kept = share_of(items, config.getoption("--slow"), changed_words(config.getoption("--changed")))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    elif not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --all"))


def rest_slow(values: Iterable, quick: Container) -> list:
    """Parameters of a test, of which all but the quick ones run with --all only."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def share_of(items: list[pytest.Item], share: str, changed: set[str]) -> list[pytest.Item]:
    """The slow tests of a share "I/N", every N-th of them, and those of what changed: `test_demo_browser.py` is about
    paths with a word that begins with "demo"."""
    part, _, count = share.partition("/")
    if not (part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise pytest.UsageError(f"--slow {share}: expected a share such as 1/4.")
    slow = [item for item in items if "slow" in item.keywords]
    chosen = set(sorted(item.nodeid for item in slow)[int(part) - 1 :: int(count)])
    return [item for item in slow if item.nodeid in chosen or is_about(item.path, changed)]


def is_about(test: Path, words: set[str]) -> bool:
    subject = test.stem.split("_")[1]
    return any(word.startswith(subject) for word in words)


def changed_words(commit: str | None) -> set[str]:
    """Words in the paths of Python files that differ from a commit; none where git does not know it, as in a shallow
    clone."""
    if commit is None:
        return set()
    command = ["git", "diff", "--name-only", commit, "--", "*.py"]
    told = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return {word for path in told.stdout.split() for word in re.split("[^a-z0-9]+", path)}
