"""Bad input: an error that names both sides and the fix, before the target has run."""

import json
import shutil

import pytest
import torch
from conftest import tiny_head, tiny_target
from safetensors.torch import load_file, save_file
from transformers import (
    CompileConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.generation import compatibility
from dspark_hf.generation.compatibility import check_inputs
from dspark_hf.generation.releases import CACHE

IDS = torch.tensor([[3, 4, 5]])


def message_of(target, head, error=ValueError, input_ids=IDS, **kwargs) -> str:
    """The error of a `generate` call, after checking that the target never ran."""
    calls = []
    handle = target.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error) as caught:
        target.generate(input_ids=input_ids, assistant_model=head, max_new_tokens=4, **kwargs)
    handle.remove()
    assert not calls
    return str(caught.value)


def test_head_for_another_hidden_size():
    message = message_of(tiny_target(hidden_size=48), tiny_head(tiny_target()))
    assert "hidden size 32" in message and "hidden size 48" in message and "Load the head" in message


def test_head_for_another_vocabulary():
    message = message_of(tiny_target(vocab_size=24), tiny_head(tiny_target(vocab_size=16)))
    assert "vocabulary of 16" in message and "vocabulary of 24" in message


def test_layer_ids_beyond_the_target():
    message = message_of(tiny_target(num_hidden_layers=2), tiny_head(tiny_target(num_hidden_layers=8)))
    assert "[1, 2, 3, 4, 5]" in message and "2 layers" in message


def test_head_for_another_depth():
    message = message_of(tiny_target(num_hidden_layers=9), tiny_head(tiny_target(num_hidden_layers=8)))
    assert "8 layers" in message and "has 9" in message


def test_encoder_decoder_target():
    config = T5Config(vocab_size=16, d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=32, decoder_start_token_id=0)
    message = message_of(T5ForConditionalGeneration(config), tiny_head(tiny_target()))
    assert "encoder-decoder" in message and "T5ForConditionalGeneration" in message
    with pytest.raises(ValueError, match="encoder-decoder"):
        DSparkConfig.from_target(config)


def test_beam_search():
    target = tiny_target()
    assert "beam" in message_of(target, tiny_head(target), num_beams=2).lower()


def test_settings_that_do_nothing_are_pointed_out(monkeypatch):
    target, warnings = tiny_target(), []
    monkeypatch.setattr(compatibility.logger, "warning_once", warnings.append)
    kwargs = {"input_ids": IDS, "max_new_tokens": 4, "assistant_model": tiny_head(target)}
    target.generate(**kwargs)
    assert not warnings
    target.generate(**kwargs, compile_config=CompileConfig())
    assert len(warnings) == 1 and "compile_config=" in warnings[0]


def test_a_lossy_mix():
    target = tiny_target()
    assert "assistant_ensemble_weight=0.5" in message_of(target, tiny_head(target), assistant_ensemble_weight=0.5)


def test_several_return_sequences():
    target = tiny_target()
    message = message_of(target, tiny_head(target), num_return_sequences=2, do_sample=True)
    assert "num_return_sequences" in message and "2" in message


def test_prompt_longer_than_the_positions():
    """A table of positions ends; rotary embeddings go on, see `test_targets.py`."""
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=32, n_layer=3, n_head=4, bos_token_id=None)
    target = GPT2LMHeadModel(config).eval()
    message = message_of(target, tiny_head(target), input_ids=torch.ones(1, 9, dtype=torch.long))
    assert "9 tokens" in message and "8 positions" in message and "truncation" in message


def test_prompt_without_tokens():
    target = tiny_target()
    ids = torch.tensor([[3, 4], [0, 0]])
    mask = torch.tensor([[1, 1], [0, 0]])
    assert "Prompt 1" in message_of(target, tiny_head(target), input_ids=ids, attention_mask=mask)


def test_padding_on_the_right():
    """Plain `generate` goes on behind the padding, with a warning."""
    target = tiny_target()
    ids, mask = torch.tensor([[3, 4, 5], [3, 4, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    message = message_of(target, tiny_head(target), input_ids=ids, attention_mask=mask)
    assert "Prompt 1" in message and "padding_side" in message


def test_a_cache_that_cannot_be_continued():
    target = tiny_target()
    cache = StaticCache(config=target.config, max_cache_len=32)
    target(input_ids=IDS[:, :2], **{CACHE: cache}, use_cache=True)
    message = message_of(target, tiny_head(target), **{CACHE: cache})
    assert "StaticCache" in message and "DynamicCache" in message


def test_a_cache_that_holds_the_whole_prompt():
    target = tiny_target()
    cache = target(input_ids=IDS, use_cache=True)[CACHE]
    message = message_of(target, tiny_head(target), **{CACHE: cache})
    assert "no tokens to go on from" in message and CACHE in message


def test_embeddings_instead_of_tokens():
    target = tiny_target()
    embeds = target.get_input_embeddings()(IDS)
    message = message_of(target, tiny_head(target), input_ids=None, inputs_embeds=embeds)
    assert "inputs_embeds" in message


def test_positions_that_do_not_count_the_tokens():
    target = tiny_target()
    message = message_of(target, tiny_head(target), position_ids=torch.tensor([[0, 1, 5]]))
    assert "position_ids" in message
    plain = target.generate(input_ids=IDS, max_new_tokens=4)
    given = {"position_ids": torch.tensor([[0, 1, 2]]), "assistant_model": tiny_head(target)}
    assert torch.equal(target.generate(input_ids=IDS, max_new_tokens=4, **given), plain)


def test_inputs_that_would_be_lost():
    with pytest.raises(ValueError, match="input_features"):
        check_inputs({"input_features": torch.zeros(1, 3, 4)})
    with pytest.raises(ValueError, match="past_of_tomorrow"):
        check_inputs({"past_of_tomorrow": StaticCache(config=tiny_target().config, max_cache_len=8)})
    passed_on = check_inputs({"token_type_ids": torch.zeros(1, 3), "output_router_logits": True, "logits_to_keep": 1})
    assert passed_on == {"output_router_logits": True}


@pytest.fixture
def folder(vanilla, tmp_path):
    copy = tmp_path / "head"
    shutil.copytree(vanilla.folder / "head", copy)
    return copy


def load_error(folder, error=ValueError) -> str:
    with pytest.raises(error) as caught:
        DSparkHead.from_pretrained(folder)
    return str(caught.value)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DELETE"}))


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in load_error(folder, OSError)


def test_missing_folder(tmp_path):
    assert "config.json" in load_error(tmp_path, OSError)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = load_error(folder)
    assert str(folder) in message and "Download" in message


def test_missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.self_attn.k_norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "layers.1.self_attn.k_norm.weight: found no tensor" in load_error(folder)


def test_left_over_tensor(folder):
    tensors = load_file(folder / "model.safetensors") | {"layers.7.mlp.up_proj.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = load_error(folder)
    assert "num_hidden_layers" in message and "found 2" in message and "expected 3" in message


def test_left_over_tensor_of_no_layer(folder):
    tensors = load_file(folder / "model.safetensors") | {"fc.bias": torch.zeros(64)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "fc.bias: found a tensor, expected no tensor of this name" in load_error(folder)


def test_tensor_of_another_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.weight"] = torch.zeros(64, 128)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = load_error(folder)
    assert "fc.weight" in message and "128" in message and "192" in message


def test_unknown_layout(folder):
    edit_config(folder, architectures=["SomethingElse"])
    message = load_error(folder)
    assert "SomethingElse" in message and "DeepSpec" in message


def test_a_whole_model_is_not_a_head(vanilla):
    message = load_error(vanilla.folder / "target")
    assert "Qwen3ForCausalLM" in message and "AutoModelForCausalLM" in message


@pytest.mark.parametrize("key", ["block_size", "mask_token_id", "markov_rank", "markov_head_type", "hidden_size"])
def test_incomplete_config(folder, key):
    edit_config(folder, **{key: "DELETE"})
    assert key in load_error(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"markov_head_type": "quadratic"}, "quadratic"),
        ({"markov_rank": -1}, "-1"),
        ({"block_size": 0}, "block_size"),
        ({"mask_token_id": 128}, "128"),
        ({"target_layer_ids": [2, 1]}, "increasing"),
        ({"target_layer_ids": [1, 2, 6]}, "num_target_layers 6"),
        ({"target_layer_ids": []}, "target_layer_ids"),
    ],
)
def test_contradictory_config(folder, changes, named):
    edit_config(folder, **changes)
    assert named in load_error(folder)


def test_config_without_target_layers():
    with pytest.raises(ValueError, match="from_target"):
        DSparkHead(DSparkConfig(vocab_size=16, hidden_size=32))


def test_from_target_checks_the_layers():
    with pytest.raises(ValueError, match="beyond a target of 4 layers"):
        DSparkConfig.from_target(Qwen3Config(num_hidden_layers=4), target_layer_ids=[1, 4])
