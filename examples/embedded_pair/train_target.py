"""Train the embedded target: a small Qwen3 on whole chats packed into rows of equal length.

python examples/embedded_pair/train_target.py --gsm8k ../shared/data/gsm8k_train.jsonl --output build/pair/target
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import code_documents, gsm8k_documents
from tokenizer import as_chat, train_tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 4096
ROW_LENGTH, ROWS_A_PASS, PASSES_A_STEP = 512, 8, 4
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY = 3e-3, 40, 0.1
CODE_SHARE = 0.15  # of the documents in a step; the rest is GSM8K
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


def packed_rows(math: DocumentStream, code: DocumentStream, rng: random.Random, pad: int) -> torch.Tensor:
    """[PASSES_A_STEP * ROWS_A_PASS, ROW_LENGTH] whole documents one after another, padded at the end of a row."""
    rows = torch.full((PASSES_A_STEP * ROWS_A_PASS, ROW_LENGTH), pad)
    ids = next(math)
    for row in rows:
        filled = 0
        while filled + len(ids) <= ROW_LENGTH:
            row[filled : filled + len(ids)] = torch.tensor(ids)
            filled += len(ids)
            ids = next(code if rng.random() < CODE_SHARE else math)
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


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def learning_rate(step: int, steps: int) -> float:
    return PEAK_LR * min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS))


@torch.no_grad()
def held_out_loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[dict[str, str]]
) -> float:
    """Nats per token on whole chats."""
    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor([tokenizer(as_chat(document))["input_ids"][:ROW_LENGTH]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    math_documents = gsm8k_documents(args.gsm8k)
    math_documents, math_held_out = math_documents[:-100], math_documents[-100:]
    code, code_held_out = code_documents(), code_documents(held_out=True)[:50]
    tokenizer = train_tokenizer(math_documents + code, VOCAB_SIZE)
    streams = DocumentStream(math_documents, tokenizer, rng), DocumentStream(code, tokenizer, rng)
    print(
        f"documents: {len(streams[0].tokens)} GSM8K ({sum(map(len, streams[0].tokens))} tokens), "
        f"{len(streams[1].tokens)} code ({sum(map(len, streams[1].tokens))} tokens)",
        flush=True,
    )

    model = Qwen3ForCausalLM(target_config(tokenizer))
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    backbone = torch.compile(model.model)
    optimizers = build_optimizers(model)
    started, running = time.time(), None
    for step in range(args.steps):
        rows = packed_rows(*streams, rng, tokenizer.pad_token_id)
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
                group["lr"] = learning_rate(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        running = loss if running is None else 0.95 * running + 0.05 * loss
        if step % 10 == 0 or step == args.steps - 1:
            print(
                f"step {step + 1}/{args.steps} loss {running:.3f} epochs {streams[0].epochs}/{streams[1].epochs} "
                f"minutes {(time.time() - started) / 60:.1f}",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step == args.steps - 1:
            save(model, tokenizer, args.output)
    model.eval()
    report = {
        "held_out_loss_gsm8k": held_out_loss(model, tokenizer, math_held_out),
        "held_out_loss_code": held_out_loss(model, tokenizer, code_held_out),
        "steps": args.steps,
        "tokens_a_step": PASSES_A_STEP * ROWS_A_PASS * ROW_LENGTH,
        "minutes": (time.time() - started) / 60,
    }
    print(json.dumps(report), flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    copy.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", required=True, help="GSM8K training split, a .jsonl file")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
