"""Peak memory and time of one training step of a head for a target of a large vocabulary: forward, backward and AdamW,
in float32, on a CPU.

    python benchmarks/train_memory.py [--vocabulary 151936] [--anchors 512] [--block 7] [--width 256] [--whole]

What is printed is the most that the process ever held, Python and torch included. `--whole` makes all logits at once,
as a step without chunks would: of 3,584 rows by 151,936 tokens that need not fit.
"""

import argparse
import resource
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.training import step

LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"vocabulary": 151_936, "anchors": 512, "block": 7, "width": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    if args.whole:
        step.CHUNK = args.vocabulary * args.anchors * args.block
    target = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=args.vocabulary,
            hidden_size=args.width,
            intermediate_size=2 * args.width,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )
    target.requires_grad_(False).eval()
    head = DSparkHead(DSparkConfig.from_target(target.config, block_size=args.block, num_hidden_layers=2)).train()
    tables, generator = head.share_embeddings(target), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    ids = torch.randint(0, args.vocabulary, (1, LENGTH), generator=generator)
    batch = {"input_ids": ids, "loss_mask": torch.ones_like(ids)}
    # Small steps first: what the optimizer keeps is there when the whole one begins.
    for anchors in (1, args.anchors // 8, args.anchors):
        started = time.perf_counter()
        losses = step.training_step(head, target, tables, batch, anchors, generator)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kibibytes on Linux
        print(f"{anchors} anchors: {time.perf_counter() - started:.1f} s, peak {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
