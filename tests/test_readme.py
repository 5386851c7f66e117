"""The README: its snippets run, its commands are taken, its links lead somewhere, and it stays short."""

from importlib.metadata import version

import pytest
from documents import README, broken_anchors, check_commands, links, run, snippets

import dspark_hf


def test_it_is_short():
    assert len(README.read_text().splitlines()) < 200


def test_there_are_snippets():
    assert len(snippets(README)) >= 2


@pytest.mark.parametrize("code", snippets(README))
def test_snippet(code, monkeypatch):
    run(code, README, monkeypatch)


def test_commands():
    assert len(check_commands(README)) > 8


def test_links():
    assert links(README) == broken_anchors(README) == []


def test_version_is_the_package_version():
    assert version("dspark-hf") == dspark_hf.__version__
