"""The training loop: steps in one process or many, with evaluations, checkpoints and a report."""

import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import parse_flag_from_env, send_to_device
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..generation.compatibility import check_pair
from ..modeling_dspark import DSparkHead
from ..shared_embeddings import SharedEmbeddings
from . import checkpointing
from .checkpointing import State, whole
from .data import Row
from .features import FeatureCache, open_cache
from .held_out import measure_tau
from .losses import CE_WEIGHT, Losses
from .optimizers import build_optimizers, checkpoint_layers, warmup_then_cosine
from .order import Samples, Share, ShuffledByLength, collate_samples
from .reporting import Report, curve, plot, read_log
from .step import check_trainable, share_frozen, training_step

MAX_GRADIENT_NORM = 1.0
# Names of a head's own tables begin so: they are copies of its target's, and are not trained.
FROZEN = ("embed_tokens.", "lm_head.")
# Arguments that a run may go on with other values of than its checkpoint was made with, as they change nothing that a
# step computes. The batch size counts as that of all processes.
FREE = (
    "output",
    "epochs",
    "batch_size",
    "log_every",
    "save_every",
    "save_total_limit",
    "eval_every",
    "eval_tokens",
    "early_stopping_patience",
    "gradient_checkpointing",
    "cache_features",
    "cache_dtype",
)


@dataclass(frozen=True)
class TrainingArguments:
    """Hyper-parameters; the defaults are those of the released heads (paper, training) but for `batch_size`.

    batch_size: rows of a process; a step takes that times processes times the batches that the accelerator accumulates.
    log_every, save_every: steps. save_total_limit: checkpoints to keep, beside that of the best evaluation; `None`: all
    eval_every: steps between evaluations on the held-out rows; none if `None`. eval_tokens: new tokens of an answer.
    early_stopping_patience: evaluations without a better tau after which a run ends; it does not if `None`.
    cache_features: a folder for the target's states, which then are not computed in every epoch; cache_dtype: theirs
    there, that of the target by default.
    """

    output: Path
    epochs: float = 10
    batch_size: int = 16
    learning_rate: float = 6e-4
    warmup_share: float = 0.04
    optimizer: str = "adamw"
    ce_weight: float = CE_WEIGHT
    anchors_per_sequence: int = 512
    log_every: int = 10
    save_every: int = 500
    seed: int = 0
    save_total_limit: int | None = 2
    eval_every: int | None = None
    eval_tokens: int = 64
    early_stopping_patience: int | None = None
    gradient_checkpointing: bool = False
    cache_features: Path | None = None
    cache_dtype: str | None = None


@dataclass(frozen=True)
class Run:
    """What a step needs. head, optimizers: as accelerate prepared them. plain: a copy of the head that is not wrapped,
    sharded or trained, to decode with; `None` where none is needed."""

    accelerator: Accelerator
    args: TrainingArguments
    head: torch.nn.Module
    plain: DSparkHead | None
    target: PreTrainedModel
    embeddings: SharedEmbeddings
    optimizers: list[Any]
    steps: int
    settings: dict[str, Any]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, perhaps in shards."""
        state = self.accelerator.unwrap_model(self.head, keep_torch_compile=False).state_dict()
        return {name: x for name, x in state.items() if not name.startswith(FROZEN)}

    @property
    def raw_optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer.optimizer for optimizer in self.optimizers]


def train(
    head: DSparkHead,
    target: PreTrainedModel,
    rows: list[Row],
    args: TrainingArguments,
    accelerator: Accelerator | None = None,
    resume: bool = False,
    held_out: list[Row] | None = None,
) -> DSparkHead:
    """Train `head` for `target`, write it to `args.output` and return it: as it was at the best evaluation on the
    held-out rows, or in the end where there was none.

    How many processes there are, whether they shard the head, how many batches are accumulated, the precision and the
    trackers are the accelerator's. Checkpoints go to `args.output/checkpoint-STEP`; `resume` continues from the latest.
    `args.output/log.jsonl` gets a line every `args.log_every` steps and at every evaluation.

    Raises:
        ValueError: when head and target do not fit; when there is nothing to resume from, or it was made with other
            settings; when a fresh run finds checkpoints; for kinds of heads that are only decoded with.
    """
    check_pair(target, head)
    check_trainable(head, target)
    accelerator = accelerator or Accelerator()
    _shard_on_cpu(accelerator)
    _check(args, held_out, accelerator)
    global_batch = args.batch_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
    steps = max(1, round(args.epochs * math.ceil(len(rows) / global_batch)))
    settings = _settings(head, target, rows, args, accelerator, global_batch)
    if resume:
        state = checkpointing.load_state(args.output, steps, settings)
    else:
        state = State()
        checkpointing.refuse_to_mix(args.output)
    accelerator.wait_for_everyone()  # All have seen what there was, before anyone writes.

    target.requires_grad_(False).eval().to(accelerator.device)
    features = _features(head, target, rows, args, accelerator)
    embeddings = share_frozen(head, target)
    if resume:
        _load(head, checkpointing.load_weights(args.output, state.step))
    run = _prepare(head, target, embeddings, args, accelerator, steps, settings)
    if resume:
        checkpointing.load_optimizers(args.output, state.step, run.raw_optimizers, accelerator.scaler)
    lengths = [len(row["input_ids"]) for row in rows]
    order = ShuffledByLength(lengths, global_batch, args.seed, steps, start=state.step)
    batches = iter(_loader(rows, features, order, args.seed, accelerator))
    shown = settings | {"steps": steps, "rows": len(rows), "processes": accelerator.num_processes}
    with Report(accelerator, args.output, steps, state.step, shown) as report:
        for numbers in order:
            if _is_over(state, args):
                break
            losses = _update(run, list(islice(batches, accelerator.gradient_accumulation_steps)), state.step)
            state.step += 1
            report.count(sum(lengths[number] for number in numbers))
            _observe(run, state, losses, held_out or [], report)
    accelerator.wait_for_everyone()
    return _finish(run, state)


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """Let processes on a CPU shard that were launched for it: accelerate would replicate, and not say so."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP


def _check(args: TrainingArguments, held_out: list[Row] | None, accelerator: Accelerator) -> None:
    """Raise for arguments that contradict each other, and for what cannot be trained in."""
    if (args.eval_every is None) == bool(held_out):
        raise ValueError(
            "Held-out rows and `eval_every` go together: the one says on what is evaluated, the other when."
        )
    if args.early_stopping_patience is not None and args.eval_every is None:
        raise ValueError("A run ends early by tau on held-out rows: early stopping needs `eval_every` (--eval-every).")
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ValueError(
            f"Heads are trained in one process, with DDP or with FSDP2; accelerate was configured for {kind.value}. "
            "Launch with --multi_gpu, or with --use_fsdp --fsdp_version 2."
        )
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "With `cpu_ram_efficient_loading` of FSDP, transformers loads no weights of the target in all processes "
            "but one: call accelerate's `disable_fsdp_ram_efficient_loading` before anything else."
        )


def _settings(
    head: DSparkHead,
    target: PreTrainedModel,
    rows: list[Row],
    args: TrainingArguments,
    accelerator: Accelerator,
    global_batch: int,
) -> dict[str, Any]:
    """What a run that goes on from a checkpoint must share with the one that made it."""
    data = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    arguments = {key: value for key, value in asdict(args).items() if key not in FREE}
    config = {key: value for key, value in head.config.own_keys().items() if key != "architectures"}
    states = args.cache_dtype if args.cache_features and args.cache_dtype else str(target.dtype).removeprefix("torch.")
    run = {"mixed_precision": accelerator.mixed_precision, "global batch_size": global_batch, "target states": states}
    # As JSON gives it back.
    return json.loads(json.dumps(config | arguments | run | {"data": f"{len(rows)} sequences, {data}"}))


def _features(
    head: DSparkHead, target: PreTrainedModel, rows: list[Row], args: TrainingArguments, accelerator: Accelerator
) -> FeatureCache | None:
    if args.cache_features is None:
        return None
    layers = head.config.target_layer_ids
    return open_cache(args.cache_features, target, rows, layers, accelerator, args.batch_size, args.cache_dtype)


def _loader(
    rows: list[Row], features: FeatureCache | None, order: ShuffledByLength, seed: int, accelerator: Accelerator
) -> DataLoader:
    """Batches of this process."""
    share = Share(order, accelerator.process_index, accelerator.num_processes, accelerator.gradient_accumulation_steps)
    # What is on disk is read ahead.
    workers = 0 if features is None else 1
    return DataLoader(
        Samples(rows, seed, features), batch_sampler=share, collate_fn=collate_samples, num_workers=workers
    )


def _load(head: DSparkHead, weights: dict[str, torch.Tensor]) -> None:
    """Put what was trained into a head, which keeps its tables."""
    head.load_state_dict({name: x for name, x in head.state_dict().items() if name.startswith(FROZEN)} | weights)


def _prepare(
    head: DSparkHead,
    target: PreTrainedModel,
    embeddings: SharedEmbeddings,
    args: TrainingArguments,
    accelerator: Accelerator,
    steps: int,
    settings: dict[str, Any],
) -> Run:
    """Head and optimizers, wrapped as the accelerator says."""
    needs_copy = args.eval_every is not None or accelerator.is_fsdp2
    plain = _copy_of(head) if needs_copy else None
    if args.gradient_checkpointing:
        checkpoint_layers(head)
    if accelerator.is_fsdp2:
        # `embeddings` are used outside of the head, where shards of them are of no use.
        head.embed_tokens = head.lm_head = None
        # Autocast decides, as with DDP. Accelerate's policy would give the losses back in half precision.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    optimizers = build_optimizers(head, args.optimizer, args.learning_rate)
    wrapped, *optimizers = accelerator.prepare(head.train(), *optimizers)
    return Run(accelerator, args, wrapped, plain, target, embeddings, optimizers, steps, settings)


def _copy_of(head: DSparkHead) -> DSparkHead:
    """A copy that shares what is not trained."""
    frozen = [*head._shared_weights.values(), *(p for p in head.parameters() if not p.requires_grad)]
    return copy.deepcopy(head, {id(weight): weight for weight in frozen}).requires_grad_(False).eval()


def _is_over(state: State, args: TrainingArguments) -> bool:
    """Whether a run ends before its last step."""
    return args.early_stopping_patience is not None and state.waited >= args.early_stopping_patience


def _update(run: Run, batches: list[dict[str, Any]], done: int) -> dict[str, torch.Tensor]:
    """Take one step; the losses over its global batch, as they were before.

    Losses are weighted means, so batches are put together by their weights: gradients are summed over all batches and
    processes, then divided by the weight of all.
    """
    accelerator, args = run.accelerator, run.args
    rate = args.learning_rate * warmup_then_cosine(done, run.steps, args.warmup_share)
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = rate
    # Of the order of a batch's weight, and known before it: what is summed keeps the size of a mean.
    expected = args.batch_size * args.anchors_per_sequence
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        draws, states = batch.pop("draws"), batch.pop("states", None)
        with accelerator.accumulate(run.head):
            with accelerator.autocast():
                losses = training_step(
                    run.head,
                    run.target,
                    run.embeddings,
                    batch,
                    args.anchors_per_sequence,
                    draws,
                    args.ce_weight,
                    states,
                )
            accelerator.backward(losses.total * (losses.weight / expected))
            for name, value in _weighted(losses).items():
                sums[name] = sums.get(name, 0) + value
            if accelerator.sync_gradients:
                sums = dict(zip(sums, accelerator.reduce(torch.stack(list(sums.values())), "sum"), strict=True))
                weight = sums.pop("weight").clamp(min=1e-6)
                # DDP and FSDP take means over processes, accelerate over accumulated batches.
                _scale_gradients(run.head, len(batches) * accelerator.num_processes * expected / weight)
                accelerator.clip_grad_norm_(run.head.parameters(), MAX_GRADIENT_NORM)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return {name: value / weight for name, value in sums.items()} | {"learning_rate": torch.tensor(rate)}


def _weighted(losses: Losses) -> dict[str, torch.Tensor]:
    """The losses times their weight, and the weight."""
    weight = losses.weight.detach().double()
    found = {name: value.detach() * weight for name, value in vars(losses).items() if value is not None}
    return found | {"weight": weight}


def _scale_gradients(head: torch.nn.Module, factor: torch.Tensor) -> None:
    for parameter in head.parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient).mul_(factor)


def _observe(run: Run, state: State, losses: dict[str, torch.Tensor], held_out: list[Row], report: Report) -> None:
    """What comes behind a step where it is due: an evaluation, a line of the log, a checkpoint."""
    args, is_last, is_best = run.args, state.step == run.steps, False
    evaluates = args.eval_every is not None and (state.step % args.eval_every == 0 or is_last)
    values = {}
    if evaluates:
        _load(run.plain, whole(run.weights))
        values["tau"] = measure_tau(run.target, run.plain, held_out, args.eval_tokens, run.accelerator)
        is_best = state.note(values["tau"])
    if evaluates or is_last or state.step % args.log_every == 0:
        report.write(state.step, {name: value.item() for name, value in losses.items()} | values)
    saves = is_last or is_best or _is_over(state, args) or state.step % args.save_every == 0
    if saves:
        _save(run, state)
    if evaluates or saves:
        report.restart_clock()


def _save(run: Run, state: State) -> None:
    is_main = run.accelerator.is_main_process
    weights = whole(run.weights, keep=is_main)
    optimizers = whole(checkpointing.optimizer_states(run.raw_optimizers, run.accelerator.scaler), keep=is_main)
    if is_main:
        checkpointing.save(run.args.output, state, run.settings, weights, optimizers, run.args.save_total_limit)


def _finish(run: Run, state: State) -> DSparkHead:
    """Write the head of the best evaluation, or of the last step, and what is to be known of it."""
    accelerator, args = run.accelerator, run.args
    chosen = state.step if state.best_step is None else state.best_step
    trained = run.plain
    if not accelerator.is_fsdp2:
        trained = accelerator.unwrap_model(run.head, keep_fp32_wrapper=False, keep_torch_compile=False)
        if args.gradient_checkpointing:
            checkpoint_layers(trained, enable=False)
    _load(trained, checkpointing.load_weights(args.output, chosen))
    if accelerator.is_main_process:
        trained.eval().save_pretrained(args.output)
        described = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
        described |= {"steps": state.step, "written": chosen, "tau": state.tau, "curve": curve(read_log(args.output))}
        Path(args.output, "training.json").write_text(json.dumps(described, indent=2) + "\n")
        plot(args.output)
    accelerator.wait_for_everyone()
    return trained.eval()
