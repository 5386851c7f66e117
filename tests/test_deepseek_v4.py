"""DeepSeek V4: the head in its target's checkpoint, against numbers of independent implementations."""

import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, WHOLE_SET, whole_blocks
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LogitsProcessorList

from dspark_hf import DSparkHead
from dspark_hf.checkpoints import deepseek_v4
from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.processors import BlockProcessors

TOLERANCE = 1e-4
STORED = ("checkpoint", "checkpoint_quantised")
SELECT = BlockProcessors(LogitsProcessorList(), do_sample=False).drafting(None)


def folders() -> list[Path]:
    """Cases of this layout of the whole set."""
    return sorted(path.parents[1] for path in (WHOLE_SET or FIXTURES).glob("*/checkpoint/config.json"))


pytestmark = pytest.mark.skipif(not folders(), reason="no case of this layout: set DSPARK_FIXTURES to the whole set")


@pytest.fixture(scope="module", params=folders(), ids=lambda folder: folder.name)
def case(request) -> Path:
    return request.param


@functools.cache
def target_of(case: Path):
    return AutoModelForCausalLM.from_pretrained(case / "checkpoint", dtype=torch.float32).eval()


@functools.cache
def head_of(case: Path, stored: str = "checkpoint", **kwargs) -> DSparkHead:
    return whole_blocks(DSparkHead.from_pretrained(case / stored, dtype=torch.float32, **kwargs).eval())


@functools.cache
def numbers(case: Path) -> dict[str, torch.Tensor]:
    return load_file(case / "expected.safetensors")


def of_prompt(case: Path, i: int) -> dict[str, torch.Tensor]:
    start = f"prompt{i}."
    return {name.removeprefix(start): tensor for name, tensor in numbers(case).items() if name.startswith(start)}


def prompts(case: Path) -> list[dict]:
    return json.loads((case / "expected.json").read_text())["prompts"]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_dequantised_weights_are_the_exact_ones(case):
    plain, quantised = (head_of(case, stored).state_dict() for stored in STORED)
    assert plain.keys() == quantised.keys() and len(plain) > 50
    assert all(torch.equal(plain[name], quantised[name]) for name in plain)
    published = {}
    for shard in (case / "checkpoint").glob("*.safetensors"):
        published |= {name: tensor for name, tensor in load_file(shard).items() if name.startswith("mtp.")}
    depth, experts = head_of(case).config.num_hidden_layers, head_of(case).config.stage_config["n_routed_experts"]
    for own, names in deepseek_v4.layout(depth, experts):
        parts = torch.cat([published.pop(name).float() for name in names])
        assert torch.equal(quantised[own].view(parts.shape), parts)
    assert not published


@torch.no_grad()
def block_of(case: Path, head: DSparkHead, prompt: int, start: int, features: torch.Tensor) -> tuple:
    """Hidden states, logits before the sequential head and the greedy block behind the first `start` tokens."""
    drafter = Drafter(head, target_of(case), 1)
    anchor = numbers(case)[f"prompt{prompt}.generate_ids"][start, None]
    drafter.append(features[None, :start], [start])
    hidden = drafter._hidden(anchor, None, *drafter.take(None))
    block = head.sample_block(hidden, anchor, drafter.tables, head.config.gamma, SELECT)
    return hidden[0], head.base_logits(hidden, drafter.tables)[0], block


@pytest.mark.parametrize("stored", STORED)
@torch.no_grad()
def test_numbers_of_every_round(case, stored):
    """main_x, every stage, hidden states, logits, confidence and drafts from the stored features."""
    head, stages = head_of(case, stored), []
    hooks = [layer.register_forward_hook(lambda _, __, output: stages.append(output[0])) for layer in head.layers]
    for i in range(len(prompts(case))):
        at = of_prompt(case, i)
        close(head.project_context(at["features"]), at["main_x"])
        for r, start in enumerate(at["rounds.start"].tolist()):
            stages.clear()
            hidden, base, block = block_of(case, head, i, start, at["features"])
            close(torch.stack(stages), at["rounds.stages"][r])
            close(hidden, at["rounds.hidden"][r])
            close(base, at["rounds.base_logits"][r])
            close(block.confidence_logits[0], at["rounds.confidence_logits"][r])
            assert block.tokens[0].tolist() == at["rounds.draft_tokens"][r].tolist()
            previous = torch.cat([at["rounds.anchor_id"][r, None], block.tokens[0, :-1]])
            close(base + head.markov_head.teacher_forced(hidden, previous), at["rounds.corrected_logits"][r])
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("size", [3, 7])
def test_blocks_of_other_lengths(case, size):
    head, found = head_of(case, block_size=size), numbers(case)
    assert head.config.gamma == head.generation_config.num_assistant_tokens == size
    for i, prompt in enumerate(prompts(case)):
        _, base, block = block_of(case, head, i, prompt["length"], found[f"prompt{i}.features"])
        close(base, found[f"prompt{i}.block{size}.base_logits"])
        close(block.confidence_logits[0], found[f"prompt{i}.block{size}.confidence_logits"])
        assert block.tokens[0].tolist() == found[f"prompt{i}.block{size}.draft_tokens"].tolist()


def test_context_in_pieces(case):
    """A context that came round by round, and rows of different lengths, give the drafts of one that came at once."""
    head, found = head_of(case), numbers(case)
    count = len(prompts(case))
    ids = [found[f"prompt{i}.generate_ids"] for i in range(count)]
    features = [found[f"prompt{i}.features"] for i in range(count)]
    drafter, seen = Drafter(head, target_of(case), count), [0] * count
    with torch.no_grad():
        for step in range(3):
            ends = [prompt["length"] + 4 * step + i for i, prompt in enumerate(prompts(case))]
            counts = [end - start for start, end in zip(seen, ends, strict=True)]
            pieces = [own[start:end] for own, start, end in zip(features, seen, ends, strict=True)]
            drafter.append(torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True), counts)
            anchors = torch.stack([own[end] for own, end in zip(ids, ends, strict=True)])
            tokens, seen = drafter.draft(anchors, head.config.gamma, SELECT).tokens, ends
            for i, end in enumerate(ends):
                assert tokens[i].tolist() == block_of(case, head, i, end, features[i])[2].tokens[0].tolist()


def test_only_shards_with_the_head_are_opened(case, monkeypatch):
    opened = set()

    class Counted:
        def __new__(cls, path, **kwargs):
            opened.add(Path(path).name)
            return safe_open(path, **kwargs)

    for module in ("dspark_hf.checkpoints.headers", "dspark_hf.checkpoints.stored", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.safe_open", Counted)
    DSparkHead.from_pretrained(case / "checkpoint_quantised")
    index = json.loads((case / "checkpoint_quantised" / "model.safetensors.index.json").read_text())["weight_map"]
    assert opened == {shard for name, shard in index.items() if name.startswith("mtp.")} < set(index.values())
