"""What it costs to keep states that cannot be cut back: a verify pass over a block of tokens, with the commit behind it
in which rows keep different numbers of them, beside the same pass of the unchanged model with its own cache, which
keeps all tokens and could not take one back.

    python benchmarks/state_keeping.py [--batch-sizes 1,8] [--repeats 10] [--json costs.json]

The models are of random weights: six layers of a gated delta rule (Qwen3-Next) or Mamba 2 (Bamba) and two of attention.
"""

import argparse
import copy
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import BambaConfig, BambaForCausalLM, DynamicCache, Qwen3NextConfig, Qwen3NextForCausalLM

from dspark_hf.generation.releases import cache_argument
from dspark_hf.generation.target import Target

# Tokens of a text before the block, and of the block.
CONTEXT, BLOCK = 256, 8
ATTENTION = (3, 7)
SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip


def gated_delta() -> Qwen3NextForCausalLM:
    types = ["full_attention" if i in ATTENTION else "linear_attention" for i in range(8)]
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64}
    fields = {"head_dim": 64, "linear_value_head_dim": 64, "num_experts": 0, "layer_types": types}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES | heads | fields))


def mamba2() -> BambaForCausalLM:
    heads = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1}
    return BambaForCausalLM(BambaConfig(**SIZES | heads, attn_layer_indices=list(ATTENTION)))


MODELS = {"gated delta": gated_delta, "Mamba 2": mamba2}


class Unchanged:
    """The model with its own cache."""

    def __init__(self, model, text: torch.Tensor):
        self.model, self.argument = model, cache_argument(model)
        self.cache = DynamicCache(config=model.config)
        model(text, **{self.argument: self.cache}, use_cache=True, logits_to_keep=1)

    def seconds(self, block: torch.Tensor) -> float:
        cache = copy.deepcopy(self.cache)
        started = time.perf_counter()
        self.model(block, **{self.argument: cache}, use_cache=True)
        return time.perf_counter() - started


class Ours:
    """The model as rounds see it, with states kept and picked."""

    def __init__(self, model, text: torch.Tensor):
        self.target = Target(model, [1, 4, 6])
        self.cache = self.target.new_cache(len(text))
        self.target.forward(text, self.cache, torch.tensor([CONTEXT - 1]))
        self.cache.commit([CONTEXT] * len(text))

    def seconds(self, block: torch.Tensor) -> tuple[float, float]:
        """Of the pass and of the commit, in which row r keeps 1 + r % BLOCK tokens, one row half of them."""
        counts = [1 + r % BLOCK for r in range(len(block))] if len(block) > 1 else [BLOCK // 2]
        self.cache.lengths = [CONTEXT] * len(block)
        started = time.perf_counter()
        self.target.forward(block, self.cache)
        passed = time.perf_counter()
        self.cache.commit(counts)
        return passed - started, time.perf_counter() - passed


@torch.inference_mode()
def measure(name: str, rows: int, repeats: int) -> dict:
    """Medians in milliseconds, of runs in turn."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    text, block = (torch.randint(1, 4096, (rows, count)) for count in (CONTEXT, BLOCK))
    unchanged, ours, found = Unchanged(model, text), Ours(model, text), []
    for _ in range(repeats + 3):
        found.append((unchanged.seconds(block), *ours.seconds(block)))
    plain, passed, commit = (1000 * statistics.median(own) for own in zip(*found[3:], strict=True))
    costs = {"unchanged_ms": plain, "pass_ms": passed, "commit_ms": commit, "ratio": (passed + commit) / plain}
    return {"layers": name, "batch": rows, **costs}


def main(args: argparse.Namespace) -> None:
    console = Console()
    title = f"A pass over {BLOCK} tokens a row behind {CONTEXT}, float32, {torch.get_num_threads()} CPU threads"
    table = Table(title=title)
    for column in ("layers", "batch", "unchanged ms", "pass ms", "commit ms", "of unchanged"):
        table.add_column(column, justify="right")
    results = [measure(name, rows, args.repeats) for name in MODELS for rows in map(int, args.batch_sizes.split(","))]
    for own in results:
        times = (f"{own[key]:.1f}" for key in ("unchanged_ms", "pass_ms", "commit_ms"))
        table.add_row(own["layers"], str(own["batch"]), *times, f"{own['ratio']:.2f}x")
    console.print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="where to write the figures")
    main(parser.parse_args())
