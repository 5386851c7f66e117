import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dspark_hf import DSparkConfig, DSparkHead

HERE = Path(__file__).parent
FIXTURES = Path(os.environ.get("DSPARK_FIXTURES", HERE / "fixtures"))
GSM8K_SAMPLE = HERE / "data" / "gsm8k_test_24.jsonl"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --all")


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
        return DSparkHead.from_pretrained(self.folder / "head", dtype=torch.float32).eval()


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
    """An untrained head for `target`: its drafts are rejected often, in every way."""
    torch.manual_seed(seed)
    fields = {"block_size": 4, "num_hidden_layers": 1, "markov_rank": 8, "initializer_range": 0.2}
    return DSparkHead(DSparkConfig.from_target(target.config, **fields | kwargs)).eval()
