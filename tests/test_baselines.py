"""Other ways to draft beside a head: in `bench` and in `eval`."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_head, tiny_target, whole_blocks
from safetensors.torch import load_file, save_file
from test_cli import fails, run
from test_eval import add_tokenizer
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig

import dspark_hf
from dspark_hf.embedded import FOLDER
from dspark_hf.evaluation.baselines import Others, RoundCounter, keeping_mtp

needs_mtp = pytest.mark.skipif(not hasattr(GenerationConfig(), "use_mtp"), reason="no `use_mtp` in this release")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "max_position_embeddings": 512,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture
def deepseek_v3(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Folders of an untrained DeepSeek V3 of two layers with an MTP layer behind them, as its checkpoints have it, and
    of a head for it."""
    # Transformers tells MTP layers by the number that the published model gives them.
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\..*"])
    torch.manual_seed(0)
    folder, head = tmp_path / "v3", tmp_path / "head"
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES)).eval()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    layer = {key: value for key, value in weights.items() if "layers.1." in key}
    block = {key.replace("layers.1.", "layers.2."): value.clone() for key, value in layer.items()}
    norms = {f"model.layers.2.{name}.weight": torch.ones(32) for name in ("enorm", "hnorm", "shared_head.norm")}
    # It goes by the last hidden state, and so repeats what the target would say of the token before.
    width = {"model.layers.2.eh_proj.weight": torch.cat([torch.zeros(32, 32), torch.eye(32)], dim=1)}
    save_file(weights | block | norms | width, folder / "model.safetensors", {"format": "pt"})
    add_tokenizer(folder)
    tiny_head(model).save_pretrained(head)
    return folder, head


@needs_mtp
def test_mtp_is_a_row_of_bench_and_of_eval(deepseek_v3, tmp_path):
    folder, head = deepseek_v3
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"turns": [f"{i} 5 9 2"]}) + "\n" for i in (3, 7)))
    pair = ["--model", str(folder), "--head", str(head), "--dtype", "float32", "--max-new-tokens", "12"]
    found, results = tmp_path / "bench.json", tmp_path / "results.json"
    options = ["--prompts", str(data), "--batch-sizes", "1", "--methods", "plain,mtp,lookup,dspark"]
    run("bench", *pair, *options, "--json", str(found))
    records = {record["method"]: record for record in json.loads(found.read_text())}
    assert [*records] == ["plain", "mtp", "lookup", "dspark"] and all(r["identical"] for r in records.values())
    assert 1 <= records["mtp"]["tau"] <= 2 and records["lookup"]["tau"] >= 1 and records["plain"]["tau"] is None
    assert all(record["tokens_per_second"] > 0 for record in records.values())

    printed = run("eval", *pair, "--data", str(data), "--baselines", "mtp,lookup,stock", "--results", str(results))
    rows = json.loads(results.read_text())["compared"]
    assert [row["method"] for row in rows] == ["plain", "mtp", "lookup", "stock", "dspark"]
    assert [row["tau"] is None for row in rows] == [True, False, False, False, False]
    assert {row["data"] for row in rows} == {"prompts"} and rows[0]["speedup"] == 1
    assert "beside other ways to draft: one row, greedy" in printed and " mtp " in printed


@needs_mtp
def test_mtp_layers_are_read_once(deepseek_v3):
    from transformers.modeling_layers import MtpModel

    model = AutoModelForCausalLM.from_pretrained(deepseek_v3[0], dtype=torch.float32).eval()
    inputs, stock = torch.tensor([[3, 5, 9]]), MtpModel.__dict__["from_pretrained"]
    names = [name for name, _ in model.named_modules()]
    with keeping_mtp():
        first = MtpModel.from_pretrained(model)
        texts = [model.generate(inputs, use_mtp=True, max_new_tokens=8, do_sample=False).tolist() for _ in range(2)]
        assert MtpModel.from_pretrained(model) is first
    assert texts[0] == texts[1] == model.generate(inputs, max_new_tokens=8, do_sample=False).tolist()
    assert MtpModel.__dict__["from_pretrained"] is stock and [name for name, _ in model.named_modules()] == names


def test_rounds_of_transformers_loop_are_counted():
    """By a head that draws the same drafts in both loops: the tokens of each round are those that ours has."""
    target = tiny_target(vocab_size=40, sharpness=3)
    head = whole_blocks(tiny_head(target))
    inputs, rounds = torch.tensor([[3, 5, 9, 2]]), RoundCounter()
    options = {"max_new_tokens": 24, "do_sample": False, "assistant_model": head}
    with dspark_hf.generation.hook.stock_loop():
        target.generate(inputs, streamer=rounds, **options)
    stats = target.generate(inputs, return_dict_in_generate=True, **options).dspark
    assert rounds.committed == stats.committed_lengths[0]


def test_an_assistant_and_another_head(tmp_path):
    found = tmp_path / "bench.json"
    pair = ["--model", str(FOLDER / "target"), "--head", str(FOLDER / "head"), "--dtype", "float32"]
    others = ["--assistant", str(FOLDER / "target"), "--baseline-head", str(FOLDER / "head"), "--limit", "2"]
    size = ["--batch-sizes", "1,2", "--methods", "plain", "--max-new-tokens", "24"]
    run("bench", *pair, *others, *size, "--json", str(found))
    records = json.loads(found.read_text())
    methods = [(record["method"], record["batch_size"]) for record in records]
    # Transformers' loop takes one row.
    assert methods == [("plain", 1), ("assistant", 1), ("baseline-head", 1), ("plain", 2), ("baseline-head", 2)]
    assert all(record["identical"] for record in records)
    # The target itself is an assistant that is never wrong; how much it drafts is transformers' choice.
    assert records[1]["tau"] >= 2 and records[2]["tau"] > 1


@pytest.mark.parametrize(
    "method, message",
    [("mtp", "has no MTP layers"), ("assistant", "give --assistant"), ("baseline-head", "give --baseline-head")],
)
def test_baselines_that_there_are_not(method, message):
    if method == "mtp" and not hasattr(GenerationConfig(), "use_mtp"):
        message = "has no `use_mtp`"
    with pytest.raises(ValueError, match=message):
        Others().check(tiny_target(), [method])
    assert message in fails("bench", "--methods", f"plain,{method}")
    assert message in fails("eval", "--baselines", method)


def test_an_unknown_baseline():
    assert "Unknown baselines ['eagle']; choose from stock, mtp, lookup" in fails("eval", "--baselines", "eagle")
