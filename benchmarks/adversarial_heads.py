"""What a useless head costs: plain generate against heads whose drafts fail, with the load schedule.

    python benchmarks/adversarial_heads.py [--batch-sizes 1,16] [--repeats 6]

Two heads for the embedded target: one of random weights, and the embedded one made to draft a token that the target
never writes, so that every draft fails while its confidence stays what it was. A turn is plain, head, head, plain;
several turns of several batches of prompts, compared as `dspark-hf bench` does.
"""

import argparse
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import dspark_hf
from dspark_hf.evaluation.bench import median_polish
from dspark_hf.evaluation.prompts import domain_prompts, encode

# Of prompts.
BATCHES = 4


class FailingHead(dspark_hf.DSparkHead):
    """Drafts the mask token, whatever comes."""

    def base_logits(self, hidden, embeddings):
        logits = super().base_logits(hidden, embeddings)
        logits[..., self.config.mask_token_id] += 1e4
        return logits


def heads(target, dtype):
    """The two heads, by name."""
    torch.manual_seed(0)
    config = dspark_hf.DSparkConfig.from_target(target.config, num_hidden_layers=3, markov_rank=64, mask_token_id=4)
    folder = dspark_hf.embedded.FOLDER / "head"
    return {
        "random weights": dspark_hf.DSparkHead(config).to(dtype).eval(),
        "every draft fails": FailingHead.from_pretrained(folder, dtype=dtype).eval(),
    }


def seconds_of(target, inputs, tokens, **kwargs) -> float:
    started = time.perf_counter()
    target.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, **kwargs)
    return time.perf_counter() - started


def turn(target, head, inputs, tokens) -> tuple[float, float]:
    """Mean seconds of plain, head, head, plain: two runs of the head see the probe of every 256 rounds."""
    plain = seconds_of(target, inputs, tokens)
    ours = sum(seconds_of(target, inputs, tokens, assistant_model=head) for _ in range(2))
    return (plain + seconds_of(target, inputs, tokens)) / 2, ours / 2


def main(args: argparse.Namespace) -> None:
    target, _, tokenizer = dspark_hf.embedded_pair(dtype=args.dtype)
    prompts = domain_prompts("gsm8k")
    table = Table(title=f"{args.dtype}, {args.tokens} tokens a row, {torch.get_num_threads()} CPU threads")
    for column in ("head", "batch", "plain s", "with head s", "speed of plain's"):
        table.add_column(column, justify="right")
    for size in map(int, args.batch_sizes.split(",")):
        batches = [encode((prompts * 2)[i * size :][:size], tokenizer, target.device) for i in range(BATCHES)]
        for name, head in heads(target, getattr(torch, args.dtype)).items():
            # The first calls learn what steps cost, and what the head is worth.
            for _ in range(3):
                seconds_of(target, batches[0], args.tokens, assistant_model=head)
            plain, ours = 0.0, 0.0
            for inputs in batches:
                turns = [turn(target, head, inputs, args.tokens) for _ in range(args.repeats)]
                seconds, _ = median_polish(np.array(turns))
                plain, ours = plain + seconds[0], ours + seconds[1]
            table.add_row(name, str(size), f"{plain:.3f}", f"{ours:.3f}", f"{plain / ours:.3f}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", default="1,16")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    main(parser.parse_args())
