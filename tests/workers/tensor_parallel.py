"""One process of several that share a target by tensor parallelism; see test_tensor_parallel.py.

    torchrun --nproc-per-node 2 tests/workers/tensor_parallel.py TARGET SCHEDULE RESULTS

Writes RESULTS/RANK.json: for every case what `generate` wrote without and with a head, and the rounds that it took.
"""

import faulthandler
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported first: it gives each process a cache folder of its own.
from conftest import FixedCosts  # noqa: I001

import torch
import torch.distributed as dist
from test_targets import NEW_TOKENS, bigram_head, prompts
from transformers import AutoModelForCausalLM

from dspark_hf.generation import experience

# The process that is told step costs under which drafts pay. Where that is the second it is not asked, and the first
# learns its own.
KNOWS = {"load": 0, "load, learnt": 1}
# A process that waits for another for ever shows where, and ends.
SECONDS = 400


def main(folder: str, schedule: str, results: str) -> None:
    target = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    text = target.generate(**prompts(3), max_new_tokens=NEW_TOKENS, do_sample=False)
    # One as released heads are, with tables of its own, and one that drafts through the target's.
    borrows = schedule != "constant"
    head = bigram_head(target, text, borrow_embeddings=borrows, borrow_lm_head=borrows)
    head.generation_config.num_assistant_tokens_schedule = schedule.removesuffix(", learnt")
    rank = dist.get_rank()
    if rank == KNOWS.get(schedule):
        costs = FixedCosts(head.config.gamma)
        experience.costs_of = lambda *args: costs
    cases = [(rows, sample) for rows in (1, 3) for sample in (False, True)]
    outcomes = {f"{rows}, {sample}": outcome(target, head, rows, sample) for rows, sample in cases}
    Path(results, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


def outcome(target, head, rows: int, sample: bool) -> dict:
    inputs = prompts(rows) | {"max_new_tokens": NEW_TOKENS, "do_sample": sample}
    plain = target.generate(**inputs)
    torch.manual_seed(4)
    output = target.generate(**inputs, assistant_model=head, return_dict_in_generate=True)
    rounds = {"drafted": output.dspark.drafted_lengths, "verified": output.dspark.verified_lengths}
    return {"plain": plain.tolist(), "text": output.sequences.tolist()} | rounds


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        main(*sys.argv[1:])
    finally:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
