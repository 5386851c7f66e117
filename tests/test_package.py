"""What `python -m build` makes of the project, and a fresh venv with it: behind `--all`, and always run by CI
(`make test-package`)."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from documents import README, snippets

import dspark_hf

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("dspark_hf", "kernels", "pyproject.toml", "README.md", "LICENSE")
# What is no Python and has to come along.
DATA = [
    "dspark_hf/py.typed",
    "dspark_kernels/py.typed",
    "dspark_hf/demo/style.css",
    "dspark_hf/hub/card_template.md",
    "dspark_hf/hub/registry.json",
    "dspark_hf/hub/custom_generate/generate.py",
    "dspark_hf/pair/head/model.safetensors",
    "dspark_hf/pair/target/tokenizer.json",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was made from it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    # Without a venv of its own, which would download setuptools.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The Python of a venv with the wheel, which sees the packages that the tests run with behind it."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    [wheel] = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "behind.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    return python


def run_in(python: Path, *arguments: str, cwd: Path) -> str:
    """What a command of the venv prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_what_belongs_into_it(built):
    [wheel] = built.glob("dspark_hf-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        told = message_from_bytes(file.read(metadata))
    assert set(DATA) <= set(names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dspark_hf", "dspark_kernels"}
    assert told["Name"] == "dspark-hf" and told["Version"] == dspark_hf.__version__
    assert told["License-Expression"] == "MIT" and told["Requires-Python"] == ">=3.11"
    assert {"train", "eval", "serve", "demo", "plot", "kernels", "docs", "test"} == set(told.get_all("Provides-Extra"))
    always = [name for name in told.get_all("Requires-Dist") if "extra ==" not in name]
    assert sorted(name.partition(">")[0] for name in always) == ["rich", "torch", "transformers", "typer"]


def test_the_sdist_has_the_licence_and_the_readme(built):
    [sdist] = built.glob("dspark_hf-*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "dspark_hf/py.typed"} <= names


def test_the_first_commands_run_from_the_wheel(installed, tmp_path):
    """Not from the checkout: those of the README on the embedded pair."""
    where = run_in(
        installed, "-c", "import dspark_hf, dspark_kernels as k; print(dspark_hf.__file__, k.__file__)", cwd=tmp_path
    )
    assert all(Path(path).is_relative_to(installed.parents[1]) for path in where.split())
    command = str(installed.with_name("dspark-hf"))
    assert dspark_hf.__version__ in run_in(installed, command, "--version", cwd=tmp_path)
    plain, drafted = (
        run_in(
            installed,
            command,
            "generate",
            "What is 3 times 4?",
            "--max-new-tokens",
            "24",
            "--dtype",
            "float32",
            *more,
            cwd=tmp_path,
        )
        for more in (["--no-draft"], [])
    )
    assert plain.splitlines()[0] == drafted.splitlines()[0] and "tau" in drafted and "tau" not in plain
    [code] = [code for code in snippets(README) if "embedded_pair" in code]
    assert "tokens a round" in run_in(installed, "-c", code, cwd=tmp_path)
