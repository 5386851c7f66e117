"""Config, checkpoint round trip, borrowed tables."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import case_of, cases, tiny_head, tiny_target
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, GPTNeoXConfig, LlamaConfig, Qwen3Config

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.checkpoints import CheckpointError
from dspark_hf.scheduling.settings import DRAFT_SETTINGS

# Published in the layout that `save_pretrained` writes.
DEEPSPEC = [name for name in cases() if name.startswith("deepspec")]


@pytest.mark.parametrize("name", DEEPSPEC)
def test_round_trip_keeps_every_byte(name, tmp_path):
    folder = case_of(name).folder / "head"
    DSparkHead.from_pretrained(folder).save_pretrained(tmp_path)
    check_same_files(folder, tmp_path)


@pytest.mark.parametrize("name", DEEPSPEC)
def test_round_trip_after_copies_were_freed(name, tmp_path):
    """Copies of the target's tables are freed when they equal it, and written back all the same."""
    case = case_of(name)
    target, head = case.any_target(), case.head()
    before = head.num_parameters()
    embeddings = head.share_embeddings(target)
    assert head.embed_tokens is None and embeddings.embed is target.get_input_embeddings()
    assert head.lm_head is None and embeddings.logits.module is target.get_output_embeddings()
    assert before - head.num_parameters() == 2 * head.config.vocab_size * head.config.hidden_size
    head.save_pretrained(tmp_path)
    check_same_files(case.folder / "head", tmp_path)


def check_same_files(expected, found):
    old, new = (load_file(folder / "model.safetensors") for folder in (expected, found))
    assert old.keys() == new.keys()
    for name in old:
        assert old[name].dtype == new[name].dtype and torch.equal(old[name], new[name]), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (expected, found))
    for config in (old, new):
        del config["transformers_version"]
        # Left between the variants by layer type by one version of transformers; they mean nothing.
        if "full_attention" in config["rope_parameters"]:
            for stray in ("rope_theta", "rope_type"):
                config["rope_parameters"].pop(stray, None)
    assert new == old


def test_copies_that_differ_stay(vanilla):
    target, head = vanilla.target(), vanilla.head()
    with torch.no_grad():
        head.lm_head.weight[0, 0] += 1
    embeddings = head.share_embeddings(target)
    assert embeddings.logits.module is head.lm_head
    assert embeddings.embed is target.get_input_embeddings()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(vanilla, dtype):
    target = vanilla.target().to(dtype)
    head = DSparkHead.from_pretrained(vanilla.folder / "head", dtype=dtype)
    assert head.dtype == dtype and head.fc.weight.dtype == dtype
    ids = torch.tensor([vanilla.expected["prompts"][1]["input_ids"]])
    output = target.generate(
        input_ids=ids, assistant_model=head, max_new_tokens=24, do_sample=False, return_dict_in_generate=True
    )
    assert output.sequences.shape == (1, ids.shape[1] + 24) and output.dspark.tau > 2


def test_head_and_target_of_different_dtypes(vanilla):
    target = vanilla.target()
    head = DSparkHead.from_pretrained(vanilla.folder / "head", dtype=torch.bfloat16)
    prompt = vanilla.expected["prompts"][1]
    ids = torch.tensor([prompt["input_ids"]])
    sequences = target.generate(input_ids=ids, assistant_model=head, max_new_tokens=24, do_sample=False)
    assert sequences[0].tolist() == prompt["generate_ids"][: sequences.shape[1]]


def test_device_map(vanilla):
    head = DSparkHead.from_pretrained(vanilla.folder / "head", device_map="cpu")
    assert head.device == torch.device("cpu")


def test_sharded_checkpoint(vanilla, tmp_path):
    vanilla.head().save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = DSparkHead.from_pretrained(tmp_path)
    for (name, a), b in zip(vanilla.head().state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_methods_for_files_are_those_of_any_class(vanilla, monkeypatch):
    """Though they are put onto it from above: what a subclass inherits, `AutoModel` calls and pickle finds."""

    class Mine(DSparkHead):
        pass

    folder = vanilla.folder / "head"
    loaded = Mine.from_pretrained(folder)
    assert type(loaded) is Mine and isinstance(loaded, DSparkHead)
    monkeypatch.setattr(AutoModel, "_model_mapping", {DSparkConfig: DSparkHead})
    config = DSparkConfig.from_pretrained(folder)
    found = AutoModel.from_pretrained(folder, config=config)
    assert type(found) is DSparkHead
    again = pickle.loads(pickle.dumps(vanilla.head()))
    load, save = pickle.loads(pickle.dumps((DSparkHead.from_pretrained, again.save_pretrained)))
    assert load == DSparkHead.from_pretrained and save.__func__ is DSparkHead.save_pretrained
    for head in (loaded, found, again):
        assert head.state_dict().keys() == vanilla.head().state_dict().keys()
        assert all(torch.equal(head.state_dict()[name], own) for name, own in vanilla.head().state_dict().items())


def test_fresh_head_borrows_and_round_trips(tmp_path):
    target = tiny_target(vocab_size=32)
    head = tiny_head(target)
    assert head.embed_tokens is None and head.lm_head is None
    head.save_pretrained(tmp_path)
    again = DSparkHead.from_pretrained(tmp_path)
    # DeepSpec's layout, in which it is written, demands to know how it was trained.
    assert again.config.num_anchors == 512
    provenance = {"_name_or_path": None, "architectures": None, "num_anchors": None}
    assert again.config.to_dict() | provenance == head.config.to_dict() | provenance
    ids = torch.tensor([[3, 4, 5]])
    outputs = [
        target.generate(input_ids=ids, assistant_model=h, max_new_tokens=12, return_dict_in_generate=True)
        for h in (head, again)
    ]
    assert outputs[0].dspark.committed_lengths == outputs[1].dspark.committed_lengths


def test_from_target_defaults():
    config = DSparkConfig.from_target(Qwen3Config(num_hidden_layers=36))
    assert config.target_layer_ids == [1, 9, 17, 25, 33]
    assert (config.block_size, config.num_hidden_layers, config.markov_rank) == (7, 5, 256)
    assert config.mask_token_id == config.vocab_size - 1


@pytest.mark.parametrize(
    "target",
    [
        LlamaConfig(num_hidden_layers=2, vocab_size=100, eos_token_id=99),
        GPTNeoXConfig(num_hidden_layers=7, vocab_size=100, hidden_size=64, num_attention_heads=4),
        Qwen3Config(num_hidden_layers=1, vocab_size=100),
    ],
)
def test_from_target_of_any_decoder(target):
    config = DSparkConfig.from_target(target, num_hidden_layers=2, markov_rank=4)
    assert config.hidden_size == target.hidden_size and config.vocab_size == target.vocab_size
    assert config.mask_token_id not in (target.eos_token_id, target.pad_token_id)
    assert config.target_layer_ids[0] >= 0 and config.target_layer_ids[-1] < target.num_hidden_layers


def test_from_target_options():
    config = DSparkConfig.from_target(
        Qwen3Config(), block_size=3, markov_head_type="rnn", mask_token_id=5, enable_confidence_head=False
    )
    assert config.block_size == 3 and config.markov_head_type == "rnn" and config.mask_token_id == 5
    assert not config.enable_confidence_head


def test_published_config_names_the_layout(vanilla, tmp_path):
    """Other engines recognise the folder: transformers itself reads the config as the Qwen3 it says it is."""
    vanilla.head().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "qwen3"
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3DSparkModel"]


# -- How a head drafts -------------------------------------------------------------------------------------------


def settings_of(head: DSparkHead) -> list:
    return [getattr(head.generation_config, key) for key in DRAFT_SETTINGS]


def test_draft_settings_survive_saving(vanilla, tmp_path):
    head = DSparkHead.from_pretrained(vanilla.folder / "head")
    fresh = settings_of(head)
    head.generation_config.update(num_assistant_tokens=2, assistant_confidence_threshold=0.3)
    head.save_pretrained(tmp_path)
    assert settings_of(DSparkHead.from_pretrained(tmp_path)) == [2, "load", 0.3]
    head.generation_config.update(num_assistant_tokens=head.config.gamma, assistant_confidence_threshold=None)
    head.save_pretrained(tmp_path)
    assert settings_of(DSparkHead.from_pretrained(tmp_path)) == fresh == [head.config.gamma, "load", None]
    assert not (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("name", cases())
def test_draft_settings_beside_a_head_of_any_layout(name, tmp_path):
    """The file may be a copy of the target's: what it says about text is not about the head."""
    shutil.copytree(case_of(name).folder / "head", tmp_path, dirs_exist_ok=True)
    said = {"num_assistant_tokens": 3, "temperature": 0.6, "do_sample": True, "eos_token_id": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    head, _ = DSparkHead.from_pretrained(tmp_path, output_loading_info=True)
    assert settings_of(head) == [3, "load", None] and head.generation_config.eos_token_id is None


def test_draft_settings_that_are_no_settings(vanilla, tmp_path):
    shutil.copytree(vanilla.folder / "head", tmp_path, dirs_exist_ok=True)
    for text in ("{", "[]"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="generation_config.json"):
            DSparkHead.from_pretrained(tmp_path)
