"""Imports point one way: from the layers above to those below, and in no circle. Lazy ones inside functions count."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From above to below: packages and modules of `dspark_hf`, and the kernels. Those of one row do not know each other.
LAYERS = (
    ("cli",),
    ("demo",),
    ("dspark_hf",),
    ("embedded", "heads", "serving", "training"),
    ("hub",),
    ("evaluation",),
    ("checkpoints", "generation"),
    ("modeling_dspark", "pairing", "scheduling"),
    ("backbones", "confidence_head", "sequential_heads", "shared_embeddings"),
    ("configuration_dspark", "version"),
    ("dspark_kernels",),
)

Arrow = tuple[str, str]


def modules() -> dict[str, Path]:
    """By name, all files of the two packages."""
    found = {}
    for top in (ROOT, ROOT / "kernels" / "torch-ext"):
        for package in ("dspark_hf", "dspark_kernels"):
            for path in (top / package).rglob("*.py"):
                parts = path.relative_to(top).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, package: str, known: set[str]) -> Iterator[str]:
    """The known modules that a file of a package imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = (f"{base}.{alias.name}" for alias in node.names)
            yield from (found for name in names if (found := name if name in known else base) in known)


def packages_of(name: str) -> set[str]:
    """The packages that a module is in, which run when it is imported."""
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def arrows() -> set[Arrow]:
    """(module, another one that it imports, or a package that runs for it)."""
    found, files = set(), modules()
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for other in imports(path.read_text(), package, set(files)):
            # What the importer is in runs already.
            running = {other} | packages_of(other) - packages_of(name)
            found |= {(name, run) for run in running - {name}}
    return found


def circle(among: set[Arrow]) -> list[str]:
    """Modules of which each imports the one before it, the last of them the first; empty where there is no circle."""
    below: dict[str, set[str]] = {}
    for module, other in among:
        below.setdefault(module, set()).add(other)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def layer_of(module: str) -> str:
    """What the table calls the part of the project that a module is in."""
    top, *inside = module.split(".")
    return inside[0] if inside and top == "dspark_hf" else top


@pytest.mark.parametrize(
    "source, found",
    [
        ("from ..a import x", ["p.a"]),
        ("from .. import a", ["p.a"]),
        ("from . import c, x", ["p.b.c", "p.b"]),
        ("def f():\n    from .c import x", ["p.b.c"]),
        ("if TYPE_CHECKING:\n    import p.a\nimport torch", ["p.a"]),
        ("from torch import a", []),
    ],
)
def test_imports_are_found_wherever_they_are(source, found):
    assert list(imports(source, "p.b", {"p", "p.a", "p.b", "p.b.c"})) == found


def test_there_is_no_circle():
    assert circle(arrows()) == []


def test_every_module_is_of_one_layer():
    listed = [name for row in LAYERS for name in row]
    assert sorted(listed) == sorted({layer_of(module) for module in modules()})


def test_arrows_point_down():
    height = {name: -i for i, row in enumerate(LAYERS) for name in row}
    between = [(module, other) for module, other in arrows() if layer_of(module) != layer_of(other)]
    assert between
    up = [f"{m} -> {other}" for m, other in between if height[layer_of(m)] <= height[layer_of(other)]]
    assert up == []
