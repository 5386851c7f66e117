"""Lay out `build/` as kernel-builder would, so that the `kernels` library loads this checkout:

    python kernels/build_local.py [--output kernels]
    kernels.get_local_kernel(Path("kernels"))

The package is Python only, so that every variant is a copy of it beside its metadata.
"""

import argparse
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).parent


def build(output: Path) -> list[Path]:
    """Write `output`/build/torch-<backend> for every backend of build.toml; returns these folders."""
    general = tomllib.loads((HERE / "build.toml").read_text())["general"]
    package = general["name"].replace("-", "_")
    source = HERE / "torch-ext" / package
    digest = hashlib.sha256()
    for file in sorted(source.rglob("*.py")):
        digest.update(file.read_bytes())
    variants = []
    for backend in general["backends"]:
        folder = output / "build" / f"torch-{backend}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = {
            "name": general["name"],
            "id": f"_{package}_{backend}_{digest.hexdigest()[:7]}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(folder)
    return variants


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE)
    for variant in build(parser.parse_args().output):
        print(variant)
