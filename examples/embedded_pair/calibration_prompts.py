"""Prompts to calibrate the embedded head on: problems that it was not trained on, and held-out beginnings of code.

    python examples/embedded_pair/calibration_prompts.py --gsm8k ../shared/data/gsm8k_test.jsonl --output prompts.jsonl

The first 164 problems and 64 of the beginnings are left for measuring.
"""

import argparse
import json
import random
from pathlib import Path

from corpus import code_documents, gsm8k_documents


def main(args: argparse.Namespace) -> None:
    code = code_documents(held_out=True)
    random.seed(0)
    random.shuffle(code)
    prompts = [document["prompt"] for document in gsm8k_documents(args.gsm8k)[164:764] + code[64:]]
    random.shuffle(prompts)
    args.output.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", required=True, help="GSM8K test split, .jsonl")
    parser.add_argument("--output", type=Path, required=True)
    main(parser.parse_args())
