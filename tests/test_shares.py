"""Shares of the slow tests: together they are all of them, and what changed brings its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from shares import is_about, share_of

ITEMS = [
    SimpleNamespace(nodeid=f"{name}.py::test_{i}", path=Path(f"tests/{name}.py"), keywords={"slow"} if i % 2 else set())
    for name in ("test_demo_browser", "test_kernel_verify", "test_hub")
    for i in range(9)
]


def names(share: str, changed: set[str] = frozenset()) -> list[str]:
    return [item.nodeid for item in share_of(ITEMS, share, changed)]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_shares_are_all_slow_tests_each_once(count):
    found = [name for i in range(count) for name in names(f"{i + 1}/{count}")]
    assert sorted(found) == sorted(item.nodeid for item in ITEMS if item.keywords)


def test_what_changed_brings_its_own():
    assert sum(name.startswith("test_hub") for name in names("1/12", {"dspark", "hub", "cards"})) == 4
    assert len(names("1/12", {"hub"})) <= 5


@pytest.mark.parametrize("share", ["0/3", "4/3", "3", "a/b"])
def test_shares_that_are_none(share):
    with pytest.raises(pytest.UsageError, match=share):
        names(share)


def test_subjects():
    assert is_about(Path("tests/test_demo_browser.py"), {"demo", "load"})
    assert is_about(Path("kernels/tests/test_kernel_verify.py"), {"kernels", "torch", "ext"})
    assert not is_about(Path("tests/test_hub.py"), {"demo"})
