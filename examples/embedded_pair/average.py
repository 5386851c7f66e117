"""Write the weighted mean of two targets, or of two heads: between what one run learned and what a later one added.

    python examples/embedded_pair/average.py --first build/pair/target_1 --second build/pair/target_2 --share 0.333 \
        --output build/pair/target

A run on other text pulls the weights away from the text before it; part of the way has most of the gain for less of the
loss (Wortsman et al. 2022, Robust fine-tuning of zero-shot models).
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark_hf import DSparkHead


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    kind = DSparkHead if args.heads else AutoModelForCausalLM
    first, second = (kind.from_pretrained(path, dtype=torch.float32) for path in (args.first, args.second))
    for mean, other in zip(first.parameters(), second.parameters(), strict=True):
        mean.lerp_(other, args.share)
    first.to(torch.bfloat16).save_pretrained(args.output)
    if not args.heads:
        AutoTokenizer.from_pretrained(args.first).save_pretrained(args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", required=True)
    parser.add_argument("--second", required=True)
    parser.add_argument("--share", type=float, required=True, help="of the second in the mean")
    parser.add_argument("--heads", action="store_true", help="they are heads, not targets")
    parser.add_argument("--output", type=Path, required=True)
    main(parser.parse_args())
