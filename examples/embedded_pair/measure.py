"""Measure the text of a target: held-out perplexity, and the share of problems answered rightly.

    python examples/embedded_pair/measure.py --target dspark_hf/pair/target --gsm8k ../shared/data/gsm8k_test.jsonl

The tokens a round of the head are `dspark-hf eval`'s to measure. The problems of simple_problems.jsonl were written by
hand; those made by rules have a seed of their own. The target has trained on neither.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch
from corpus import code_documents, gsm8k_documents
from problems import problems
from tokenizer import ASSISTANT, as_chat
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dspark_hf.evaluation.prompts import encode

SEED = 10_000  # of the problems made here; training takes small ones
BATCH_SIZE, MAX_NEW_TOKENS, MAX_LENGTH = 32, 256, 1024


@torch.no_grad()
def perplexities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[dict[str, str]]
) -> tuple[float, float]:
    """Perplexity a token of whole chats, and of their answers alone."""
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    whole, answers = [], []
    for document in documents:
        ids = torch.tensor(tokenizer(as_chat(document))["input_ids"][:MAX_LENGTH])
        losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none").tolist()
        whole += losses
        answers += losses[ids.tolist().index(assistant) :]
    return tuple(math.exp(sum(losses) / len(losses)) for losses in (whole, answers))


@torch.no_grad()
def share_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[dict[str, str]]) -> float:
    """Share of the problems whose greedy answer ends with the number behind `####`."""
    right = 0
    for start in range(0, len(documents), BATCH_SIZE):
        some = documents[start : start + BATCH_SIZE]
        inputs = encode([document["prompt"] for document in some], tokenizer, model.device)
        sequences = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(result(text) == result(document["answer"]) for text, document in zip(texts, some, strict=True))
    return right / len(documents)


def result(answer: str) -> float | None:
    """The number behind the last `####`; `None` where there is none."""
    found = re.findall(r"#### *(-?\d[\d,]*(?:\.\d+)?)", answer)
    return float(found[-1].replace(",", "")) if found else None


def main(args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    gsm8k = gsm8k_documents(args.gsm8k)[: args.limit]
    simple = gsm8k_documents(Path(__file__).with_name("simple_problems.jsonl"))
    simple = [{"prompt": row["prompt"], "answer": f"#### {row['answer']}"} for row in simple]
    report = {}
    for name, documents in (("gsm8k", gsm8k), ("code", code_documents(held_out=True)[: args.limit])):
        whole, answers = perplexities(model, tokenizer, documents)
        report |= {f"perplexity of {name}": round(whole, 2), f"perplexity of {name}, answers": round(answers, 2)}
    sets = {"simple problems": simple, "made problems": problems(args.limit, SEED), "gsm8k": gsm8k}
    for name, documents in sets.items():
        report[f"{name}, right of {len(documents)}"] = round(share_right(model, tokenizer, documents), 3)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--gsm8k", required=True, help="GSM8K test split, .jsonl")
    parser.add_argument("--limit", type=int, default=200, help="documents of a kind")
    main(parser.parse_args())
