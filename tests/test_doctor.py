"""The doctor names the fault that was planted into a head, and the tau that mending it gives."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import case_of, tiny_head, tiny_target
from safetensors.torch import load_file, save_file
from shares import rest_slow
from test_cli import fails
from typer.testing import CliRunner

import dspark_hf
from dspark_hf import DSparkHead
from dspark_hf.checkpoints import native
from dspark_hf.cli import app
from dspark_hf.embedded import FOLDER
from dspark_hf.evaluation.bench import schedule_of
from dspark_hf.evaluation.doctor_comparison import differences
from dspark_hf.evaluation.doctor_trials import KnownText, Trials, altered, alternatives
from dspark_hf.evaluation.prompts import DEFAULT_PROMPTS, encode
from dspark_hf.scheduling.settings import HEAD_SETTINGS

NEW_TOKENS = 32
# What faults change of the embedded head: the key that is to be named, and those that have to go with it.
FAULTS = {
    "alignment": {"sample_from_anchor": False, "confidence_temperatures": None, "confidence_shifts": None},
    "rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "rotary scaling": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
    "embedding": {"embedding_scale": 192**0.5},
    "layers that slide": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4},
    "cap of logits": {"final_logit_softcapping": 1.0},
    "mask token": {"mask_token_id": 300},
    "norm": {"rms_norm_eps": 1.0},
    "activation": {"hidden_act": "sigmoid"},
    "window": {"draft_window": 2},
}


@pytest.fixture
def head(tmp_path) -> Path:
    """A copy of the embedded head."""
    return Path(shutil.copytree(FOLDER / "head", tmp_path / "head"))


def plant(folder: Path, keys: dict) -> None:
    """Change keys of a head's config, which becomes one of our own layout: others do not have all of them. Settings of
    drafting go where they are."""
    settings = {key: value for key, value in keys.items() if key in HEAD_SETTINGS}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = DSparkHead.config_class.from_pretrained(folder).own_keys() | keys
    config = {key: value for key, value in config.items() if key not in settings}
    (folder / "config.json").write_text(json.dumps(native.write_config(config)))


def doctor(head: Path, *options: str) -> tuple[int, str, dict]:
    """Exit status, output, and what --json wrote."""
    file = head / "findings.json"
    arguments = ["doctor", "--model", str(FOLDER / "target"), "--head", str(head), "--dtype", "float32"]
    arguments += ["--limit", "5", "--max-new-tokens", str(NEW_TOKENS), "--json", str(file), *options]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.output, json.loads(file.read_text())


def tau_of(head: DSparkHead) -> float:
    """Tokens a round of the prompts that the doctor takes, from decoding them."""
    target, _, tokenizer = dspark_hf.embedded_pair(torch.float32)
    inputs = encode(list(DEFAULT_PROMPTS[:5]), tokenizer, "cpu")
    limit = NEW_TOKENS + head.config.block_size + 1
    with schedule_of(head, "whole"):
        kwargs = {"max_new_tokens": limit, "assistant_model": head, "return_dict_in_generate": True}
        return target.generate(**inputs, **kwargs).dspark.tau


@cache
def healthy_tau() -> float:
    return tau_of(DSparkHead.from_pretrained(FOLDER / "head", dtype=torch.float32))


def test_nothing_is_wrong_with_the_embedded_pair(head):
    status, output, found = doctor(head)
    assert status == 0 and "nothing is wrong" in output
    assert found["findings"] == found["notes"] == []
    measured = found["measured"]
    assert len(measured["taus"]) == 5 and min(measured["taus"]) > 1 and measured["result"]["accepted_length"] > 2
    assert len(measured["result"]["positions"]) == 7 and measured["bytes"] < measured["target_bytes"]
    assert min(measured["seconds"], measured["plain_seconds"]) > 0


# Each examines a pair once and decodes with three heads; the others run with --all.
@pytest.mark.parametrize("fault", rest_slow(FAULTS, quick=["alignment"]))
def test_a_planted_key_is_named_first_with_the_tau_of_mending_it(fault, head):
    key = next(iter(FAULTS[fault]))
    plant(head, FAULTS[fault])
    status, output, found = doctor(head)
    first = found["findings"][0]
    assert status == 1 and first["name"] == key and f"1. {key} (" in output
    assert list(first["keys"])[0] == key and len(found["findings"]) == 1
    set_by = f"generation_config.{key} =" if key in HEAD_SETTINGS else f"from_pretrained(..., {key}="
    assert set_by in first["fix"]
    broken = DSparkHead.from_pretrained(head, dtype=torch.float32)
    mended = altered(broken, first["keys"])
    # Another mask token can do a little better on five prompts than the one that the head was trained with.
    assert tau_of(mended) == pytest.approx(first["tau"]) and first["tau"] > 0.999 * healthy_tau()
    assert first["weight"] == pytest.approx(first["tau"] / tau_of(broken)) and first["weight"] > 1.1


@pytest.mark.slow
def test_two_faults_are_both_named(head):
    plant(head, FAULTS["mask token"] | FAULTS["rotary scaling"])
    _, _, found = doctor(head)
    assert {finding["name"] for finding in found["findings"]} == {"mask_token_id", "rope_parameters"}


def test_settings_that_leave_drafts_out(head):
    (head / "generation_config.json").write_text(json.dumps({"num_assistant_tokens": 1}))
    status, _, found = doctor(head)
    [first] = found["findings"]
    assert status == 1 and first["name"] == "draft settings" and "num_assistant_tokens=1" in first["evidence"]
    assert first["tau"] == pytest.approx(found["measured"]["result"]["accepted_length"])


@pytest.mark.slow
def test_a_threshold_that_leaves_drafts_out(head):
    (head / "generation_config.json").write_text(json.dumps({"assistant_confidence_threshold": 0.99}))
    [first] = doctor(head)[2]["findings"]
    assert first["name"] == "draft settings" and "assistant_confidence_threshold=0.99" in first["evidence"]


def test_confidence_that_expects_too_little(head):
    plant(head, {"confidence_shifts": [-6.0] * 7})
    status, _, found = doctor(head)
    [first] = found["findings"]
    assert status == 1 and first["name"] == "confidence too low" and "dspark-hf calibrate" in first["fix"]


@pytest.mark.slow
def test_confidence_that_expects_too_much(head):
    """Of a head that drafts worse than ours, which comes too near to a whole block: without its Markov head."""
    plant(head, {"confidence_shifts": [6.0] * 7})
    tensors = load_file(head / "model.safetensors")
    tensors["markov_head.markov_w2.weight"].zero_()
    save_file(tensors, head / "model.safetensors", {"format": "pt"})
    status, _, found = doctor(head)
    [first] = found["findings"]
    assert status == 1 and first["name"] == "confidence too high" and "dspark-hf calibrate" in first["fix"]


@pytest.mark.slow
def test_weights_of_another_head(head):
    """No key mends it."""
    tensors = load_file(head / "model.safetensors")
    torch.manual_seed(0)
    shuffled = {name: tensor[torch.randperm(len(tensor))] for name, tensor in tensors.items()}
    save_file(shuffled, head / "model.safetensors", {"format": "pt"})
    status, _, found = doctor(head)
    [first] = found["findings"]
    assert status == 1 and first["name"] == "hardly any draft is accepted" and first["keys"] is None
    assert "trained for another model" in first["fix"]


def test_a_target_of_another_depth(head):
    plant(head, {"num_target_layers": 16})
    status, output, found = doctor(head)
    first = found["findings"][0]
    assert status == 1 and first["name"] == "another target" and "16 layers" in first["evidence"]
    assert first["weight"] is None and found["measured"] is None and "1. another target:" in output


@pytest.mark.slow
def test_less_than_it_was_published_with(head):
    results = json.loads((Path(__file__).parents[1] / "hub_cards" / "data" / "embedded_pair.json").read_text())
    (head / "eval_results.json").write_text(json.dumps(results))
    assert doctor(head)[2]["findings"] == []
    for one in results["results"]:
        one["accepted_length"] *= 2
    (head / "eval_results.json").write_text(json.dumps(results))
    status, output, found = doctor(head)
    [first] = found["findings"]
    assert status == 1 and first["name"] == "less than its card promises" and "kept, as published" in output


def test_few_prompts_are_refused():
    assert "at least 5" in fails("doctor", "--limit", "4")


def test_where_nothing_is_drafted_nothing_is_said(head):
    assert "Nothing was drafted" in fails(
        "doctor", "--model", str(one_token_target(head)), "--head", str(head), "--limit", "5"
    )


def one_token_target(head: Path) -> Path:
    """The embedded target, which ends with whatever it writes first."""
    folder = Path(shutil.copytree(FOLDER / "target", head.parent / "target"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": list(range(5, 4096))}))
    return folder


# -- Alternatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepspec_qwen3_vanilla", "speculators_qwen3_dspark", "zlab_dflash_qwen3"])
def test_rounds_of_known_texts_are_those_of_the_reference(name):
    case = case_of(name)
    texts = [KnownText(torch.tensor(p["generate_ids"]), len(p["input_ids"])) for p in case.prompts]
    committed = Trials(case.target(), texts).committed(case.head())
    for rounds, prompt in zip(committed, case.prompts, strict=True):
        # Their last round may go beyond the text.
        assert rounds[:-1] == prompt["acceptance_lengths"][: len(rounds) - 1] and len(rounds) > 5


def test_every_alternative_differs_and_can_be_loaded():
    target, embedded, tokenizer = dspark_hf.embedded_pair(torch.float32)
    sliding = {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8, "embedding_scale": 2.0}
    rope = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "hidden_act": "gelu"}
    head = altered(embedded, sliding | rope)
    found = list(alternatives(head, target, tokenizer, longest=600))
    names = {next(iter(one.keys)) for one in found}
    assert names == {
        *("sample_from_anchor", "rope_parameters", "target_layer_ids", "embedding_scale", "layer_types", "hidden_act"),
        *("sliding_is_causal", "window_counted_from", "mask_token_id", "block_size", "draft_window"),
    }
    assert [one.keys["draft_window"] for one in found if "draft_window" in one.keys] == [512]
    for one in found:
        twin = altered(head, one.keys)
        values = [(vars(own.config) | vars(own.generation_config)) for own in (twin, head)]
        assert any(values[0][key] != values[1][key] for key in one.keys), one


def test_what_differs_is_said():
    target = tiny_target()
    head = tiny_head(target, max_position_embeddings=16, target_name_or_path="someone/else")
    target.config._name_or_path, target.config.quantization_config = "someone/this", {"quant_method": "fp8"}
    target.generation_config.update(do_sample=True, temperature=0.6, repetition_penalty=1.1)
    tokenizer = dspark_hf.embedded_pair()[2]
    found = " ".join(differences(target, head, tokenizer, longest=20, promised=None))
    for part in ("quantised (fp8)", "someone/else", "temperature=0.6", "repetition_penalty=1.1", "16 positions"):
        assert part in found, part
    assert "chat template" not in found
