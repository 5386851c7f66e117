"""Train the embedded target: a small Qwen3 on whole chats packed into rows of equal length.

    python examples/embedded_pair/train_target.py --gsm8k ../shared/data/gsm8k_train.jsonl \
        --start dspark_hf/pair/target --output build/pair/target

Goes on from the target and tokenizer in --start; without it, both begin from nothing.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import code_documents, gsm8k_documents, worked_gsm8k_documents
from problems import problems
from tokenizer import as_chat, train_tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 4096
ROW_LENGTH, ROWS_A_PASS, PASSES_A_STEP = 512, 8, 2
WARMUP_STEPS, WEIGHT_DECAY = 40, 0.1
SHARES = {"gsm8k": 0.46, "worked gsm8k": 0.32, "code": 0.22}  # of the documents in a step that no rules made
PROBLEMS = 60_000
HELD_OUT = 100  # problems of GSM8K's training split, the last ones
IGNORED = -100


def target_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=14,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


class DocumentStream:
    """Endless shuffled documents of one domain as token lists, a new order every epoch."""

    def __init__(self, documents: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, rng: random.Random):
        texts = [as_chat(document) for document in documents]
        self.tokens = [ids for ids in tokenizer(texts)["input_ids"] if len(ids) <= ROW_LENGTH]
        self.rng, self.waiting, self.epochs = rng, [], 0

    def __next__(self) -> list[int]:
        if not self.waiting:
            self.waiting = self.rng.sample(self.tokens, len(self.tokens))
            self.epochs += 1
        return self.waiting.pop()


def packed_rows(
    streams: dict[str, DocumentStream], shares: dict[str, float], rng: random.Random, pad: int
) -> torch.Tensor:
    """[PASSES_A_STEP * ROWS_A_PASS, ROW_LENGTH] whole documents one after another, padded at the end of a row."""
    rows = torch.full((PASSES_A_STEP * ROWS_A_PASS, ROW_LENGTH), pad)
    names, weights = list(shares), list(shares.values())
    ids = next(streams[names[0]])
    for row in rows:
        filled = 0
        while filled + len(ids) <= ROW_LENGTH:
            row[filled : filled + len(ids)] = torch.tensor(ids)
            filled += len(ids)
            ids = next(streams[rng.choices(names, weights)[0]])
    return rows


def backward_of_cross_entropy(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, scale: float) -> float:
    """Backward through LM head and loss a slice at a time: the logits of a slice stay in the processor's cache."""
    detached = hidden.detach().requires_grad_()
    total = 0.0
    for h, y in zip(detached.split(1024), labels.split(1024), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = h @ head.T
        loss = F.cross_entropy(logits.float(), y, ignore_index=IGNORED, reduction="sum") * scale
        loss.backward()
        total += loss.item()
    hidden.backward(detached.grad)
    return total


def build_optimizers(model: Qwen3ForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = min(WARMUP_STEPS, steps // 10)
    return peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))


@torch.no_grad()
def losses_of(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: dict[str, list[dict[str, str]]]
) -> dict[str, float]:
    """Nats per token on whole chats of each kind."""
    losses = {}
    for name, documents in held_out.items():
        rows = [tokenizer(as_chat(document))["input_ids"][:ROW_LENGTH] for document in documents]
        total = sum(
            model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            for ids in map(torch.tensor, [[row] for row in rows])
        )
        losses[name] = total / sum(len(row) - 1 for row in rows)
    return losses


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    documents = {
        "gsm8k": gsm8k_documents(args.gsm8k),
        "worked gsm8k": worked_gsm8k_documents(args.gsm8k),
        "problems": problems(PROBLEMS, args.seed),
        "code": code_documents(),
    }
    held_out = {"gsm8k": documents["gsm8k"][-HELD_OUT:], "code": code_documents(held_out=True)[:50]}
    unseen = {document["prompt"] for document in held_out["gsm8k"]}
    documents = {name: [d for d in those if d["prompt"] not in unseen] for name, those in documents.items()}
    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start)
        model = Qwen3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(documents["gsm8k"] + documents["code"], VOCAB_SIZE)
        model = Qwen3ForCausalLM(target_config(tokenizer))
    streams = {name: DocumentStream(those, tokenizer, rng) for name, those in documents.items()}
    for name, stream in streams.items():
        print(f"{name}: {len(stream.tokens)} documents, {sum(map(len, stream.tokens))} tokens", flush=True)
    shares = {name: share * (1 - args.made) for name, share in SHARES.items()} | {"problems": args.made}
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    print(json.dumps({"step": 0} | losses_of(model, tokenizer, held_out)), flush=True)
    model.train()
    backbone = torch.compile(model.model)
    optimizers = build_optimizers(model, args.learning_rate)
    started, running = time.time(), None
    for step in range(args.steps):
        rows = packed_rows(streams, shares, rng, tokenizer.pad_token_id)
        labels = rows.roll(-1, 1)
        labels[:, -1] = tokenizer.pad_token_id
        labels = labels.masked_fill(labels == tokenizer.pad_token_id, IGNORED)
        scale = 1 / (labels != IGNORED).sum().item()
        loss = 0.0
        for x, y in zip(rows.split(ROWS_A_PASS), labels.split(ROWS_A_PASS), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = backbone(input_ids=x, use_cache=False).last_hidden_state
            loss += backward_of_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, y.flatten(), scale)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
        running = loss if running is None else 0.95 * running + 0.05 * loss
        if step % 10 == 0 or step == args.steps - 1:
            print(
                f"step {step + 1}/{args.steps} loss {running:.3f} "
                f"epochs {' '.join(str(stream.epochs) for stream in streams.values())} "
                f"minutes {(time.time() - started) / 60:.1f}",
                flush=True,
            )
        if (step + 1) % 150 == 0 or step == args.steps - 1:
            save(model, tokenizer, args.output)
            print(json.dumps({"step": step + 1} | losses_of(model, tokenizer, held_out)), flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    copy.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", required=True, help="GSM8K training split, a .jsonl file")
    parser.add_argument("--start", help="target to go on from; without it, one from noise with a new tokenizer")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--made", type=float, default=0.44, help="share of problems made by rules, of the documents")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
