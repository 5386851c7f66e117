"""Prompts for a head that fits its target already, so that `dspark-hf regenerate` drafts with it.

    python examples/embedded_pair/more_prompts.py --gsm8k ../shared/data/gsm8k_train.jsonl --output build/pair/more

writes `greedy.jsonl` and `sampled.jsonl`: to be answered greedily, and at a temperature. None is among the prompts of
regenerate.py: code begins in the middle of their stretches, problems are other ones.
"""

import argparse
import json
import random
from pathlib import Path

from corpus import code_documents, gsm8k_documents
from problems import problems

PROBLEMS_SEED = 30_000  # other problems than those of regenerate.py and of train_target.py
# Code, problems of GSM8K, problems made by rules.
COUNTS = {"greedy": (2850, 1280, 320), "sampled": (600, 320, 80)}


def main(args: argparse.Namespace) -> None:
    before = random.Random(0).sample(gsm8k_documents(args.gsm8k), args.answered)
    kinds = [
        # The held-out files may share lines with others, licences for instance.
        _without(code_documents(middle=True), [*code_documents(), *code_documents(held_out=True)]),
        _without(gsm8k_documents(args.gsm8k), before),
        problems(sum(counts[2] for counts in COUNTS.values()), PROBLEMS_SEED),
    ]
    kinds = [iter(random.Random(1).sample(prompts, len(prompts))) for prompts in kinds]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, counts in COUNTS.items():
        prompts = [next(kind)["prompt"] for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (args.output / f"{name}.jsonl").write_text("".join(lines))


def _without(documents: list[dict[str, str]], others: list[dict[str, str]]) -> list[dict[str, str]]:
    """Documents of different prompts, all of them other ones than those of `others`."""
    seen = {document["prompt"] for document in others}
    return list({d["prompt"]: d for d in documents if d["prompt"] not in seen}.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", required=True, help="GSM8K training split, a .jsonl file")
    parser.add_argument("--answered", type=int, default=2560, help="problems of GSM8K that regenerate.py has answered")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    main(parser.parse_args())
