"""A plain training loop for draft heads."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel

from ..generation.compatibility import check_pair
from ..modeling_dspark import DSparkHead
from .data import collate
from .losses import CE_WEIGHT, Losses
from .step import check_trainable, training_step


@dataclass(frozen=True)
class TrainingArguments:
    """Hyper-parameters; the defaults are those of the released heads (paper, training) but for `batch_size`."""

    output: Path
    epochs: float = 10
    batch_size: int = 16
    learning_rate: float = 6e-4
    warmup_share: float = 0.04
    optimizer: str = "adamw"
    ce_weight: float = CE_WEIGHT
    anchors_per_sequence: int = 512
    save_every: int = 500
    seed: int = 0


class ShuffledByLength(Sampler[list[int]]):
    """Batches of a whole run: rows of similar length together, in a new random order every epoch.

    The order follows from the seed alone, so that a resumed run sees what an uninterrupted one would have seen.

    Args:
        lengths: tokens of every row. batches: batches of the run. start: batches to leave out at the front.
    """

    WINDOW = 50  # batches whose rows are sorted together

    def __init__(self, lengths: list[int], batch_size: int, seed: int, batches: int, start: int = 0):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.batches, self.start = batches, start

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        endless = (batch for epoch in count() for batch in self._epoch(epoch))
        yield from islice(endless, self.start, self.batches)

    def _epoch(self, epoch: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = self.WINDOW * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def train(
    head: DSparkHead,
    target: PreTrainedModel,
    rows: list[dict[str, list[int]]],
    args: TrainingArguments,
    accelerator: Accelerator | None = None,
    resume: bool = False,
) -> DSparkHead:
    """Train `head` for `target` and write it to `args.output`.

    Checkpoints (head, optimizer, schedule, random states) go to `args.output/checkpoint` every `args.save_every`
    steps; `resume` continues from there. `args.output/log.jsonl` gets a line every ten steps.

    Raises:
        ValueError: when head and target do not fit, when there is nothing to resume from or it was made with other
            settings, and for kinds of heads that are only decoded with.
    """
    check_pair(target, head)
    check_trainable(head, target)
    accelerator = accelerator or Accelerator()
    checkpoint, processes = Path(args.output, "checkpoint"), accelerator.num_processes
    steps = max(1, round(args.epochs * math.ceil(len(rows) / args.batch_size) / processes))
    settings = _settings(head, rows, args, accelerator)
    step = _checkpoint_step(checkpoint, steps, settings) if resume else 0
    set_seed(args.seed)
    target.requires_grad_(False).eval().to(accelerator.device)
    tables = head.share_tables(target)
    for name in ("embed_tokens", "lm_head"):  # copies that differ from the target's stay frozen too
        if getattr(head, name) is not None:
            getattr(head, name).requires_grad_(False)

    sampler = ShuffledByLength(
        [len(row["input_ids"]) for row in rows], args.batch_size, args.seed, steps * processes, step * processes
    )
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=collate)
    optimizers = _optimizers(head, args)
    factor = _warmup_then_cosine(steps, args.warmup_share)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    head, loader, *optimizers = accelerator.prepare(head.train(), loader, *optimizers)
    accelerator.register_for_checkpointing(*schedules)
    if resume:
        accelerator.load_state(str(checkpoint))
    if accelerator.is_main_process:
        Path(args.output).mkdir(parents=True, exist_ok=True)

    generator = torch.Generator()
    with _progress(disable=not accelerator.is_main_process) as progress:
        bar = progress.add_task("training", total=steps, completed=step, losses="")
        for batch in loader:
            # Anchors follow from the step, so that a resumed run draws the same.
            generator.manual_seed(args.seed + step * processes + accelerator.process_index)
            with accelerator.autocast():
                losses = training_step(
                    head, target, tables, batch, args.anchors_per_sequence, generator, args.ce_weight
                )
            accelerator.backward(losses.total)
            accelerator.clip_grad_norm_(head.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            step += 1
            if accelerator.is_main_process and (step % 10 == 0 or step == steps):
                progress.update(bar, completed=step, losses=_log(args.output, step, losses))
            if step % args.save_every == 0:
                _save_checkpoint(accelerator, checkpoint, step, settings)
    trained = accelerator.unwrap_model(head).eval()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trained.save_pretrained(args.output)
        described = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
        Path(args.output, "training.json").write_text(json.dumps(described | {"steps": steps}, indent=2) + "\n")
    return trained


def _optimizers(head: DSparkHead, args: TrainingArguments) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the backbone's matrices and AdamW for the rest."""
    parameters = [p for p in head.parameters() if p.requires_grad]
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)]
    if args.optimizer != "muon":
        raise ValueError(f"The optimizer must be adamw or muon, got {args.optimizer!r}.")
    matrices = [head.fc.weight, *(p for p in head.layers.parameters() if p.ndim == 2)]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def _warmup_then_cosine(steps: int, warmup_share: float):
    warmup = max(1, round(steps * warmup_share))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _settings(
    head: DSparkHead, rows: list[dict[str, list[int]]], args: TrainingArguments, accelerator: Accelerator
) -> dict[str, Any]:
    """What a run that goes on from a checkpoint must share with the one that made it. Not how long it is, so that a run
    can be made longer, nor where and how often it saves."""
    data = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    arguments = {key: value for key, value in asdict(args).items() if key not in ("output", "epochs", "save_every")}
    config = {key: value for key, value in head.config.own_keys().items() if key != "architectures"}
    run = {"mixed_precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
    # As JSON gives it back.
    return json.loads(json.dumps(config | arguments | run | {"data": f"{len(rows)} sequences, {data}"}))


def _save_checkpoint(accelerator: Accelerator, folder: Path, step: int, settings: dict[str, Any]) -> None:
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        Path(folder, "step.json").write_text(json.dumps({"step": step, "settings": settings}, indent=2) + "\n")


def _checkpoint_step(folder: Path, steps: int, settings: dict[str, Any]) -> int:
    """The step that the checkpoint in `folder` was made at, with the same settings."""
    marker = Path(folder, "step.json")
    if not marker.is_file():
        raise ValueError(
            f"There is no checkpoint to resume from in {str(folder)!r}. Leave out --resume to start afresh."
        )
    saved = json.loads(marker.read_text())
    # Checkpoints of earlier versions do not say how they were made.
    theirs = saved.get("settings", settings)
    differing = [
        f"{key} {theirs.get(key)}, now {settings.get(key)}"
        for key in sorted(theirs.keys() | settings.keys())
        if theirs.get(key) != settings.get(key)
    ]
    if differing:
        raise ValueError(
            f"The checkpoint in {str(folder)!r} was made with other settings: {'; '.join(differing)}. Resume with its "
            "settings, or leave out --resume and choose another --output."
        )
    if saved["step"] > steps:
        raise ValueError(
            f"The checkpoint in {str(folder)!r} is at step {saved['step']}, beyond the {steps} steps of this run. "
            "Raise --epochs."
        )
    return saved["step"]


def _log(output: Path, step: int, losses: Losses) -> str:
    values = {name: round(value.item(), 4) for name, value in vars(losses).items() if value is not None}
    with Path(output, "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": step} | values) + "\n")
    return " ".join(f"{name} {value:.3f}" for name, value in values.items())


def _progress(disable: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        disable=disable,
    )
