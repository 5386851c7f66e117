import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Step times that tests measure are no concern of the user's cache.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dspark-tests-")
if not os.path.exists("/dev/nvidiactl"):
    # Kernels run in Triton's interpreter; read when triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.generation import loop, step_times
from dspark_hf.generation.step_times import experience_of
from dspark_hf.scheduling.cost import CostTable, sizes_of
from dspark_hf.scheduling.scheduler import NO_DRAFT, ConstantSchedule, Plan, Settings

HERE = Path(__file__).parent
FIXTURES = Path(os.environ.get("DSPARK_FIXTURES", HERE / "fixtures"))
GSM8K_SAMPLE = HERE / "data" / "gsm8k_test_24.jsonl"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests that take minutes")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --all"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Case:
    """A numeric fixture: a target, a head and what the reference implementation computed with them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.expected = json.loads((folder / "expected.json").read_text())

    def target(self):
        return AutoModelForCausalLM.from_pretrained(self.folder / "target", dtype=torch.float32).eval()

    def head(self):
        """The head; like the reference it drafts and verifies whole blocks."""
        return whole_blocks(DSparkHead.from_pretrained(self.folder / "head", dtype=torch.float32).eval())


def cases() -> list[str]:
    names = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))
    assert names, f"no fixtures in {FIXTURES}"
    return names


@pytest.fixture
def vanilla() -> Case:
    return Case(HERE / "fixtures" / "deepspec_qwen3_vanilla")


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


def whole_blocks(head: DSparkHead) -> DSparkHead:
    head.generation_config.num_assistant_tokens_schedule = "constant"
    return head


class ShuffledSchedule(ConstantSchedule):
    """Changes from round to round and from row to row, by chance: who drafts, how long, how much of it is verified and
    whether that is packed."""

    def __init__(self, settings, shared, rows, packs, seed=0):
        super().__init__(settings, shared, rows)
        self.packs, self.random = packs, np.random.default_rng(seed)

    def plan(self, rooms, context, load, waiting=0):
        rows = [r for r in range(len(rooms)) if self.random.random() < 0.7]
        length = min(int(self.random.integers(0, self.settings.most + 1)), max(rooms))
        if not rows or length < 1:
            return NO_DRAFT
        return Plan(rows, length, length, packed=self.packs and self.random.random() < 0.7)

    def choose(self, plan, survival, rooms):
        drafted = survival.any(axis=1) * survival.shape[1]
        return np.minimum(self.random.integers(0, drafted + 1), np.clip(rooms, 0, None))


@pytest.fixture
def shuffled(monkeypatch):
    """Generation with a head runs with a `ShuffledSchedule`."""
    monkeypatch.setattr(loop, "scheduler_for", shuffled_scheduler)


def table_of(block_size: int, verify: float = 0.05, draft: float = 0.02, identity=None) -> CostTable:
    """Step times under which drafting pays: a step takes a second, and `verify` of one more for every further token a
    row, `draft` of one for every position; four times as many rows take twice as long."""
    counts = [1, 2, 4, 8, 16, 32, 64]
    tables = {}
    for kind, sizes in sizes_of(block_size).items():
        price, first = (draft, 0.2) if kind in ("draft", "start") else (verify, 1.0)
        line = first + price * np.arange(sizes)
        tables[kind] = np.sqrt(np.array(counts))[:, None] * line * (1.02 if kind == "packed" else 1)
    return CostTable(identity or {"target": "none"}, [128], counts, **{k: t[None] for k, t in tables.items()})


@pytest.fixture
def drafting_pays(monkeypatch):
    """The load schedule goes by step times under which it drafts, whatever this machine and the tiny models take."""
    monkeypatch.setattr(step_times, "step_times", lambda target, head, rows: table_of(head.config.block_size))
    monkeypatch.setattr(CostTable, "observe", lambda *args: None)


def shuffled_scheduler(target, drafter, rows, greedy, runs_ahead):
    head = drafter.head
    settings = Settings.read(head.generation_config, head.config.block_size)
    return ShuffledSchedule(settings, experience_of(head, target.model), rows, target.packs)
