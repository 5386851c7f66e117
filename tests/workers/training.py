"""What test_training_runs.py trains in other processes: a tiny head, on rows that its target wrote.

    torchrun --nproc-per-node 2 tests/workers/training.py OUTPUT

trains with two processes, by DDP and by FSDP2, into OUTPUT/ddp and OUTPUT/fsdp2; the latter from a checkpoint that is
there, if one is.
"""

import faulthandler
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported first: it gives each process a cache folder of its own.
from conftest import tiny_head, tiny_target  # noqa: I001

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from dspark_hf.training.checkpointing import saved_steps
from dspark_hf.training.trainer import TrainingArguments, train

VOCABULARY, PROMPT, ANSWER = 24, 6, 20
# A process that waits for another for ever shows where, and ends.
SECONDS = 200


def task(rows: int = 22):
    """A target, and rows that it wrote, of several lengths."""
    target = tiny_target(vocab_size=VOCABULARY, sharpness=4)
    torch.manual_seed(5)
    prompts = torch.randint(1, VOCABULARY - 1, (rows, PROMPT))
    texts = target.generate(input_ids=prompts, max_new_tokens=ANSWER, do_sample=False).tolist()
    mask = [0] * PROMPT + [1] * ANSWER
    return target, [
        {"input_ids": text[: -(i % 7) or None], "loss_mask": mask[: -(i % 7) or None]} for i, text in enumerate(texts)
    ]


def arguments(output, **kwargs) -> TrainingArguments:
    """Of 22 rows 8 a step, in three steps an epoch: the last of them takes 6."""
    fields = {
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "anchors_per_sequence": 6,
        "save_every": 3,
        "log_every": 1,
    }
    return TrainingArguments(output=Path(output), **fields | kwargs)


def run(output, resume: bool, epochs: int) -> None:
    """The run that is killed: one process, one thread."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    torch.set_num_threads(1)
    target, rows = task()
    head = tiny_head(target, num_hidden_layers=2)
    train(head, target, rows, arguments(output, epochs=epochs), resume=resume)


# What `accelerate launch --use_fsdp` sets.
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def main(output: str) -> None:
    for name, environment in {"ddp": {}, "fsdp2": SHARDED}.items():
        os.environ |= environment
        AcceleratorState._reset_state()
        folder = Path(output, name)
        target, rows = task()
        head = tiny_head(target, num_hidden_layers=2)
        resume = bool(saved_steps(folder))
        train(head, target, rows, arguments(folder, batch_size=4), Accelerator(cpu=True), resume)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        main(*sys.argv[1:])
    finally:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
