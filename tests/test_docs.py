"""The pages of docs/ and the notebooks: what can be run in them runs, and what they name exists."""

import json
import re
from pathlib import Path

import pytest
import yaml
from documents import PAGES, README, ROOT, broken_anchors, check_commands, links, options, run, snippets
from shares import rest_slow

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SNIPPETS = [pytest.param(page, code, id=f"{page.stem}-{i}") for page in PAGES for i, code in enumerate(snippets(page))]


def named_tests() -> list[str]:
    return re.findall(r"`(test_\w+\.py::test_\w+)`", (ROOT / "docs" / "features.md").read_text())


def test_the_matrix_has_rows():
    assert len(named_tests()) >= 15


@pytest.mark.parametrize("name", sorted(set(named_tests())))
def test_every_row_of_the_matrix_has_its_test(name):
    file, function = name.split("::")
    assert f"def {function}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.stem)
def test_commands_and_links(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_commands(page)
    assert links(page) == broken_anchors(page) == []


def test_every_command_is_in_the_docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {name for page in [README, *PAGES] for name in check_commands(page)} == set(options())


@pytest.mark.parametrize("page, code", SNIPPETS)
def test_snippet(page, code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(code, page, monkeypatch)


@pytest.mark.parametrize("notebook", rest_slow(NOTEBOOKS, quick=NOTEBOOKS[:1]), ids=lambda path: path.stem)
def test_notebook(notebook, monkeypatch, tmp_path):
    """Its cells run one after the other."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    names = {"__name__": "__main__"}
    for i, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {i}", "exec"), names)


def pages_of(nav: list | dict | str) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def test_the_site_has_every_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(nav)) == [page.name for page in PAGES]


def test_files_that_contributors_are_sent_to_exist():
    """What stands between backticks and looks like a path of the repository."""
    named = re.findall(r"`([\w./-]+/[\w.-]+\.\w+|[A-Z]+\.md|[\w./-]+/)`", CONTRIBUTING.read_text())
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_notebooks_are_there():
    assert [Path(path).stem for path in NOTEBOOKS] == ["first_steps", "train_your_own"]
