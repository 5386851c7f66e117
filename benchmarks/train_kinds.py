"""Every kind of head, trained for the same steps for the same target on the same batches: its tau on prompts that it
has not seen, and that of the same head untrained. The table that is printed is Markdown.

    dspark-hf regenerate --model dspark_hf/pair/target --data ../shared/data/gsm8k_train.jsonl --limit 1200 \
        --temperature 0 --max-new-tokens 128 --batch-size 32 --output answers.jsonl
    python benchmarks/train_kinds.py --data answers.jsonl --prompts ../shared/data/gsm8k_test.jsonl [--kinds rnn gated]

The target is the embedded one. Tau is that of whole blocks, greedy, without the scheduler; a fresh head begins with
layers of its target. The heads learn side by side, so that the target reads each batch once; the seconds of a head are
those of the processor that it would take alone, on one core, with the target's.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dspark_hf import DSparkHead, embedded_pair
from dspark_hf.training.check import PROMPT, tau_of
from dspark_hf.training.data import Row, collate, encode_chat, load_rows, prompt_of, read_data
from dspark_hf.training.heads import fresh_head, head_from
from dspark_hf.training.optimizers import build_optimizers, warmup_then_cosine
from dspark_hf.training.step import States, share_frozen, target_states, training_step

LAYERS, RANK, BLOCK = 3, 64, 7
BATCH_SIZE, ANCHORS, CE_WEIGHT = 4, 24, 1.0
# That of the recipe of the embedded head, with Muon; a head that knows its target already goes on with less.
LEARNING_RATE, GENTLE, WARMUP = 3e-3, 3e-4, 0.04
PROMPTS, NEW_TOKENS = 16, 64
SLIDING = {"layer_types": ["sliding_attention"] * LAYERS, "sliding_window": 32}
MIXED = {"layer_types": ["sliding_attention"] * (LAYERS - 1) + ["full_attention"], "sliding_window": 32}
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
    "sliding, both ways": SLIDING | {"sliding_is_causal": False},
    "two layers sliding, one full": MIXED,
    "draft vocabulary of 1024": {"draft_vocab_size": 1024},
}
GOES_ON, OTHER_TARGET, ADDED = "embedded head, goes on", "embedded head, for a target with 128 tokens more", 128


@dataclass
class Learner:
    """A head that learns for a target; `seconds` of the processor went into its steps."""

    head: DSparkHead
    target: PreTrainedModel
    learning_rate: float
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.embeddings = share_frozen(self.head, self.target)
        self.optimizers = build_optimizers(self.head, "muon", self.learning_rate)
        self.generator = torch.Generator().manual_seed(0)

    @property
    def learns(self) -> int:
        return sum(p.numel() for p in self.head.parameters() if p.requires_grad)

    def step(self, batch: dict[str, torch.Tensor], states: States, factor: float) -> float:
        started = time.process_time()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.learning_rate * factor
        self.head.train()
        losses = training_step(
            self.head, self.target, self.embeddings, batch, ANCHORS, self.generator, CE_WEIGHT, states
        )
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.seconds += time.process_time() - started
        return losses.ce.item()


def begin(name: str, rows: list[Row]) -> Learner:
    torch.manual_seed(0)
    target, own, tokenizer = embedded_pair(dtype=torch.float32)
    if name == GOES_ON:
        head, _ = head_from(own, target, rows)
        return Learner(head, target.requires_grad_(False), GENTLE)
    if name == OTHER_TARGET:
        # It writes the same text, but no table of the head fits: rows of the new tokens are the mean of the others.
        target.resize_token_embeddings(target.config.vocab_size + ADDED)
        head, _ = head_from(own, target, rows)
        return Learner(head, target.requires_grad_(False), LEARNING_RATE)
    keys = {"num_hidden_layers": LAYERS, "markov_rank": RANK, "block_size": BLOCK} | KINDS[name]
    head, _ = fresh_head(target, rows, mask_token_id=tokenizer.mask_token_id, **keys)
    return Learner(head, target.requires_grad_(False), LEARNING_RATE)


def train(learners: dict[str, Learner], target: PreTrainedModel, rows: list[Row], steps: int) -> float:
    """Seconds of the target's passes, which all heads shared."""
    layers = next(iter(learners.values())).head.config.target_layer_ids
    if any(learner.head.config.target_layer_ids != layers for learner in learners.values()):
        raise ValueError("Heads that read different layers of their target cannot share its passes.")
    generator, order, seconds = torch.Generator().manual_seed(0), [], 0.0
    for number in range(steps):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(rows), generator=generator).tolist()
        batch = collate([rows[order.pop()] for _ in range(BATCH_SIZE)])
        started = time.process_time()
        states = target_states(target, batch["input_ids"], layers)
        seconds += time.process_time() - started
        factor = warmup_then_cosine(number, steps, WARMUP)
        ce = {name: learner.step(batch, states, factor) for name, learner in learners.items()}
        if number % 25 == 24:
            said = ", ".join(f"{name} {value:.2f}" for name, value in ce.items())
            print(f"step {number + 1}: cross entropy {said}", file=sys.stderr, flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="answers of the embedded target, by `dspark-hf regenerate`")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `question` and `answer`")
    parser.add_argument("--steps", type=int, default=300)
    names = [*KINDS, OTHER_TARGET, GOES_ON]
    parser.add_argument("--kinds", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    target, _, tokenizer = embedded_pair(dtype=torch.float32)
    rows = load_rows(args.data, tokenizer, 512)
    chats = [[("user", x["question"]), ("assistant", x["answer"])] for x in read_data(str(args.prompts))[0]]
    unseen = [encode_chat([{"role": r, "content": c} for r, c in chat], tokenizer) for chat in chats]
    prompts = [row for row in unseen if len(prompt_of(row)) <= PROMPT][:PROMPTS]
    learners = {name: begin(name, rows) for name in args.kinds}

    def taus() -> list[float]:
        return [tau_of(learner.head, learner.target, prompts, NEW_TOKENS) for learner in learners.values()]

    before = taus()
    print(f"tau before {dict(zip(learners, before, strict=True))}", file=sys.stderr, flush=True)
    of_target = train(learners, target, rows, args.steps)
    print(f"{args.steps} steps of {BATCH_SIZE} rows and {ANCHORS} anchors, {LAYERS} layers, {BLOCK} drafts a round\n")
    print("| kind | parameters | tau untrained | tau trained | seconds |\n| --- | ---: | ---: | ---: | ---: |")
    for (name, learner), first, last in zip(learners.items(), before, taus(), strict=True):
        print(f"| {name} | {learner.learns:,} | {first:.2f} | {last:.2f} | {learner.seconds + of_target:.0f} |")


if __name__ == "__main__":
    main()
