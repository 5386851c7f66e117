"""Let the target answer the training prompts: a head learns best from text that its own target wrote.

    python examples/embedded_pair/regenerate.py --target build/pair/target --gsm8k ../shared/data/gsm8k_train.jsonl \
        --output build/pair/responses.jsonl

Rows hold token ids, not text: encoding a decoded response again need not give the same tokens.
Every third batch is sampled at temperature 0.7, the others are greedy. Finished batches are kept: an interrupted run
goes on where it stopped.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from corpus import code_documents, gsm8k_documents
from problems import problems
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark_hf.evaluation.prompts import encode

PROBLEMS_SEED = 20_000  # other problems than those that the target was trained on
BATCH_SIZE, MAX_NEW_TOKENS, SAMPLED_EVERY, TEMPERATURE = 128, 192, 3, 0.7


def batches_of(documents: list[dict[str, str]]) -> list[list[str]]:
    """Prompts in batches whose reference answers are of similar length, so that a batch ends together."""
    ordered = sorted(documents, key=lambda document: len(document["answer"]))
    prompts = [document["prompt"] for document in ordered]
    return [prompts[i : i + BATCH_SIZE] for i in range(0, len(prompts), BATCH_SIZE)]


@torch.no_grad()
def respond(model, tokenizer, prompts: list[str], sampled: bool) -> list[dict[str, list[int]]]:
    inputs = encode(prompts, tokenizer, model.device)
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0} if sampled else {"do_sample": False}
    sequences = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **sampling)
    width = inputs["input_ids"].shape[1]
    rows = []
    for ids, mask in zip(sequences.tolist(), inputs["attention_mask"].tolist(), strict=True):
        prompt = [token for token, kept in zip(ids[:width], mask, strict=True) if kept]
        answer = ids[width:]
        if tokenizer.eos_token_id in answer:
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
        rows.append({"input_ids": prompt + answer, "loss_mask": [0] * len(prompt) + [1] * len(answer)})
    return rows


def main(args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    code = random.Random(0).sample(code_documents(), args.code)
    gsm8k = random.Random(0).sample(gsm8k_documents(args.gsm8k), args.problems)
    made = problems(args.made_problems, PROBLEMS_SEED)
    batches = batches_of(gsm8k) + batches_of(made) + batches_of(code)
    random.Random(0).shuffle(batches)
    done = sum(1 for _ in args.output.open()) if args.output.exists() else 0
    with args.output.open("a") as output:
        written = 0
        for index, prompts in enumerate(track(batches, description="responding")):
            written += len(prompts)
            if written <= done:
                continue
            torch.manual_seed(index)
            rows = respond(model, tokenizer, prompts, sampled=index % SAMPLED_EVERY == SAMPLED_EVERY - 1)
            output.write("".join(json.dumps(row) + "\n" for row in rows))
            output.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--gsm8k", required=True, help="GSM8K training split, a .jsonl file")
    parser.add_argument("--problems", type=int, default=2560, help="how many problems of GSM8K")
    parser.add_argument("--made-problems", type=int, default=640, help="how many problems made by rules")
    parser.add_argument("--code", type=int, default=1408, help="how many code prompts")
    parser.add_argument("--output", type=Path, required=True)
    main(parser.parse_args())
