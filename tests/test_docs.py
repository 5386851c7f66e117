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


@pytest.mark.parametrize("document", ["README.md", "docs/features.md", "docs/doctor.md", "docs/training.md"])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", text):
        assert ((ROOT / document).parent / link).exists(), link


def test_options_of_training_exist():
    """Those with hyphens are of `dspark-hf train`, those with underscores of accelerate's launcher."""
    from accelerate.commands.launch import launch_command_parser
    from typer.main import get_command

    from dspark_hf.cli import app

    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", (ROOT / "docs" / "training.md").read_text()))
    train = {option for own in get_command(app).commands["train"].params for option in own.opts}
    launch = {option for own in launch_command_parser()._actions for option in own.option_strings}
    assert len(named & train) > 15 and len(named - train) > 5
    assert named <= train | launch
