"""Training of a head."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .. import DSparkHead
from ..checkpoints.files import check_source
from .common import app, entries, say, target_option

# Processes wait so long for one that evaluates, or writes features or a checkpoint.
PATIENCE = timedelta(days=1)


@app.command()
def train(
    model: Annotated[str, target_option("It stays frozen.")],
    data: Annotated[str, typer.Option(help="A .jsonl or .parquet file, or a Hub data set.")],
    output: Annotated[Path, typer.Option(help="Folder for the head, its log and its checkpoints.")],
    head: Annotated[str | None, typer.Option(help="Go on from this head instead of a fresh one.")] = None,
    block_size: Annotated[int, typer.Option(min=1)] = 7,
    layers: Annotated[int, typer.Option(min=1, help="Draft layers.")] = 5,
    markov_rank: Annotated[int, typer.Option(min=0, help="0: no sequential head.")] = 256,
    markov_head: Annotated[str, typer.Option(help="vanilla, gated or rnn.")] = "vanilla",
    config: Annotated[
        str | None, typer.Option(help="Further keys of a fresh head's DSparkConfig, as JSON or a file of it.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step and process.")] = 16,
    learning_rate: float = 6e-4,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the backbone's matrices.")] = "adamw",
    ce_weight: Annotated[float, typer.Option(help="Weight of the cross entropy; more helps short runs.")] = 0.1,
    anchors: Annotated[int, typer.Option(min=1, help="Blocks a sequence.")] = 512,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 4096,
    pack: Annotated[bool, typer.Option("--pack", help="Put short rows together, up to --max-length tokens.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only see whether such a head learns 8 rows by heart.")
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    save_total_limit: Annotated[int, typer.Option(min=1, help="Checkpoints to keep, beside the best.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint in --output.")] = False,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations of tau.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Data for them. Default: rows of --data, held out.")] = None,
    eval_prompts: Annotated[int, typer.Option(min=1, help="Rows whose prompts are answered.")] = 32,
    eval_tokens: Annotated[int, typer.Option(min=1, help="New tokens of an answer.")] = 64,
    early_stopping_patience: Annotated[
        int | None, typer.Option(min=1, help="End after so many evaluations without a better tau.")
    ] = None,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1, help="Batches of a process a step.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for the draft layers, more time.")
    ] = False,
    cache_features: Annotated[
        Path | None, typer.Option(help="Folder for the target's states, computed once instead of in every epoch.")
    ] = None,
    cache_dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: the target's.")
    ] = None,
    report_to: Annotated[str, typer.Option(help="Trackers of accelerate: tensorboard,trackio,wandb, ..")] = "none",
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "bf16",
    seed: int = 0,
) -> None:
    """Train a head. Best on text that the target itself wrote (see docs/training.md)."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import disable_fsdp_ram_efficient_loading

    from ..training.check import check as checked
    from ..training.checkpointing import refuse_to_mix
    from ..training.data import load_rows
    from ..training.data_check import check_data
    from ..training.heads import fresh_head, head_from, read_keys
    from ..training.held_out import split
    from ..training.packing import check_packing
    from ..training.packing import pack as packed
    from ..training.reporting import check_trackers
    from ..training.trainer import TrainingArguments
    from ..training.trainer import train as run

    logging.disable_progress_bar()
    check_source(model)
    if not (resume or check):
        refuse_to_mix(output)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # What is wrong with the data is said before the models are loaded.
    keys = {} if config is None else read_keys(config)
    if head is not None and keys:
        raise ValueError("--config is for fresh heads; one that is given with --head brings its own.")
    rows, held_out = load_rows(data, tokenizer, max_length), None
    if eval_data is not None:
        held_out = load_rows(eval_data, tokenizer, max_length)[:eval_prompts]
    elif eval_every is not None:
        rows, held_out = split(rows, eval_prompts, seed)
    # It would leave the target of all processes but the first without weights: only the head is sharded.
    disable_fsdp_ram_efficient_loading()
    accelerator = Accelerator(
        # Without it several processes on a CPU do not find each other.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=check_trackers(entries("--report-to", report_to)) or None,
        project_dir=output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    tell = say if accelerator.is_main_process else lambda text: None
    target = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    torch.manual_seed(seed)
    if head is not None:
        draft_head, said = head_from(DSparkHead.from_pretrained(head, dtype=torch.float32), target, rows)
    else:
        own = {
            "block_size": block_size,
            "num_hidden_layers": layers,
            "markov_rank": markov_rank,
            "markov_head_type": markov_head,
            "mask_token_id": _mask_token(tokenizer, target.config.get_text_config(decoder=True).vocab_size),
            "dtype": torch.float32,
        }
        draft_head, said = fresh_head(target, rows, **own | keys)
    if said:
        tell(said)
    if check:
        found = checked(draft_head, target, rows, seed=seed)
        tell(str(found))
        raise typer.Exit(int(not found.passed))
    if accelerator.is_main_process:
        beside = check_data(target, rows, data, accelerator.device)
        if beside is not None and not beside.differs:
            say(f"perplexity of the data under the target: {beside.data:.2f}, of its own answers: {beside.own:.2f}")
    if pack:
        check_packing(target)
        rows = packed(rows, max_length)
    args = TrainingArguments(
        output=output,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        ce_weight=ce_weight,
        anchors_per_sequence=anchors,
        save_every=save_every,
        save_total_limit=save_total_limit,
        seed=seed,
        eval_every=eval_every,
        eval_tokens=eval_tokens,
        early_stopping_patience=early_stopping_patience,
        gradient_checkpointing=gradient_checkpointing,
        cache_features=cache_features,
        cache_dtype=cache_dtype,
    )
    tell(f"{len(rows)} sequences, {draft_head.num_parameters():,} parameters in the head")
    run(draft_head, target, rows, args, accelerator, resume, held_out)
    tell(f"head written to {output}")
    # The trackers have ended with the run.
    accelerator.state.destroy_process_group()


def _mask_token(tokenizer, vocab_size: int) -> int | None:
    """The tokenizer's mask token, or the first row of the target's embedding that no token uses."""
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    return len(tokenizer) if len(tokenizer) < vocab_size else None
