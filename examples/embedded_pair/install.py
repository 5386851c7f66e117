"""Copy a trained pair into the package, both in bfloat16.

python examples/embedded_pair/install.py --target build/pair/target --head build/pair/head
"""

import argparse
import shutil
from pathlib import Path

import torch

from dspark_hf import DSparkHead
from dspark_hf.embedded import FOLDER

LIMIT = 16_000_000  # bytes, both together


def main(target: Path, head: Path) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(target, FOLDER / "target")
    DSparkHead.from_pretrained(head, dtype=torch.bfloat16).save_pretrained(FOLDER / "head")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER}: {size:,} bytes")
    if size > LIMIT:
        raise SystemExit(f"The pair takes {size:,} bytes; the package allows {LIMIT:,}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    args = parser.parse_args()
    main(args.target, args.head)
