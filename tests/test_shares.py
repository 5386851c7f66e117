"""Shares of the slow tests: together they are all of them."""

from types import SimpleNamespace

import pytest
from shares import share_of

MARKS = [], ["slow"]
ITEMS = [
    # The keywords of an item are also the names of the folders that it lies in.
    SimpleNamespace(nodeid=f"{name}.py::test_{i}", keywords={"slow"}, get_closest_marker=MARKS[i % 2].count)
    for name in ("test_demo_browser", "test_kernel_verify", "test_hub")
    for i in range(9)
]


def names(share: str) -> list[str]:
    return [item.nodeid for item in share_of(ITEMS, share)]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_shares_are_all_slow_tests_each_once(count):
    found = [name for i in range(count) for name in names(f"{i + 1}/{count}")]
    assert sorted(found) == sorted(item.nodeid for item in ITEMS if item.get_closest_marker("slow"))


@pytest.mark.parametrize("share", ["0/3", "4/3", "3", "a/b"])
def test_shares_that_are_none(share):
    with pytest.raises(pytest.UsageError, match=share):
        names(share)
