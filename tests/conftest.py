import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Step costs that tests learn are no concern of the user's cache.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dspark-tests-")
if not os.path.exists("/dev/nvidiactl"):
    # Kernels run in Triton's interpreter; read when triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hashlib
import json
import sys
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.generation import experience, generate
from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.engine import Engine
from dspark_hf.generation.experience import acceptance_of
from dspark_hf.generation.processors import BlockProcessors
from dspark_hf.generation.target import Target
from dspark_hf.scheduling.plan import NO_DRAFT, Plan
from dspark_hf.scheduling.scheduler import ConstantSchedule
from dspark_hf.scheduling.settings import Settings
from dspark_hf.training.losses import Losses, dspark_losses

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers side by side share the cores.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
GSM8K_SAMPLE = HERE / "data" / "gsm8k_test_24.jsonl"


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_accelerator():
    """accelerate keeps one state a process, which would refuse what the next test asks for."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def whole_set() -> Path | None:
    """The folder of whole cases: DSPARK_FIXTURES, which may be empty to go without; where it is not set,
    `shared/fixtures` beside the repository, if it is there."""
    beside = HERE.parents[1] / "shared" / "fixtures"
    folder = os.environ.get("DSPARK_FIXTURES", beside if beside.is_dir() else "")
    if not str(folder):
        return None
    if not any(Path(folder).glob("*/expected.json")):
        raise FileNotFoundError(f"DSPARK_FIXTURES: {folder} has no cases; set it to '' to test without the whole set")
    return Path(folder)


WHOLE_SET = whole_set()


class Case:
    """A numeric fixture: a head, what the reference implementation computed with it, and its target unless the case is
    a light one; see fixtures/make_light.py."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.is_whole = (folder / "target" / "model.safetensors").exists()

    @cached_property
    def expected(self) -> dict:
        """The expected.json of a case with its target."""
        return json.loads((self.target_folder.parent / "expected.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @property
    def prompts(self) -> list[dict]:
        """Token ids and accepted lengths of every prompt of the case."""
        count = sum(name.endswith(".input_ids") and name.startswith("prompt") for name in self.tensors)
        parts = ("input_ids", "generate_ids", "acceptance_lengths")
        return [{part: self.tensors[f"prompt{i}.{part}"].tolist() for part in parts} for i in range(count)]

    @property
    def target_folder(self) -> Path:
        """Skips the test if the case has no target."""
        if not self.is_whole:
            pytest.skip(f"the target of {self.name} is not in the repository: set DSPARK_FIXTURES to the whole set")
        return self.folder / "target"

    def target(self):
        return AutoModelForCausalLM.from_pretrained(self.target_folder, dtype=torch.float32).eval()

    def any_target(self):
        """The target, or where the case has none an untrained one of its shape with its embedding table."""
        if self.is_whole:
            return self.target()
        config = AutoConfig.from_pretrained(self.folder / "target")
        target = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        embeddings = self.folder / "target" / "tables.safetensors"
        table = load_file(embeddings if embeddings.exists() else self.folder / "head" / "model.safetensors")
        with torch.no_grad():
            target.get_input_embeddings().weight.copy_(table["embed_tokens.weight"])
        return target

    def features(self, i: int, target, head) -> torch.Tensor:
        """What `target`, one of the case, feeds to the head for prompt i and its output, [1, C, m*d]. A light case has
        it recorded, as far as its rounds need it."""
        if not self.is_whole:
            return self.tensors[f"prompt{i}.features"][None]
        runner, ids = Target(target, head.config.target_layer_ids), self.prompts[i]["generate_ids"]
        with torch.no_grad():
            return runner.forward(torch.tensor([ids]), runner.new_cache(1)).features

    @torch.no_grad()
    def drafts(self, i: int, starts: list[int], target, head) -> list[list[int]]:
        """Greedy drafts behind the anchors at the given positions of prompt i and its output."""
        text, features = torch.tensor(self.prompts[i]["generate_ids"]), self.features(i, target, head)
        drafter, seen, found = Drafter(head, target, 1), 0, []
        sampler = BlockProcessors(LogitsProcessorList(), do_sample=False).draft_sampler(None)
        for start in starts:
            drafter.append(features[:, seen:start], [start - seen])
            found.append(drafter.draft(text[start, None], head.config.gamma, sampler).tokens[0].tolist())
            seen = start
        return found

    def head(self):
        """The head; like the reference it drafts and verifies whole blocks."""
        return whole_blocks(DSparkHead.from_pretrained(self.folder / "head", dtype=torch.float32).eval())


def case_of(name: str) -> Case:
    """With its target wherever that is at hand."""
    folder = WHOLE_SET / name if WHOLE_SET and (WHOLE_SET / name).exists() else FIXTURES / name
    return Case(folder)


def cases() -> list[str]:
    """Names of all cases, light or whole."""
    return sorted({path.parent.name for root in (FIXTURES, WHOLE_SET) if root for path in root.glob("*/head")})


def recordings() -> list[Case]:
    """All cases, and beside whole ones also the light ones of the repository."""
    found = [case_of(name) for name in cases()]
    light = [Case(path.parent) for path in sorted(FIXTURES.glob("*/head"))]
    return found + [case for case in light if WHOLE_SET and not case.is_whole]


@pytest.fixture
def vanilla() -> Case:
    return Case(FIXTURES / "deepspec_qwen3_vanilla")


def tiny_target(vocab_size: int = 16, seed: int = 0, sharpness: float = 1.0, **kwargs) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of two layers. `sharpness` scales the LM head, so that its distributions are not flat."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**fields | kwargs)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def tiny_head(target, seed: int = 1, **kwargs) -> DSparkHead:
    """An untrained head for `target`: its drafts are rejected often, in every way. It always drafts, which pays for
    no target this small."""
    torch.manual_seed(seed)
    fields = {"block_size": 4, "num_hidden_layers": 1, "markov_rank": 8, "initializer_range": 0.2}
    return whole_blocks(DSparkHead(DSparkConfig.from_target(target.config, **fields | kwargs)).eval())


def biases(head: DSparkHead, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """[..., B, V], what the sequential head adds to the logits of a block [..., B, d] of which all rows predict, behind
    the tokens [..., B]."""
    sequential = head.markov_head
    embedded = sequential.embed(previous)
    return sequential.markov_w2(sequential.mix_block(hidden, embedded, sequential.initial_state(embedded[..., 0, :])))


def losses_of_logits(draft, target, *others, **kwargs) -> Losses:
    """The losses of logits [b, N, G, V] that are there already; other arguments as in `dspark_losses`."""
    return dspark_losses([draft], lambda rows: rows, target, lambda rows: rows, *others, **kwargs)


def whole_blocks(head: DSparkHead) -> DSparkHead:
    head.generation_config.num_assistant_tokens_schedule = "constant"
    return head


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hub. Calling it puts a folder there as the repository of that name."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return lambda name, folder: in_cache(cache, name, folder)


def in_cache(cache: Path, name: str, folder: Path) -> None:
    """Lay a folder out as huggingface_hub does for a downloaded repository."""
    commit = hashlib.sha1(name.encode()).hexdigest()
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)


class ShuffledSchedule(ConstantSchedule):
    """Changes from round to round and from row to row, by chance: who drafts, how long, how much of it is verified and
    whether that is packed."""

    def __init__(self, settings, shared, rows, packs, seed=0):
        super().__init__(settings, shared, rows)
        self.packs, self.random = packs, np.random.default_rng(seed)

    def plan(self, max_drafts, context, load, pending=0):
        rows = [r for r in range(len(max_drafts)) if self.random.random() < 0.7]
        length = min(int(self.random.integers(0, self.settings.most + 1)), max(max_drafts))
        if not rows or length < 1:
            return NO_DRAFT
        return Plan(rows, length, packed=self.packs and self.random.random() < 0.7)

    def choose(self, plan, survival, max_drafts):
        drafted = survival.any(axis=1) * survival.shape[1]
        return np.minimum(self.random.integers(0, drafted + 1), np.clip(max_drafts, 0, None))


@pytest.fixture
def shuffled(monkeypatch):
    """Generation with a head runs with a `ShuffledSchedule`."""
    monkeypatch.setattr(generate, "scheduler_for", shuffled_scheduler)


class FixedCosts:
    """Step costs that nothing changes, by default such that drafting pays: a pass takes a second, and `verify` of one
    more for every further token a row, `draft` of one for every position; four times as many rows take twice as long.
    `reading`: what a draft costs more when the head has tokens yet to read."""

    pace = 1.0

    def __init__(self, block_size: int, verify: float = 0.05, draft: float = 0.02, reading: float = 0.0):
        self.block_size, self.slopes, self.reading = block_size, (verify, draft), reading

    def verify(self, rows, context, packed=False):
        return rows**0.5 * (1 + self.slopes[0] * np.arange(self.block_size + 1)) * (1.02 if packed else 1)

    def draft(self, rows, context, pending=0):
        return rows**0.5 * (0.2 + self.slopes[1] * np.arange(self.block_size)) + self.reading * bool(pending)

    def unsure(self, rows, context):
        return np.zeros(self.block_size + 1)

    def learn_verify(self, *args):
        pass

    learn_draft = learn_verify


@pytest.fixture
def drafting_pays(monkeypatch):
    """The load schedule goes by step costs under which it drafts, whatever this machine and the tiny models take."""
    monkeypatch.setattr(experience, "costs_of", lambda head, target, sampled: FixedCosts(head.config.gamma))


@contextmanager
def lengths_compared():
    """Within this context the device must hold the same lengths as the host after every round."""
    step = Engine.step

    def compared(self):
        ended = step(self)
        # Of rows that have all ended nothing is kept.
        for cache in (self.state.cache, self.drafter.cache) if self.rows else ():
            assert cache.starts.tolist() == cache.lengths
        return ended

    with mock.patch.object(Engine, "step", compared):
        yield


def shuffled_scheduler(target, drafter, rows, config, synced):
    head = drafter.head
    settings = Settings.read(head.generation_config, head.config.gamma, config)
    return ShuffledSchedule(settings, acceptance_of(head, target.model), rows, target.packs)
