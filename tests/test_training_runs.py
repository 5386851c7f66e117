"""Runs of the training loop: several processes, accumulation, kills, evaluations, cached features."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import TorchDynamoPlugin
from conftest import tiny_head, tiny_target
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from workers import training as worker

from dspark_hf import DSparkHead
from dspark_hf.generation import observers
from dspark_hf.hub import publishing
from dspark_hf.training import checkpointing, features, trainer
from dspark_hf.training.checkpointing import saved_steps
from dspark_hf.training.data import prompt_of
from dspark_hf.training.held_out import split
from dspark_hf.training.order import Samples, Share, ShuffledByLength, collate_samples
from dspark_hf.training.reporting import check_trackers, curve, read_log
from dspark_hf.training.step import target_states
from dspark_hf.training.trainer import train

STEPS = 12
DOCUMENT = Path(__file__).parents[1] / "docs" / "training.md"


@pytest.fixture(scope="module")
def task():
    return worker.task()


@pytest.fixture
def head(task):
    return tiny_head(task[0], num_hidden_layers=2)


@pytest.fixture(scope="module")
def straight(task, tmp_path_factory) -> Path:
    """The folder of a run in one process that nothing interrupts; all its checkpoints are there."""
    folder, (target, rows) = tmp_path_factory.mktemp("straight"), task
    train(tiny_head(target, num_hidden_layers=2), target, rows, worker.arguments(folder, save_total_limit=None))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder: Path) -> list[list[float]]:
    return [[line[name] for name in ("step", "ce", "l1", "confidence", "total")] for line in read_log(folder)]


def assert_same_losses(folder: Path, reference: Path) -> None:
    """Of all steps that were taken there, to 1e-5."""
    own, theirs = (torch.tensor(losses(path), dtype=torch.float64) for path in (folder, reference))
    assert len(own)
    torch.testing.assert_close(own, theirs[-len(own) :], rtol=1e-5, atol=2e-6)


def assert_close_weights(folder: Path, reference: Path) -> None:
    own, theirs = weights(folder), weights(reference)
    for name in own | theirs:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def begin_at(step: int, folder: Path, source: Path) -> None:
    """Put a checkpoint of another run into a folder."""
    shutil.copytree(checkpointing.folder_of(source, step), checkpointing.folder_of(folder, step))


# -- Order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "accumulated"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_processes_share_a_global_batch_and_its_draws(processes, accumulated, task):
    """Also the last one of an epoch, which has fewer rows than there are batches."""
    _, rows = task
    rows = rows[:17]
    batches = ShuffledByLength([len(row["input_ids"]) for row in rows], 8, seed=3, batches=6, start=1)
    shares = [list(Share(batches, process, processes, accumulated)) for process in range(processes)]
    samples, drawn = Samples(rows, seed=3), {}
    for step, numbers in enumerate(batches):
        of_step = [batch for share in shares for batch in share[step * accumulated : (step + 1) * accumulated]]
        real = [sample for batch in of_step for sample in batch if sample.number is not None]
        assert sorted(sample.row for sample in real) == sorted(numbers) and all(of_step)
        drawn |= {sample.number: samples[sample]["draws"] for sample in real}
        for batch in of_step:
            if batch[0].number is None:
                assert not collate_samples([samples[sample] for sample in batch])["loss_mask"].any()
    whole = [sample for batch in Share(batches) for sample in batch]
    assert {sample.number for sample in whole} == set(drawn)
    assert all(torch.equal(samples[sample]["draws"], drawn[sample.number]) for sample in whole)
    assert len({tuple(draws.tolist()) for draws in drawn.values()}) == len(drawn)


# -- Many batches a step -----------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one(straight, task, head, tmp_path):
    """In the last step of an epoch two of the eight have no row."""
    target, rows = task
    accelerator = Accelerator(gradient_accumulation_steps=8)
    train(head, target, rows, worker.arguments(tmp_path, batch_size=1), accelerator)
    assert_same_losses(tmp_path, straight)
    assert_close_weights(tmp_path, straight)


@pytest.fixture(scope="module")
def in_two(straight, tmp_path_factory) -> Path:
    """The runs of two processes: DDP from the start, FSDP2 from a checkpoint of the run in one."""
    folder = tmp_path_factory.mktemp("two")
    begin_at(6, folder / "fsdp2", straight)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, worker.__file__, folder], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(kind, in_two, straight):
    assert_same_losses(in_two / kind, straight)
    assert_close_weights(in_two / kind, straight)
    assert len(losses(in_two / kind)) == {"ddp": STEPS, "fsdp2": STEPS - 6}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_process_goes_on_where_two_were(kind, in_two, straight, task, head, tmp_path):
    target, rows = task
    begin_at(9, tmp_path, in_two / kind)
    train(head, target, rows, worker.arguments(tmp_path), resume=True)
    assert_same_losses(tmp_path, straight)
    assert_close_weights(tmp_path, straight)


# In docs/training.md, up to the module: DDP and FSDP2.
LAUNCHES = re.findall(r"accelerate launch (--(?:multi_gpu|use_fsdp)[^\\]*) ", DOCUMENT.read_text())


@pytest.mark.slow
def test_the_commands_of_the_document(task, tmp_path):
    """Without a GPU they use the CPU: losses and tau of two processes are those of one. For FSDP the launcher makes
    transformers load weights in one process only."""
    target, rows = task
    target.save_pretrained(tmp_path / "target")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(worker.VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "target")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"--model": tmp_path / "target", "--data": data, "--layers": 1, "--markov-rank": 8, "--anchors": 6}
    options |= {"--epochs": 4, "--eval-every": 4, "--eval-prompts": 4, "--mixed-precision": "no", "--save-every": 4}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", 0]
    of_two = [flags.partition(" -m ")[0].replace("--num_processes 8", "--num_processes 2") for flags in LAUNCHES]
    for name, flags in zip(("one", "ddp", "fsdp2"), ["--cpu --num_processes 1", *of_two], strict=True):
        own = options | {"--output": tmp_path / name, "--batch-size": 8 if name == "one" else 4}
        own |= {"--cache-features": tmp_path / "cache"} if name == "ddp" else {}
        command = [*launch, *flags.split(), "-m", "dspark_hf.cli", "train", *chain(*own.items())]
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-6000:]
        assert done.stdout.count("head written to") == 1
    taus = [[line["tau"] for line in read_log(tmp_path / name) if "tau" in line] for name in ("one", "ddp", "fsdp2")]
    assert len(taus[0]) == 3 and taus[0] == taus[1] == taus[2]
    for name in ("ddp", "fsdp2"):
        assert_same_losses(tmp_path / name, tmp_path / "one")


@pytest.mark.slow
def test_layers_that_accelerate_compiles(straight, task, head, tmp_path):
    target, rows = task
    plugin = TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=True, dynamic=True)
    AcceleratorState._reset_state()
    trained = train(head, target, rows, worker.arguments(tmp_path), Accelerator(dynamo_plugin=plugin))
    AcceleratorState._reset_state()
    assert_same_losses(tmp_path, straight)
    assert_close_weights(tmp_path, straight)
    assert type(trained.layers[0]).__name__ == "DraftLayer"


def test_another_global_batch_is_refused_by_name(straight, task, head, tmp_path):
    target, rows = task
    begin_at(9, tmp_path, straight)
    with pytest.raises(ValueError, match="global batch_size 8, now 16.*--batch-size x processes x"):
        train(head, target, rows, worker.arguments(tmp_path), Accelerator(gradient_accumulation_steps=2), resume=True)


def test_gradient_checkpointing_changes_memory_only(straight, task, head, tmp_path, monkeypatch):
    from torch.utils import checkpoint

    target, rows = task
    recomputed, real = [], checkpoint._checkpoint_without_reentrant_generator
    monkeypatch.setattr(
        checkpoint, "_checkpoint_without_reentrant_generator", lambda *a, **k: recomputed.append(1) or real(*a, **k)
    )
    trained = train(head, target, rows, worker.arguments(tmp_path, gradient_checkpointing=True))
    assert len(recomputed) == 2 * STEPS and same_bits(tmp_path, straight)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trained.modules())


# -- Kills -------------------------------------------------------------------------------------------------------------

# Of runs that are killed: 60 steps, with a checkpoint at every third.
EPOCHS, LAST_KILL = 20, 48


@pytest.fixture
def start(monkeypatch):
    """Starts a run in a process of its own, forked from one that has imported everything."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workers.training"])

    def start(output: Path) -> multiprocessing.Process:
        child = context.Process(target=worker.run, args=(output, bool(saved_steps(output)), EPOCHS))
        child.start()
        return child

    return start


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 5])
def test_a_killed_run_ends_with_the_head_of_one_that_was_not(kills, start, tmp_path):
    """SIGKILL at a random time after each of some random checkpoints."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for step in sorted(random.sample(range(3, LAST_KILL, 3), kills)):
        child = start(killed)
        while child.is_alive() and max(saved_steps(killed), default=0) < step:
            time.sleep(0.001)
        time.sleep(random.random() * 0.03)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    for folder in (straight, killed):
        child = start(folder)
        child.join()
        assert child.exitcode == 0
    assert same_bits(straight, killed)
    assert losses(straight) == losses(killed)


def test_a_checkpoint_is_whole_or_not_there(straight, task, head, tmp_path, monkeypatch):
    """The second one fails when its optimizer is written; the run goes on from the first, to the same bits."""
    target, rows = task
    real, calls = torch.save, []

    def save(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train(head, target, rows, worker.arguments(tmp_path))
    assert saved_steps(tmp_path) == [3]
    other = tiny_head(target, seed=9, num_hidden_layers=2)
    train(other, target, rows, worker.arguments(tmp_path), resume=True)
    assert same_bits(tmp_path, straight) and losses(tmp_path) == losses(straight)
    assert saved_steps(tmp_path) == [9, 12] and not (tmp_path / checkpointing.TEMPORARY).exists()


def test_a_damaged_checkpoint_is_named(straight, task, head, tmp_path):
    target, rows = task
    begin_at(9, tmp_path, straight)
    folder = tmp_path / "checkpoint-9"
    for name in ("optimizer.pt", "model.safetensors"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
        with pytest.raises(ValueError, match=f"{name}' cannot be read.*Delete .*checkpoint-9"):
            train(head, target, rows, worker.arguments(tmp_path), resume=True)


def test_a_fresh_run_is_not_mixed_with_another(straight, task, head):
    target, rows = task
    with pytest.raises(ValueError, match="holds a run that is at step 12: --resume continues it"):
        train(head, target, rows, worker.arguments(straight))


# -- Evaluations -------------------------------------------------------------------------------------------------------


class Tracker(GeneralTracker):
    """Keeps what it is given."""

    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__()
        self.config, self.lines, self.is_finished = None, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.lines.append({"step": step} | values)

    def finish(self):
        self.is_finished = True


def test_the_head_of_the_best_evaluation_is_written_and_a_run_ends_early(task, head, tmp_path, monkeypatch):
    target, rows = task
    taus = iter([1.5, 2.5, 2.0, 2.5, 9.0])
    monkeypatch.setattr(trainer, "measure_tau", lambda *args: next(taus))
    args = worker.arguments(tmp_path, epochs=9, eval_every=4, early_stopping_patience=2, save_total_limit=1)
    tracker = Tracker()
    trained = train(head, target, rows[4:], args, Accelerator(log_with=[tracker]), held_out=rows[:4])
    # Of 27 steps 16 are taken; the checkpoint of the best stays beside the last one.
    assert saved_steps(tmp_path) == [8, 16]
    best = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    written, state = DSparkHead.from_pretrained(tmp_path).state_dict(), trained.state_dict()
    assert all(torch.equal(written[name], best[name]) and torch.equal(state[name], best[name]) for name in best)

    log = read_log(tmp_path)
    assert {line["step"]: line["tau"] for line in log if "tau" in line} == {4: 1.5, 8: 2.5, 12: 2.0, 16: 2.5}
    assert all(line["tokens_per_second"] > 0 and line["learning_rate"] > 0 for line in log)
    assert tracker.lines == log and tracker.is_finished
    assert tracker.config["batch_size" if "batch_size" in tracker.config else "global batch_size"] == 8
    assert (tmp_path / "training.png").stat().st_size > 1000
    run = json.loads((tmp_path / "training.json").read_text())
    assert (run["steps"], run["written"], run["tau"]) == (16, 8, 2.5)
    publishing.build(tmp_path, "a/head", tmp_path / "repository", "a/target")
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "16 steps; this is the head of step 8" in card
    assert f"| 8 | {log[7]['total']:.3f} | 2.50 |" in card


def test_an_evaluation_decodes_prompts_and_changes_nothing(straight, task, head, tmp_path, monkeypatch):
    """Its tau is that of answering the prompts one by one; rounds that begin within the limit count, in full. A head
    that hardly helps yet is no reason for a warning."""
    target, rows = task
    monkeypatch.setattr(observers.logger, "handle", lambda record: pytest.fail(record.getMessage()))
    held_out = worker.task(30)[1][22:]
    trained = train(head, target, rows, worker.arguments(tmp_path, eval_every=STEPS), held_out=held_out)
    monkeypatch.undo()
    assert losses(tmp_path) == losses(straight) and same_bits(tmp_path, straight)
    accepted = []
    for row in held_out:
        ids, kwargs = torch.tensor([prompt_of(row)]), {"do_sample": False, "return_dict_in_generate": True}
        assert ids.shape[1] == worker.PROMPT
        output = target.generate(input_ids=ids, assistant_model=trained, max_new_tokens=64 + 5, **kwargs)
        lengths = output.dspark.committed_lengths[0]
        accepted += [length for i, length in enumerate(lengths) if sum(lengths[:i]) < 64]
    assert read_log(tmp_path)[-1]["tau"] == pytest.approx(sum(accepted) / len(accepted), abs=1e-5)


def test_held_out_rows_are_not_trained_on():
    rows = [{"input_ids": [i], "loss_mask": [1]} for i in range(20)]
    kept, held_out = split(rows, 5, seed=1)
    assert len(held_out) == 5 and sorted(row["input_ids"][0] for row in kept + held_out) == list(range(20))
    assert split(rows, 5, seed=1) == (kept, held_out) != split(rows, 5, seed=2)
    with pytest.raises(ValueError, match="20 of 20 rows cannot be held out"):
        split(rows, 20, seed=1)
    assert prompt_of({"input_ids": [7, 8, 9, 10], "loss_mask": [0, 0, 1, 1]}) == [7, 8]
    assert prompt_of({"input_ids": [7, 8], "loss_mask": [1, 1]}) == [7]


def test_arguments_that_contradict_each_other(task, head, tmp_path):
    target, rows = task
    for kwargs, held_out in (({"eval_every": 2}, None), ({}, rows)):
        with pytest.raises(ValueError, match="Held-out rows and `eval_every` go together"):
            train(head, target, rows, worker.arguments(tmp_path, **kwargs), held_out=held_out)
    with pytest.raises(ValueError, match="early stopping needs `eval_every`"):
        train(head, target, rows, worker.arguments(tmp_path, early_stopping_patience=1))


@pytest.mark.parametrize(
    ("kind", "plugin", "named"),
    [
        (DistributedType.DEEPSPEED, None, "configured for DEEPSPEED"),
        (DistributedType.FSDP, SimpleNamespace(fsdp_version=1), "configured for FSDP"),
        (DistributedType.FSDP, SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True), "loads no weights"),
    ],
)
def test_what_heads_are_not_trained_in(kind, plugin, named, task, head, tmp_path):
    target, rows = task
    is_fsdp2 = plugin is not None and plugin.fsdp_version == 2
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=is_fsdp2, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=named):
        train(head, target, rows, worker.arguments(tmp_path), accelerator)


def test_trackers_by_name():
    assert check_trackers(["none"]) == []
    with pytest.raises(ValueError, match="--report-to magic: accelerate has no such tracker, but .*tensorboard"):
        check_trackers(["magic"])
    with pytest.raises(ValueError, match="pip install dvclive"):
        check_trackers(["dvclive"])


def test_a_card_shows_a_few_lines_of_a_long_run():
    lines = [{"step": step, "total": 1.0, "tau": 3.0 if step == 17 else 2.0} for step in range(1, 101)]
    shown = [line["step"] for line in curve(lines)]
    assert shown[0] == 1 and shown[-1] == 100 and 17 in shown and len(shown) == 9


# -- Cached features ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    """Of four layers of 32 numbers and the last states, in float32: some 60 tokens each."""
    monkeypatch.setattr(features, "SHARD_BYTES", 60 * 2 * 32 * 4)


@pytest.fixture
def passes(task, monkeypatch):
    """A list with an entry for every pass of the target's decoder."""
    noted = []
    handle = task[0].get_decoder().register_forward_hook(lambda *args: noted.append(1))
    yield noted
    handle.remove()


def cached(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.safetensors"))


def test_cached_features_give_the_losses_of_online_ones(straight, task, head, tmp_path, small_shards, passes, capsys):
    target, rows = task
    args = worker.arguments(tmp_path / "run", cache_features=tmp_path / "cache")
    train(head, target, rows, args)
    # Two rows a shard, in one pass.
    shards = cached(tmp_path / "cache")
    assert len(shards) > 5 and len(passes) == len(shards)
    assert_same_losses(tmp_path / "run", straight)
    tokens = sum(len(row["input_ids"]) for row in rows)
    width, layers = target.config.hidden_size, len(head.config.target_layer_ids)
    assert sum(path.stat().st_size for path in shards) == pytest.approx(tokens * width * (layers + 1) * 4, rel=0.2)
    said = capsys.readouterr().out
    assert f"{tokens:,} tokens x {(layers + 1) * width * 4:,} bytes" in said and "to be made" in said


def test_a_damaged_shard_is_named_and_made_again_and_a_missing_one_is_made(
    task, tmp_path, small_shards, passes, monkeypatch
):
    target, rows = task
    accelerator, warnings = Accelerator(), []
    monkeypatch.setattr(features.logger, "warning", warnings.append)

    def open_cache():
        passes.clear()
        return features.open_cache(tmp_path, target, rows, [0, 1], accelerator, batch_size=8)

    open_cache()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    damaged, missing, unfinished, *_ = cached(tmp_path)
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    missing.unlink()
    # A kill between a shard and its checksum.
    unfinished.with_name(f"{unfinished.name}.sha256").unlink()
    cache = open_cache()
    assert len(passes) == 3 and len(warnings) == 1 and damaged.name in warnings[0]
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    open_cache()
    assert not passes
    # As the checksums are those of `sha256sum`.
    digest, name = damaged.with_name(f"{damaged.name}.sha256").read_text().split()
    assert hashlib.sha256(damaged.read_bytes()).hexdigest() == digest and name == damaged.name
    for row in (0, 5, len(rows) - 1):
        ids = torch.tensor([rows[row]["input_ids"]])
        for found, expected in zip(cache.read(row), target_states(target, ids, [0, 1]), strict=True):
            torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


def test_a_cache_serves_heads_that_read_some_of_its_layers_in_its_dtype(task, tmp_path, passes):
    target, rows = task
    accelerator = Accelerator()
    both = features.open_cache(tmp_path, target, rows, [0, 1], accelerator, 8, "bfloat16").read(3)
    passes.clear()
    one = features.open_cache(tmp_path, target, rows, [1], accelerator, 8, "bfloat16").read(3)
    assert not passes and one[0].dtype == torch.bfloat16
    assert torch.equal(one[0], both[0][:, 32:]) and torch.equal(one[1], both[1])
    for changed, named in (
        ({"layers": [0, 1, -1]}, r"layers \[0, 1\], now \[-1, 0, 1\]"),
        ({"dtype": "float32"}, "dtype bfloat16, now float32"),
        ({"rows": rows[:-1]}, "rows 22, .* now 21,"),
        ({"target": tiny_target(vocab_size=worker.VOCABULARY, seed=4)}, "target weights"),
    ):
        kwargs = {"target": target, "rows": rows, "layers": [0, 1], "dtype": "bfloat16"} | changed
        with pytest.raises(ValueError, match=f"holds other features: .*{named}"):
            features.open_cache(tmp_path, accelerator=accelerator, batch_size=8, **kwargs)
    with pytest.raises(ValueError, match="not in 'int8'"):
        features.open_cache(tmp_path, target, rows, [0], accelerator, 8, "int8")


def test_features_that_do_not_fit_are_refused(task, tmp_path, passes, monkeypatch):
    target, rows = task
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="where 1000 bytes are free"):
        features.open_cache(tmp_path, target, rows, [0, 1], Accelerator(), 8)
    assert not passes and not cached(tmp_path)
