"""What `python -m build` makes of the project, and the Space, each in a venv of what it asks for and nothing else. They
run with `--all`, and always in CI (`make test-package`)."""

import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path

import pytest
from documents import README, snippets
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ports import free_port

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
# What a busy machine may take to start the Space.
SECONDS = 300

# -- Venvs without downloads -----------------------------------------------------------------------------------------


def needed(requirements: Iterable[str]) -> set[str]:
    """Names of the distributions that pip would install for these requirements, from those that are installed here."""
    pending, seen = [Requirement(line) for line in requirements], set()
    while pending:
        one = pending.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in seen:
            continue
        seen.add(key)
        assert distribution(one.name).version in one.specifier or not one.specifier, one
        for child in map(Requirement, distribution(one.name).requires or ()):
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in one.extras or {""}):
                pending.append(child)
    return {name for name, _ in seen}


def fresh_venv(folder: Path, requirements: Iterable[str]) -> Path:
    """The Python of a new venv that sees what the requirements need, and no other package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for name in needed(requirements):
        own = distribution(name)
        for top in {file.parts[0] for file in own.files} - {"..", "/", "__pycache__"}:
            place = packages / top
            if not place.exists():
                place.symlink_to(Path(own.locate_file(top)))
    return folder / "bin" / "python"


def run_in(python: Path, *arguments: str, cwd: Path) -> str:
    """What Python prints."""
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | more


# -- Wheel and sdist -------------------------------------------------------------------------------------------------


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
def wheel(built) -> Path:
    [found] = built.glob("dspark_hf-*-py3-none-any.whl")
    return found


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as file:
        [name] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(file.read(name))


def always(wheel: Path) -> list[str]:
    """What it asks for without any extra."""
    return [line for line in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in line]


def test_the_wheel_has_what_belongs_into_it(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert set(DATA) <= set(names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dspark_hf", "dspark_kernels"}
    told = metadata(wheel)
    assert told["Name"] == "dspark-hf" and told["Version"] == dspark_hf.__version__
    assert told["License-Expression"] == "MIT" and told["Requires-Python"] == ">=3.11"
    assert {"train", "eval", "serve", "demo", "plot", "kernels", "docs", "test"} == set(told.get_all("Provides-Extra"))
    assert sorted(Requirement(line).name for line in always(wheel)) == [
        "psutil",
        "rich",
        "torch",
        "transformers",
        "typer",
    ]


def test_the_sdist_has_the_licence_and_the_readme(built):
    [sdist] = built.glob("dspark_hf-*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "dspark_hf/py.typed"} <= names


def test_the_first_commands_run_from_the_wheel(wheel, tmp_path):
    """Those of the README on the embedded pair, without any extra."""
    python = fresh_venv(tmp_path / "venv", always(wheel))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    files = run_in(
        python, "-c", "import dspark_hf as a, dspark_kernels as b; print(a.__file__, b.__file__)", cwd=tmp_path
    )
    assert all(Path(file).is_relative_to(tmp_path) for file in files.split())
    command = [str(python.with_name("dspark-hf")), "generate", "What is 3 times 4?", "--max-new-tokens", "16"]
    plain, drafted = (
        run_in(python, *command, "--dtype", "float32", *more, cwd=tmp_path) for more in (["--no-draft"], [])
    )
    assert plain.splitlines()[0] == drafted.splitlines()[0] and "tau" in drafted and "tau" not in plain
    [code] = [code for code in snippets(README) if "embedded_pair" in code]
    assert "tokens a round" in run_in(python, "-c", code, cwd=tmp_path)


# -- The Space -------------------------------------------------------------------------------------------------------


def test_the_space_answers(tmp_path):
    """As it is uploaded: `demo/` with the two packages beside `app.py`, and its requirements."""
    space = Path(shutil.copytree(ROOT / "demo", tmp_path / "space"))
    for package in (ROOT / "dspark_hf", ROOT / "kernels" / "torch-ext" / "dspark_kernels"):
        shutil.copytree(package, space / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    python = fresh_venv(tmp_path / "venv", (space / "requirements.txt").read_text().split())
    port = free_port()
    settings = environment(GRADIO_SERVER_PORT=str(port), GRADIO_ANALYTICS_ENABLED="False")
    log = tmp_path / "log"
    with open(log, "w") as file:
        server = subprocess.Popen([str(python), "app.py"], cwd=space, env=settings, stdout=file, stderr=file)
    try:
        assert "gradio" in answer(f"http://127.0.0.1:{port}", server, log).lower()
    finally:
        server.terminate()
        server.wait()
    assert "Traceback" not in log.read_text()


def answer(address: str, server: subprocess.Popen, log: Path) -> str:
    """The page, as soon as there is one."""
    for _ in range(4 * SECONDS):
        assert server.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(address).read().decode()
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(log.read_text())
