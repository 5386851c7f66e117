"""Which tests a run has: all but the slow ones, all, or a share of the slow ones."""

from collections.abc import Container, Iterable

import pytest


def add_options(parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--slow", metavar="I/N", help="run the I-th of N shares of the tests that take minutes, no others")


def choose(config, items: list[pytest.Item]) -> None:
    """Skip or leave out what the options do not ask for."""
    if config.getoption("--slow"):
        kept = share_of(items, config.getoption("--slow"))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    elif not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --all"))


def rest_slow(values: Iterable, quick: Container) -> list:
    """Parameters of a test, of which all but the quick ones run with --all only."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def share_of(items: list[pytest.Item], share: str) -> list[pytest.Item]:
    """The slow tests of a share "I/N", every N-th of them."""
    part, _, count = share.partition("/")
    if not (part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise pytest.UsageError(f"--slow {share}: expected a share such as 1/4.")
    slow = [item for item in items if item.get_closest_marker("slow")]
    chosen = set(sorted(item.nodeid for item in slow)[int(part) - 1 :: int(count)])
    return [item for item in slow if item.nodeid in chosen]
