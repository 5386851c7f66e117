"""How long a pair's first call takes beside plain decoding's: nothing is known of the device, and nothing is measured
before the first token.

    python benchmarks/first_call.py

Every call runs in a process of its own with an empty cache folder. "first" is the first `generate` of the process,
"second" the one after it. The embedded pair reads the beginning of a problem; the larger pair has the shape of
Qwen3-0.6B with random weights, reads random tokens, and its drafts fail.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

PAIRS = ("embedded", "qwen3-0.6b")
PROMPT, NEW_TOKENS = 32, 8


def pair_of(name: str):
    """Target, head, and a prompt [1, PROMPT]."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import dspark_hf
    from dspark_hf.evaluation.prompts import domain_prompts, encode

    if name == "embedded":
        target, head, tokenizer = dspark_hf.embedded_pair(dtype="bfloat16")
        texts = [encode([text], tokenizer, "cpu")["input_ids"] for text in domain_prompts("gsm8k")]
        return target, head, next(ids[:, :PROMPT] for ids in texts if ids.shape[1] >= PROMPT)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    target = Qwen3ForCausalLM(config).eval()
    shape = dspark_hf.DSparkConfig.from_target(config, num_hidden_layers=5, block_size=7)
    head = dspark_hf.DSparkHead(shape).eval()
    return target, head, torch.randint(5, 1000, (1, PROMPT))


def call(name: str, drafts: bool) -> None:
    """What one process measures: seconds of its first two calls, on standard output."""
    target, head, ids = pair_of(name)
    kwargs = {"assistant_model": head} if drafts else {}
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        target.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds))


def in_a_process(name: str, drafts: bool) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--call", name, *(["--drafts"] if drafts else [])]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(pairs: list[str], turns: int) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"seconds of a call, prompt {PROMPT}, {NEW_TOKENS} new tokens, median of {turns}"
    table = Table("pair", "call", "plain", "with the head", "ratio", title=title)
    for name in pairs:
        runs = [[in_a_process(name, drafts) for drafts in (False, True)] for _ in range(turns)]
        for which, label in enumerate(("first", "second")):
            plain, ours = (statistics.median(run[drafts][which] for run in runs) for drafts in (0, 1))
            table.add_row(name, label, f"{plain:.3f}", f"{ours:.3f}", f"{ours / plain:.2f}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, choices=PAIRS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--call", help=argparse.SUPPRESS)
    parser.add_argument("--drafts", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        call(args.call, args.drafts)
    else:
        main(args.pairs, args.turns)
