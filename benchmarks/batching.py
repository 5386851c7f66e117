"""Many requests: transformers' own continuous batching, ours with a head, and static batches one after the other.

    python benchmarks/batching.py [--requests 64] [--slots 16] [--tokens 128] [--repeats 2]

The embedded pair in float32 on problems of GSM8K, all of them there at the start. The ways take turns; tokens a second
of the median turn, and of ours how many texts equal plain `generate`'s.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

import dspark_hf
from dspark_hf.evaluation.prompts import domain_prompts, encode

Tokens = list[list[int]]


def main(args: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    model, head, tokenizer = dspark_hf.embedded_pair(torch.float32)
    texts = domain_prompts("gsm8k")[: args.requests]
    prompts = [encode([text], tokenizer, "cpu")["input_ids"][0].tolist() for text in texts]
    ends, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    config = GenerationConfig(do_sample=False, max_new_tokens=args.tokens, eos_token_id=ends, pad_token_id=pad)
    batching = ContinuousBatchingConfig(max_requests_per_batch=args.slots)

    def continuous(**kwargs) -> Tokens:
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching, **kwargs)
        return [output.generated_tokens for output in outputs.values()]

    def static(**kwargs) -> Tokens:
        written = []
        for start in range(0, len(prompts), args.slots):
            inputs = encode(texts[start : start + args.slots], tokenizer, "cpu")
            sequences = model.generate(**inputs, generation_config=config, **kwargs)
            written += [_until_end(row, ends) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
        return written

    ways: dict[str, Callable[[], Tokens]] = {
        "generate_batch": lambda: continuous(),
        "static batches": lambda: static(),
        "generate_batch with the head": lambda: continuous(assistant_model=head),
        "static batches with the head": lambda: static(assistant_model=head),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    expected, same = static(), {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            written = way()
            speeds[name].append(sum(map(len, written)) / (time.perf_counter() - started))
            same[name] = sum(own == other for own, other in zip(written, expected, strict=True))
    records = [
        {"way": name, "tokens_per_second": statistics.median(speeds[name]), "same": same[name], "of": len(prompts)}
        for name in ways
    ]
    table = Table(title=f"{len(prompts)} requests, {args.slots} at once, {args.tokens} new tokens, float32")
    for column in ("way", "tokens/s", "of transformers' own", "texts as plain"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for record in records:
        speed, ratio = record["tokens_per_second"], record["tokens_per_second"] / records[0]["tokens_per_second"]
        table.add_row(record["way"], f"{speed:.0f}", f"{ratio:.2f}x", f"{record['same']} of {record['of']}")
    Console().print(table)
    if args.json is not None:
        args.json.write_text(json.dumps(records, indent=2) + "\n")


def _until_end(tokens: list[int], ends: int | list[int]) -> list[int]:
    """Without the padding behind an end."""
    known = {ends} if isinstance(ends, int) else set(ends or ())
    end = next((i for i, token in enumerate(tokens) if token in known), len(tokens) - 1)
    return tokens[: end + 1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
