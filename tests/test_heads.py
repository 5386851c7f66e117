"""Which head a model has, what a head is, and heads for other engines: from Python and as typed."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import case_of, tiny_head, tiny_target
from safetensors import safe_open
from test_cli import run
from test_dialects import DIALECT
from transformers import (
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
)
from transformers.utils import logging as transformers_logging

from dspark_hf import DSparkHead
from dspark_hf.cli import app
from dspark_hf.embedded import FOLDER
from dspark_hf.hub import registry
from dspark_hf.hub.inspection import inspect_head
from dspark_hf.hub.registry import PublishedHead, head_for, heads_for, published_heads
from dspark_hf.pairing import rope_contradiction


def refuses(*args: str) -> str:
    """What a command says when it refuses; `dspark_hf.cli.main` prints it."""
    with pytest.raises(ValueError) as caught:
        run(*args)
    return str(caught.value)


def fixture(name: str, part: str = "head") -> str:
    return str(case_of(name).folder / part)


# -- The registry -----------------------------------------------------------------------------------------------


def test_the_registry_is_sound():
    heads = published_heads()
    assert len({head.head for head in heads}) == len(heads) >= 20
    for head in heads:
        assert head.method in ("dspark", "dflash") and head.dialect in {*DIALECT.values(), "deepseek_v4"}
        assert head.head.count("/") == head.target.count("/") == 1
        assert head.block_size is None or head.block_size >= 3
        assert head.seen in ("table", "card") and (head.taps is None or list(head.taps) == sorted(set(head.taps)))
    assert [head for head in heads if head.taps and len(head.taps) == 8]


def test_every_head_of_which_more_is_known_is_in_the_file_of_sources():
    sources = Path(registry.__file__).with_name("registry.md").read_text()
    assert [head.head for head in published_heads() if head.seen == "card" and head.head not in sources] == []


@pytest.mark.parametrize(
    ("target", "head"),
    [
        ("Qwen/Qwen3-4B", "deepseek-ai/dspark_qwen3_4b_block7"),
        ("qwen/qwen3-8b", "deepseek-ai/dspark_qwen3_8b_block7"),
        ("Qwen/Qwen3-14B", "deepseek-ai/dspark_qwen3_14b_block7"),
        ("google/gemma-4-12B-it", "deepseek-ai/dspark_gemma4_12b_block7"),
        ("deepseek-ai/DeepSeek-V4-Flash-0731", "deepseek-ai/DeepSeek-V4-Flash-0731"),
    ],
)
def test_the_preferred_head_of_a_target(target, head):
    assert head_for(target).head == head


def test_other_heads_of_a_target_are_listed_behind():
    methods = [head.method for head in heads_for("Qwen/Qwen3-4B")]
    assert methods == sorted(methods, reverse=True) and "dflash" in methods


def test_a_target_without_a_head():
    with pytest.raises(ValueError, match="Qwen/Qwen3-0.6B.*dspark-hf heads"):
        head_for("Qwen/Qwen3-0.6B")
    with pytest.raises(ValueError, match="No published head"):
        DSparkHead.for_target("Qwen/Qwen3-0.6B")


def test_a_folder_named_like_the_model_finds_its_head(tmp_path):
    folder = tmp_path / "Qwen3-4B"
    folder.mkdir()
    assert head_for(str(folder)).head == "deepseek-ai/dspark_qwen3_4b_block7"
    assert heads_for("/nowhere/Qwen3-4B") == []


@pytest.fixture
def pair_is_published(monkeypatch):
    """The embedded pair, as if it were on the Hub."""
    entry = PublishedHead(str(FOLDER / "head"), str(FOLDER / "target"), "deepspec", "dspark", 7, "this project")
    monkeypatch.setattr(registry, "published_heads", lambda: (entry,))


def test_for_target_of_a_model_and_of_an_id(pair_is_published):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "target", dtype=torch.float32)
    head = DSparkHead.for_target(model)
    assert head.dtype == torch.float32 and head.device == model.device
    assert DSparkHead.for_target(str(FOLDER / "target"), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_generate_finds_the_head(pair_is_published):
    output = run("generate", "Tom has 3 pens.", "--model", str(FOLDER / "target"), "--max-new-tokens", "8", "--json")
    assert json.loads(output[output.index("{") :])["tau"] >= 1


def test_generate_without_a_known_head():
    assert "No published head" in refuses("generate", "x", "--model", fixture("deepspec_qwen3_vanilla", "target"))


def test_heads_lists_them():
    listed = json.loads(run("heads", "--json"))
    assert [entry["head"] for entry in listed] == [head.head for head in published_heads()]
    assert {entry["target"] for entry in json.loads(run("heads", "Qwen/Qwen3-8B", "--json"))} == {"Qwen/Qwen3-8B"}
    assert "deepseek" in run("heads", "Qwen/Qwen3-8B")


def test_heads_are_filtered_by_target_and_trainer():
    listed = run("heads", "gemma-4", "--trainer", "red hat")
    assert "RedHatAI/gemma-4-31B-it-speculator.dspark" in listed and "taps 1 17 29 47 58" in listed
    assert "deepseek-ai" not in listed and "Qwen" not in listed
    by = json.loads(run("heads", "--trainer", "MPASH", "--json"))
    assert [head["head"] for head in by] == ["mpashkovskii/dspark-qwen3-8b"] and by[0]["licence"] == "apache-2.0"
    with pytest.raises(SystemExit):
        app(["heads", "Qwen/Qwen3-8B", "--trainer", "nobody"])


# -- Inspection -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIALECT)
def test_inspection(name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(safe_open, "get_tensor", None, raising=False)
        found = inspect_head(fixture(name))
    case, head = case_of(name), case_of(name).head()
    vocabulary = json.loads((case.folder / "target" / "config.json").read_text())["vocab_size"]
    assert found.dialect == DIALECT[name] and found.drafts == case.tensors["prompt0.rounds.draft_tokens"].shape[1]
    assert found.rows == case.tensors["prompt0.rounds.hidden"].shape[1] and found.vocabulary == vocabulary
    assert found.parameters == head.num_parameters() + sum(b.numel() for n, b in head.named_buffers() if "scalar" in n)
    assert found.borrowed == [t for t in ("embed_tokens", "lm_head") if getattr(head, t) is None]
    assert not found.problems and found.dtypes == ["F32"]


def test_inspect_as_typed():
    found = json.loads(run("inspect", fixture("speculators_qwen3_dspark"), "--json"))
    assert found["target"] == "../target" and found["draft_vocabulary"] == 112 and found["dialect"] == "speculators"
    table = run("inspect", fixture("zlab_dflash_qwen3"))
    for part in ("dflash", "8 rows, 7 drafts", "embed_tokens, lm_head", "sequential head", "none"):
        assert part in table, part
    assert "problem" not in table and "fits" not in table
    assert "fits" in run("inspect", str(FOLDER / "head"), "--model", "embedded")


def test_inspect_beside_another_target():
    table = run("inspect", fixture("deepspec_qwen3_gated"), "--model", fixture("deepspec_qwen3_vanilla", "target"))
    assert "a vocabulary of 136" in table and "rotary base of 1e+06" in table and "rope_parameters" in table


def test_inspect_refuses_malformed_heads(tmp_path):
    shutil.copytree(fixture("modelopt_qwen3_dspark"), tmp_path / "head")
    weights = tmp_path / "head" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = refuses("inspect", str(tmp_path / "head"))
    assert "model.safetensors" in message and "Download it again" in message


class Hub(SimpleHTTPRequestHandler):
    """Answers like the Hub for one repository, `trainer/head`, and counts the bytes of weights that it sends."""

    sent = 0

    def do_HEAD(self):  # noqa: N802
        self.answer(send=False)

    def do_GET(self):  # noqa: N802
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        path = Path(fixture("deepspec_qwen3_vanilla")) / name
        if not self.path.startswith("/trainer/head/resolve/") or not path.exists():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, status = path.read_bytes(), 200
        size, asked = len(content), self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        for key, value in {"ETag": f'"{name}"', "X-Repo-Commit": "0" * 40, "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{size}")
        self.end_headers()
        if send:
            self.wfile.write(content)
            Hub.sent += len(content) if name.endswith(".safetensors") else 0

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_inspect_of_a_repository_reads_the_header_only(tmp_path):
    """From a stand-in for the Hub on this machine; the command runs as a user's, with the network allowed."""
    Hub.sent = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    code = "from dspark_hf.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "inspect", "trainer/head", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    server.shutdown()
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    size = Path(fixture("deepspec_qwen3_vanilla"), "model.safetensors").stat().st_size
    assert (
        found["dialect"] == "deepspec"
        and found["parameters"] == inspect_head(fixture("deepspec_qwen3_vanilla")).parameters
    )
    assert 0 < Hub.sent < size / 3


# -- Rotary bases -----------------------------------------------------------------------------------------------


def test_a_contradicting_rotary_base_is_pointed_out_and_can_be_overridden(tmp_path, caplog):
    """Model-Optimizer can export a base that it did not train with."""
    case = case_of("modelopt_qwen3_dspark")
    shutil.copytree(case.folder / "head", tmp_path / "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    (tmp_path / "head" / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
    target, head = case.any_target(), DSparkHead.from_pretrained(tmp_path / "head")
    advice = rope_contradiction(head.config, target.config)
    assert "10000" in advice and "40000" in advice and "rope_parameters" in advice
    ids = torch.tensor([case.prompts[0]["input_ids"]])
    transformers_logging.get_logger("dspark_hf").addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        target.generate(input_ids=ids, assistant_model=head, max_new_tokens=2)
    assert advice in caplog.text
    again = DSparkHead.from_pretrained(
        tmp_path / "head", rope_parameters={"rope_type": "default", "rope_theta": 40000.0}
    )
    torch.testing.assert_close(again.rotary_emb.inv_freq, case.head().rotary_emb.inv_freq)
    assert rope_contradiction(again.config, target.config) is None


# -- Export as typed --------------------------------------------------------------------------------------------


def test_export_as_typed(tmp_path):
    name = "deepspec_qwen3_vanilla"
    output = run("export", fixture(name), "--to", "speculators", str(tmp_path), "--model", fixture(name, "target"))
    assert "lm_head.weight: in the file" in output
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == fixture(name, "target")
    assert "does not cap" in refuses(
        "export", fixture("deepspec_gemma4_vanilla"), "--to", "modelopt", str(tmp_path / "x")
    )
    assert not (tmp_path / "x").exists()


# -- Gemma 4 ----------------------------------------------------------------------------------------------------


def gemma(multimodal: bool, **kwargs):
    """An untrained Gemma 4 target with sliding and full layers, keys as values in the full ones."""
    torch.manual_seed(3)
    text = Gemma4TextConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "head_dim": 8,
            "global_head_dim": 16,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 64,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 6,
            "final_logit_softcapping": 30.0,
            "initializer_range": 0.5,
            "pad_token_id": 0,
            "eos_token_id": None,
            "bos_token_id": None,
            "tie_word_embeddings": False,
            "use_bidirectional_attention": "vision" if multimodal else None,
        }
        | kwargs
    )
    if not multimodal:
        return Gemma4ForCausalLM(text).eval()
    special = {name: 60 for name in ("image_token_id", "video_token_id", "audio_token_id")}
    special["tie_word_embeddings"] = False
    config = Gemma4Config(text_config=text, vision_config=None, audio_config=None, **special)
    return Gemma4ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("backbone", ["qwen3", "gemma4"])
def test_gemma4_targets(multimodal, backbone):
    """The language model inside is what the head reads; rows of different lengths decode as without a head."""
    target = gemma(multimodal)
    fields = {}
    if backbone == "gemma4":
        rope = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
        shared = {"head_dim": 16, "num_key_value_heads": 1, "attention_k_eq_v": True, "embedding_scale": 32**0.5}
        fields = {"backbone": "gemma4", "rope_parameters": rope, "final_logit_softcapping": 30.0} | shared
    head = tiny_head(target, num_hidden_layers=2, target_layer_ids=[-1, 0, 1, 2], **fields)
    ids = torch.tensor([[0, 0, 5, 9, 3], [7, 2, 11, 4, 8], [0, 1, 6, 6, 2]])
    kwargs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 24, "do_sample": False}
    plain = target.generate(**kwargs)
    output = target.generate(**kwargs, assistant_model=head, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain)
    assert len(set(plain[0, 5:].tolist())) > 3 and sum(output.dspark.verified) > 0


def test_a_scaled_embedding_does_not_stand_in_for_a_plain_one():
    """speculators heads for Gemma copy the table, not its scale."""
    target = gemma(False)
    head = tiny_head(target, borrow_embeddings=False)
    with torch.no_grad():
        head.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
    before = head.embed_block(torch.tensor([5]), head.share_embeddings(target))
    torch.testing.assert_close(before[0, 0], target.get_input_embeddings().weight[5])


def test_sliding_rules_are_told_apart():
    """The three ways of the trainers to look through a window, on a target whose text is longer."""
    target = tiny_target(vocab_size=32, sharpness=3)
    outputs = []
    for rule in ({}, {"window_counted_from": "block"}, {"sliding_is_causal": False}):
        head = tiny_head(target, layer_types=["sliding_attention"], sliding_window=3, use_sliding_window=True, **rule)
        prompt = {"input_ids": torch.tensor([[3, 4, 5, 9, 2, 8, 1, 7]]), "do_sample": False}
        text = target.generate(**prompt, max_new_tokens=16)
        output = target.generate(**prompt, max_new_tokens=16, assistant_model=head, return_dict_in_generate=True)
        assert torch.equal(output.sequences, text)
        outputs.append(output.dspark.confidence[0])
    assert outputs[0] != outputs[1] != outputs[2] != outputs[0]
