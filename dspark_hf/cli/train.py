"""Training of a head."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .. import DSparkConfig, DSparkHead
from ..checkpoints.files import check_source
from .common import app, say


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Target: a Hub id or a folder. It stays frozen.")],
    data: Annotated[str, typer.Option(help="A .jsonl or .parquet file, or a Hub data set.")],
    output: Annotated[Path, typer.Option(help="Folder for the head, its log and its checkpoints.")],
    head: Annotated[str | None, typer.Option(help="Go on from this head instead of a fresh one.")] = None,
    block_size: Annotated[int, typer.Option(min=1)] = 7,
    layers: Annotated[int, typer.Option(min=1, help="Draft layers.")] = 5,
    markov_rank: Annotated[int, typer.Option(min=0, help="0: no sequential head.")] = 256,
    markov_head: Annotated[str, typer.Option(help="vanilla, gated or rnn.")] = "vanilla",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step and process.")] = 16,
    learning_rate: float = 6e-4,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the backbone's matrices.")] = "adamw",
    ce_weight: Annotated[float, typer.Option(help="Weight of the cross entropy; more helps short runs.")] = 0.1,
    anchors: Annotated[int, typer.Option(min=1, help="Blocks a sequence.")] = 512,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 4096,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --output.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "bf16",
    seed: int = 0,
) -> None:
    """Train a head. Best on text that the target itself wrote (see examples/embedded_pair)."""
    from accelerate import Accelerator

    from ..training.data import load_rows
    from ..training.data_check import check_data
    from ..training.trainer import TrainingArguments
    from ..training.trainer import train as run
    from ..training.warm_start import warm_start

    logging.disable_progress_bar()
    check_source(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # What is wrong with the data is said before the models are loaded.
    rows = load_rows(data, tokenizer, max_length)
    target = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    torch.manual_seed(seed)
    if head is not None:
        draft_head = DSparkHead.from_pretrained(head, dtype=torch.float32)
    else:
        config = DSparkConfig.from_target(
            target.config,
            block_size=block_size,
            num_hidden_layers=layers,
            markov_rank=markov_rank,
            markov_head_type=markov_head,
            mask_token_id=_mask_token(tokenizer, target.config.get_text_config(decoder=True).vocab_size),
            dtype=torch.float32,
        )
        draft_head = DSparkHead(config)
        copied = warm_start(draft_head, target)
        if copied:
            say(f"draft layers start from the target's layers {copied}")
    args = TrainingArguments(
        output=output,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        ce_weight=ce_weight,
        anchors_per_sequence=anchors,
        save_every=save_every,
        seed=seed,
    )
    accelerator = Accelerator(mixed_precision=mixed_precision)
    if accelerator.is_main_process:
        check_data(target, rows, data, accelerator.device)
    say(f"{len(rows)} sequences, {draft_head.num_parameters():,} parameters in the head")
    run(draft_head, target, rows, args, accelerator, resume)
    say(f"head written to {output}")


def _mask_token(tokenizer, vocab_size: int) -> int | None:
    """The tokenizer's mask token, or the first row of the target's embedding that no token uses."""
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    return len(tokenizer) if len(tokenizer) < vocab_size else None
