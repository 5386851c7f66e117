"""DeepSeek V4: the head in its target's checkpoint, against numbers of independent implementations."""

import functools
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import FIXTURES, WHOLE_SET, biases, tiny_head, tiny_target, whole_blocks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LogitsProcessorList

from dspark_hf import DSparkHead
from dspark_hf.checkpoints import CannotExpress, CheckpointError, deepseek_v4
from dspark_hf.checkpoints.export import LAYOUTS, export
from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.processors import BlockProcessors
from dspark_hf.generation.target import Target
from dspark_hf.hub.inspection import inspect_head
from dspark_hf.hub.publishing import build

TOLERANCE = 1e-4
STORED = ("checkpoint", "checkpoint_quantised")
SELECT = BlockProcessors(LogitsProcessorList(), do_sample=False).draft_sampler(None)


def folders() -> list[Path]:
    """Cases of this layout of the whole set."""
    return sorted(path.parents[1] for path in (WHOLE_SET or FIXTURES).glob("*/checkpoint/config.json"))


pytestmark = pytest.mark.skipif(not folders(), reason="no case of this layout: set DSPARK_FIXTURES to the whole set")


@pytest.fixture(scope="module", params=folders(), ids=lambda folder: folder.name)
def case(request) -> Path:
    return request.param


@functools.cache
def target_of(case: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(case / "checkpoint", dtype=torch.float32, **kwargs).eval()


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
    block = head.sample_block(hidden, anchor, drafter.embeddings, head.config.gamma, SELECT)
    return hidden[0], head.base_logits(hidden, drafter.embeddings)[0], block


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
            close(base + biases(head, hidden, previous), at["rounds.corrected_logits"][r])
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


# -- Decoding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_of_the_target(case):
    """In one pass and in pieces, within what rounding explains."""
    runner = Target(target_of(case), head_of(case).config.target_layer_ids)
    for i, prompt in enumerate(prompts(case)):
        ids, expected = torch.tensor([prompt["generate_ids"]]), numbers(case)[f"prompt{i}.features"]
        for pieces in ([ids.shape[1]], [prompt["length"], 7, 1, ids.shape[1] - prompt["length"] - 8]):
            cache, found = runner.new_cache(1), []
            for piece in ids.split(pieces, dim=1):
                found.append(runner.forward(piece, cache).features[0])
                cache.commit([piece.shape[1]])
            torch.testing.assert_close(torch.cat(found), expected, atol=5e-4, rtol=0)


def decoded(target, head: DSparkHead, ids: list[list[int]], count: int, **kwargs):
    """Greedy text of prompts, left-padded to one length."""
    longest = max(map(len, ids))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    return target.generate(padded, attention_mask=mask, assistant_model=head, **settings | kwargs)


@pytest.mark.parametrize("stored", STORED)
def test_rounds_of_every_prompt(case, stored):
    """Text and the length of every round, as recorded."""
    head = head_of(case, stored)
    for prompt in prompts(case):
        output = decoded(target_of(case), head, [prompt["input_ids"]], 40 + 2 * head.config.block_size)
        assert output.sequences[0, : len(prompt["generate_ids"])].tolist() == prompt["generate_ids"]
        expected = prompt["acceptance_lengths"]
        assert output.dspark.committed_lengths[0][: len(expected)] == expected


@pytest.mark.slow
def test_rounds_in_one_batch(case):
    """Every row accepts what it accepts alone."""
    head = head_of(case)
    output = decoded(
        target_of(case), head, [prompt["input_ids"] for prompt in prompts(case)], 40 + 2 * head.config.block_size
    )
    longest = max(prompt["length"] for prompt in prompts(case))
    for row, prompt in enumerate(prompts(case)):
        new = prompt["generate_ids"][prompt["length"] :]
        assert output.sequences[row, longest:].tolist()[: len(new)] == new
        expected = prompt["acceptance_lengths"]
        assert output.dspark.committed_lengths[row][: len(expected)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 7])
def test_a_long_text_is_that_of_plain_generate(case, size):
    """300 tokens through windows and compressed entries. The indexer keeps all of these here: where it has to choose,
    which of two near ties it takes depends on how many tokens a pass has."""
    target, ids = target_of(case, index_topk=128), prompts(case)[1]["input_ids"]
    plain = target.generate(torch.tensor([ids]), max_new_tokens=300, do_sample=False, eos_token_id=None)
    output = decoded(target, head_of(case, block_size=size), [ids], 300)
    assert output.sequences.tolist() == plain.tolist()
    assert len(set(output.dspark.committed_lengths[0])) > 1


# -- Other ways in and out --------------------------------------------------------------------------------------------


def same_head(found: DSparkHead, expected: DSparkHead) -> None:
    """The same weights, and a config that says the same."""
    own, theirs = found.state_dict(), expected.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    known = [head.config.own_keys() for head in (found, expected)]
    for keys in known:
        keys.pop("dtype", None)
    assert known[0] == known[1]


def test_saved_and_exported(case, tmp_path):
    """Our own layout and the published one, each loads again; others cannot hold the head."""
    head = head_of(case)
    head.save_pretrained(tmp_path / "saved")
    export(head, "deepseek_v4", tmp_path / "exported", target_of(case))
    for name in ("saved", "exported"):
        same_head(DSparkHead.from_pretrained(tmp_path / name, dtype=torch.float32), head)
    published = json.loads((case / STORED[0] / "config.json").read_text()) | {"torch_dtype": "float32"}
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written.pop("transformers_version") and written == published
    for to in set(LAYOUTS) - {"deepseek_v4"}:
        with pytest.raises(CannotExpress):
            export(head, to, tmp_path / to)


def test_half_precision_keeps_what_the_release_has_in_float32(case, tmp_path):
    head = DSparkHead.from_pretrained(case / STORED[1])
    kept = {name for name, tensor in head.state_dict().items() if tensor.dtype == torch.float32}
    assert head.dtype == torch.bfloat16 and {"layers.0.attn_hc.fn", "hc_head.hc_fn", "layers.1.self_attn.sinks"} < kept
    assert not any("proj" in name for name in kept - {"confidence_head.proj.weight"})
    head.save_pretrained(tmp_path)
    same_head(DSparkHead.from_pretrained(tmp_path), head)
    hidden, _, block = block_of(case, head, 0, 5, numbers(case)["prompt0.features"])
    assert hidden.dtype == torch.bfloat16 and block.confidence_logits.isfinite().all()


def test_for_target(case):
    """Of a model, of its folder and of a repository that is named like a published one."""
    for found in (DSparkHead.for_target(target_of(case)), DSparkHead.for_target(case / STORED[0], dtype=torch.float32)):
        same_head(found, head_of(case))


def test_from_the_hub(case, hub):
    """By the id of a published checkpoint, of which only config, index and the head's shards are there."""
    name = "deepseek-ai/DeepSeek-V4-Flash-DSpark"
    hub(name, case / STORED[1])
    (snapshot,) = Path(huggingface_hub.constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    for shard in target_shards(case / STORED[1]):
        (snapshot / shard).unlink()
    for head in (
        DSparkHead.from_pretrained(name, dtype=torch.float32),
        DSparkHead.for_target(name, dtype=torch.float32),
    ):
        same_head(head, head_of(case))
        assert head.config._name_or_path == name
    assert inspect_head(name).dialect == "deepseek_v4"


def target_shards(folder: Path) -> set[str]:
    """Files without a tensor of the head."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return set(index.values()) - {shard for name, shard in index.items() if name.startswith("mtp.")}


def test_inspection(case):
    found, head = inspect_head(str(case / STORED[1])), head_of(case)
    assert (found.dialect, found.backbone, found.layers) == (
        "deepseek_v4",
        "deepseek_v4",
        head.config.num_hidden_layers,
    )
    assert found.parameters == head.num_parameters() + sum(b.numel() for n, b in head.named_buffers() if "bias" in n)
    assert found.borrowed == ["embed_tokens", "lm_head"] and not found.problems
    assert found.dtypes == ["BF16", "F32", "F8_E4M3", "F8_E8M0", "I8"]
    assert found.target == str(case / STORED[1]) and found.bytes < inspect_head(str(case / STORED[0])).bytes


def test_publishing_writes_the_head_alone(case, tmp_path):
    build(case / STORED[1], "someone/head", tmp_path, "someone/target")
    same_head(DSparkHead.from_pretrained(tmp_path), DSparkHead.from_pretrained(case / STORED[1]))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dspark"
    card = (tmp_path / "README.md").read_text()
    assert (
        """vllm serve someone/target --speculative-config '{"method": "dspark", "num_speculative_tokens": 5}'""" in card
    )


def test_a_folder_of_the_target(case, tmp_path):
    """A head in `dspark/` of its target's repository, where SGLang looks."""
    target = tiny_target()
    target.save_pretrained(tmp_path)
    tiny_head(target).save_pretrained(tmp_path / "dspark")
    expected = DSparkHead.from_pretrained(tmp_path / "dspark")
    for head in (DSparkHead.from_pretrained(tmp_path), DSparkHead.for_target(tmp_path)):
        same_head(head, expected)
    same_head(DSparkHead.for_target(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert inspect_head(str(tmp_path)).layers == expected.config.num_hidden_layers


# -- Malformed checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(case, tmp_path) -> Path:
    """A copy of the quantised checkpoint that may be changed."""
    folder = tmp_path / "copy"
    shutil.copytree(case / STORED[1], folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def rewritten(folder: Path, change) -> None:
    """Change the tensors of the head's last shard."""
    shard = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mtp.2.attn.wo_a.scale"), "mtp.2.attn.wo_a.scale: found nothing, expected scales"),
        (lambda t: t.pop("mtp.2.hc_head_fn"), "mtp.2.hc_head_fn: found no tensor"),
        (lambda t: t.update({"mtp.2.markov_head.embed.weight": torch.ones(2)}), "embed.weight: found a tensor"),
        (lambda t: t.update({"mtp.4.norm.weight": torch.ones(2)}), r"mtp.N of N in \['0', '1', '2', '4'\]"),
        (lambda t: t.update({"mtp.2.norm.scale": torch.ones(2)}), "mtp.2.norm.scale: found a scale"),
        (lambda t: t.update({"mtp.2.norm.weight": torch.ones(2)}), r"mtp.2.norm.weight: found shape \[2\]"),
        (lambda t: t.update({"mtp.2.attn.wq_b.scale": t["mtp.2.attn.wq_b.scale"][:1]}), "one for 32x32"),
    ],
)
def test_malformed_tensors(copy, change, message):
    rewritten(copy, change)
    with pytest.raises(CheckpointError, match=message):
        DSparkHead.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("dspark_block_size"), "has no DSpark head"),
        (lambda c: c.pop("dspark_markov_rank"), "dspark_markov_rank: found nothing"),
        (lambda c: c.update(dspark_noise_token_id=9999), "dspark_noise_token_id: found 9999"),
        (lambda c: c.update(dspark_target_layer_ids=[5, 6]), r"dspark_target_layer_ids: found \[5, 6\]"),
        (lambda c: c["quantization_config"].update(weight_block_size=[32]), "weight_block_size: found"),
        (lambda c: c.update(n_routed_experts=5), "ffn.experts.4.w1.weight: found no tensor"),
        (lambda c: c.update(model_type="mistral_large4"), "mtp_dspark"),
    ],
)
def test_malformed_configs(copy, change, message):
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        DSparkHead.from_pretrained(copy)


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
