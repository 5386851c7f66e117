"""The documents name tests and files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def named_tests() -> list[str]:
    return re.findall(r"`(test_\w+\.py::test_\w+)`", (ROOT / "docs" / "features.md").read_text())


def test_the_matrix_has_rows():
    assert len(named_tests()) >= 15


@pytest.mark.parametrize("name", sorted(set(named_tests())))
def test_every_row_of_the_matrix_has_its_test(name):
    file, function = name.split("::")
    assert f"def {function}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize(
    "document", ["README.md", "docs/features.md", "docs/doctor.md", "docs/training_data.md", "docs/evaluation.md"]
)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", text):
        assert ((ROOT / document).parent / link).exists(), link


@pytest.mark.parametrize("document", ["docs/doctor.md", "docs/training_data.md", "docs/evaluation.md"])
def test_commands_have_their_options(document):
    from typer.main import get_command

    from dspark_hf.cli import app

    known = {
        name: {option for one in command.params for option in one.opts}
        for name, command in get_command(app).commands.items()
    }
    lines = re.findall(r"(?:dspark-hf|-m dspark_hf\.cli) (\w+) ([^`\n]*)", (ROOT / document).read_text())
    assert lines
    for name, rest in lines:
        assert {word for word in rest.split() if word.startswith("--")} <= known[name], (name, rest)
