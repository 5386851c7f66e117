"""Every kind of head, trained for the same number of steps for the same target on the same data: its tau on prompts
that it has not seen, and that of the same head untrained. The table that is printed is Markdown.

    python benchmarks/train_kinds.py --data ../shared/data/gsm8k_train.jsonl [--steps 150] [--kinds vanilla,gated]

The target is the embedded one. Tau is that of whole blocks, greedy, without the scheduler; a fresh head begins with
layers of its target. Seconds are of the processor, on one core.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from dspark_hf import DSparkHead, embedded_pair
from dspark_hf.training.check import tau_of
from dspark_hf.training.data import Row, collate, encode_chat
from dspark_hf.training.heads import fresh_head
from dspark_hf.training.step import share_frozen, training_step

LAYERS, RANK, BLOCK = 3, 64, 7
BATCH_SIZE, ANCHORS, LEARNING_RATE, CE_WEIGHT = 4, 24, 2e-3, 1.0
HELD_OUT, NEW_TOKENS = 8, 64
SLIDING = {"layer_types": ["sliding_attention"] * LAYERS, "sliding_window": 32}
NO_ANCHOR = {"sample_from_anchor": False, "block_size": BLOCK + 1}
KINDS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "no sequential head": {"markov_rank": 0},
    "DFlash: none, no anchor, no confidence": NO_ANCHOR | {"markov_rank": 0, "enable_confidence_head": False},
    "no anchor": NO_ANCHOR,
    "sliding, window 32": SLIDING,
    "sliding, counted from the block": SLIDING | {"window_counted_from": "block"},
    "draft vocabulary of 1024": {"draft_vocab_size": 1024},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="question and answer a line")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--kinds", help="names of some, with commas")
    args = parser.parse_args()
    target, _, tokenizer = embedded_pair(dtype=torch.float32)
    target.requires_grad_(False)
    lines = [json.loads(line) for line in args.data.read_text().splitlines()]
    chats = [[("user", line["question"]), ("assistant", line["answer"])] for line in lines]
    rows = [encode_chat([{"role": r, "content": c} for r, c in chat], tokenizer) for chat in chats[:2000]]
    trained_on, held_out = rows[HELD_OUT:], rows[:HELD_OUT]
    print(f"{args.steps} steps of {BATCH_SIZE} rows and {ANCHORS} anchors, {LAYERS} layers, {BLOCK} drafts a round\n")
    print(
        "| kind | parameters | tau untrained | tau trained | seconds |\n| --- | ---: | ---: | ---: | ---: |", flush=True
    )
    for name in KINDS if args.kinds is None else args.kinds.split(","):
        torch.manual_seed(0)
        keys = {"num_hidden_layers": LAYERS, "markov_rank": RANK, "block_size": BLOCK} | KINDS[name]
        head, _ = fresh_head(target, trained_on, mask_token_id=tokenizer.mask_token_id, **keys)
        learns = sum(p.numel() for p in head.parameters() if p is not getattr(head.lm_head, "weight", None))
        before, started = tau_of(head, target, held_out, NEW_TOKENS), time.process_time()
        train(head, target, trained_on, args.steps)
        seconds, after = time.process_time() - started, tau_of(head, target, held_out, NEW_TOKENS)
        print(f"| {name} | {learns:,} | {before:.2f} | {after:.2f} | {seconds:.0f} |", flush=True)


def train(head: DSparkHead, target, rows: list[Row], steps: int) -> None:
    embeddings, generator = share_frozen(head, target), torch.Generator().manual_seed(0)
    parameters = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    factor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randperm(len(rows), generator=generator).tolist()
    head.train()
    for number in range(steps):
        chosen = [rows[order[(number * BATCH_SIZE + i) % len(rows)]] for i in range(BATCH_SIZE)]
        losses = training_step(head, target, embeddings, collate(chosen), ANCHORS, generator, CE_WEIGHT)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        factor.step()


if __name__ == "__main__":
    main()
