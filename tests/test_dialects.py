"""Layouts of published heads: read, written, and refused where they are malformed."""

import json
import pickle
import random
import shutil

import pytest
import torch
from conftest import biases, case_of, cases, tiny_head, tiny_target
from safetensors.torch import load_file, save_file
from test_shared_embeddings import Packed, model_of

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.checkpoints import CannotExpress, CheckpointError, dialect_of
from dspark_hf.checkpoints.export import LAYOUTS, export
from dspark_hf.checkpoints.schema import lookup

DIALECT = {
    "deepspec_gemma4_vanilla": "deepspec",
    "deepspec_qwen3_dflash": "deepspec",
    "deepspec_qwen3_gated": "deepspec",
    "deepspec_qwen3_rnn": "deepspec",
    "deepspec_qwen3_vanilla": "deepspec",
    "modelopt_qwen3_dspark": "modelopt",
    "specforge_qwen3_dspark": "specforge",
    "speculators_qwen3_dspark": "speculators",
    "speculators_qwen3_dspark_swa": "speculators",
    "zlab_dflash_qwen3": "dflash",
}
# Why a head has no place in a layout.
REFUSED = {
    ("deepspec_gemma4_vanilla", "speculators"): "Qwen3 draft layers only",
    ("deepspec_gemma4_vanilla", "specforge"): "Qwen3 draft layers only|does not cap",
    ("deepspec_gemma4_vanilla", "modelopt"): "Qwen3 draft layers only|does not cap",
    ("deepspec_qwen3_dflash", "modelopt"): "always has a sequential head",
    ("deepspec_qwen3_gated", "modelopt"): "always sees the previous token",
    ("speculators_qwen3_dspark", "deepspec"): "whole vocabulary",
    ("speculators_qwen3_dspark", "specforge"): "whole vocabulary",
    ("speculators_qwen3_dspark", "modelopt"): "whole vocabulary",
    ("speculators_qwen3_dspark_swa", "deepspec"): "no window",
    ("speculators_qwen3_dspark_swa", "specforge"): "counted from elsewhere",
    ("speculators_qwen3_dspark_swa", "modelopt"): "look at the block|no window|counted",
    ("zlab_dflash_qwen3", "deepspec"): "first prediction",
    **{(name, "deepseek_v4"): "its stages are layers of DeepSeek V4" for name in DIALECT},
}
# Layouts that hold heads of any target; see test_deepseek_v4.py for the other.
GENERAL = [name for name in LAYOUTS if name != "deepseek_v4"]


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def edit(folder, change) -> None:
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def copy(tmp_path):
    """Copies the head of a case."""

    def copy(name: str):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case_of(name).folder / "head", folder)
        return folder

    return copy


@pytest.mark.parametrize("name", DIALECT)
def test_recognised(name):
    published = config_of(case_of(name).folder / "head")
    assert DIALECT[name] == dialect_of(published, name).NAME
    assert set(DIALECT) <= set(cases())


# -- Writing ----------------------------------------------------------------------------------------------------


def check_drafts(case, target, head) -> None:
    """The head drafts what the reference drafted."""
    starts = case.tensors["prompt1.rounds.start"].tolist()
    assert case.drafts(1, starts, target, head) == case.tensors["prompt1.rounds.draft_tokens"].tolist()


@torch.no_grad()
def first_block(target, head, prompt) -> torch.Tensor:
    """Logits of a block behind random target states."""
    from dspark_hf.generation.drafting import Drafter

    generator = torch.Generator().manual_seed(0)
    width = len(head.config.target_layer_ids) * head.config.hidden_size
    drafter = Drafter(head, target, 1)
    drafter.append(torch.randn(1, 20, width, generator=generator), [20])
    anchor = torch.tensor([prompt["input_ids"][0]])
    hidden = drafter._hidden(anchor, None, *drafter.take(None))
    sampler = lambda logits: (logits.argmax(-1), logits)  # noqa: E731
    return head.sample_block(hidden, anchor, drafter.embeddings, head.config.gamma, sampler).logits


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("name", DIALECT)
def test_export_and_back(name, to, tmp_path):
    case = case_of(name)
    head, target, prompt = case.head(), case.any_target(), case.prompts[1]
    if (name, to) in REFUSED:
        with pytest.raises(CannotExpress, match=REFUSED[name, to]):
            export(head, to, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    for folder, given in ((tmp_path / "alone", None), (tmp_path / "beside", target)):
        export(head, to, folder, given)
        again = DSparkHead.from_pretrained(folder)
        torch.testing.assert_close(first_block(target, again, prompt), first_block(target, head, prompt))
        check_drafts(case, target, again)


@pytest.mark.parametrize("name", [name for name in DIALECT if name != "zlab_dflash_qwen3"])
def test_a_layout_is_written_as_its_trainer_writes_it(name, tmp_path):
    """Key by key and tensor by tensor the published files."""
    case = case_of(name)
    export(case.head(), DIALECT[name], tmp_path)
    expected, found = config_of(case.folder / "head"), config_of(tmp_path)
    for config in (expected, found):
        config.pop("transformers_version", None)
    if name == "deepspec_gemma4_vanilla":
        # Left there by one version of transformers; they mean nothing.
        del expected["rope_parameters"]["rope_theta"], expected["rope_parameters"]["rope_type"]
    assert found == expected
    old, new = (load_file(folder / "model.safetensors") for folder in (case.folder / "head", tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in old)


def test_plain_dflash_is_written_as_z_lab_does(tmp_path):
    case = case_of("zlab_dflash_qwen3")
    export(case.head(), "specforge", tmp_path)
    expected, found = config_of(case.folder / "head"), config_of(tmp_path)
    del expected["transformers_version"], found["transformers_version"]
    assert found == expected


def test_tables_that_differ_cannot_be_left_to_the_target(tmp_path):
    case = case_of("deepspec_qwen3_vanilla")
    head, target = case.head(), case.any_target()
    with torch.no_grad():
        head.lm_head.weight[0, 0] += 1
    with pytest.raises(CannotExpress, match="lm_head.weight differs"):
        export(head, "specforge", tmp_path, target)


def test_a_borrowing_head_gets_its_targets_tables(tmp_path):
    case = case_of("modelopt_qwen3_dspark")
    target = case.any_target()
    export(case.head(), "deepspec", tmp_path, target)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], target.get_input_embeddings().weight)
    assert torch.equal(tensors["lm_head.weight"], target.get_output_embeddings().weight)
    assert "borrow_embeddings" not in config_of(tmp_path)


QWEN3_READER = ["architectures", "model_type", "block_size", "num_target_layers", "hidden_size", "num_hidden_layers"]
QWEN3_READER += ["vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"]
SECTION = ["dflash_config.mask_token_id", "dflash_config.target_layer_ids"]
# What each layout's own reader demands of any head, of one with a sequential head and of one with a confidence head.
DEMANDED = {
    "deepspec": (
        [*QWEN3_READER, "num_anchors", "target_layer_ids", "mask_token_id", "markov_rank", "enable_confidence_head"],
        ["markov_head_type"],
        ["confidence_head_with_markov"],
    ),
    "specforge": (
        [*QWEN3_READER, *SECTION, "dflash_config.projector_type", "dflash_config.attention_mode", "rope_theta"],
        ["dflash_config.markov_rank", "dflash_config.markov_head_type"],
        ["dflash_config.enable_confidence_head", "dflash_config.confidence_head_with_markov"],
    ),
    "modelopt": (
        [*QWEN3_READER, *SECTION, "dflash_config.projector_type", "dflash_config.shift_label", "rope_theta"],
        ["dflash_config.markov_rank", "dflash_config.markov_head_type"],
        ["dflash_config.use_confidence_head"],
    ),
    "speculators": (
        ["speculators_model_type", "speculators_config.algorithm", "speculators_config.verifier", "block_size"]
        + ["mask_token_id", "aux_hidden_state_layer_ids", "draft_vocab_size", "sample_from_anchor", "markov_rank"]
        + [f"transformer_layer_config.{key}" for key in QWEN3_READER[4:]]
        + ["transformer_layer_config.model_type", "enable_confidence_head"],
        ["markov_head_type"],
        ["confidence_head_with_markov"],
    ),
}


@pytest.mark.parametrize("fields", [{}, {"markov_rank": 0}, {"enable_confidence_head": False}], ids=str)
@pytest.mark.parametrize("to", GENERAL)
def test_a_fresh_head_is_written_with_every_key_that_is_demanded(to, fields, tmp_path):
    target = tiny_target()
    head = tiny_head(target, **fields)
    if (to, head.config.markov_rank) == ("modelopt", 0):
        pytest.skip("this layout always has a sequential head")
    export(head, to, tmp_path, target)
    always, with_markov, with_confidence = DEMANDED[to]
    demanded = always + (with_markov if head.config.markov_rank else [])
    demanded += with_confidence if head.config.enable_confidence_head else []
    published = config_of(tmp_path)
    assert [key for key in demanded if lookup(published, key) is None] == []


def test_a_head_for_scaled_logits_is_for_this_project_only(tmp_path):
    """Elsewhere it would draft from logits that are eight times as sharp."""
    target = model_of("Granite", logits_scaling=8.0)
    head = tiny_head(target)
    for to in LAYOUTS:
        with pytest.raises(CannotExpress, match="GraniteForCausalLM scales or caps"):
            export(head, to, tmp_path, target)
    head.save_pretrained(tmp_path)
    assert DSparkHead.from_pretrained(tmp_path).config.scales_as_target


def test_tables_of_another_size_or_quantised_are_not_exported(tmp_path):
    target = tiny_target()
    head = tiny_head(target)
    with pytest.raises(ValueError, match="vocabulary of 16, its target has a vocabulary of 18"):
        export(head, "deepspec", tmp_path, tiny_target(vocab_size=18))
    target.lm_head = Packed(target.lm_head)
    with pytest.raises(ValueError, match="lm_head.weight is quantised"):
        export(head, "deepspec", tmp_path, target)


@pytest.mark.parametrize("name", ["speculators_qwen3_dspark", "speculators_qwen3_dspark_swa", "zlab_dflash_qwen3"])
def test_save_pretrained_of_what_deepspec_cannot_express(name, tmp_path):
    case = case_of(name)
    head, target = case.head(), case.any_target()
    head.save_pretrained(tmp_path)
    assert config_of(tmp_path)["model_type"] == "dspark"
    again = DSparkHead.from_pretrained(tmp_path)
    check_drafts(case, target, again)


# -- Variants ---------------------------------------------------------------------------------------------------


def loads_like(folder, name: str, **changes) -> None:
    """The folder's head equals the case's but for the given keys of its config."""
    head, case = DSparkHead.from_pretrained(folder), case_of(name)
    expected = case.head()
    for key, value in changes.items():
        assert getattr(head.config, key) == value, key
    assert head.state_dict().keys() == expected.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(head.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_specforge_rewritten_for_serving(copy):
    folder = copy("specforge_qwen3_dspark")

    def change(config):
        config["architectures"] = ["Qwen3DSparkModel"]
        del config["auto_map"]
        section = config["dflash_config"]
        for key in ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"):
            config[key] = section.pop(key)

    edit(folder, change)
    loads_like(folder, "specforge_qwen3_dspark", markov_rank=16, confidence_head_with_markov=True)


def test_specforge_with_nested_heads(copy):
    folder = copy("specforge_qwen3_dspark")
    tensors = load_file(folder / "model.safetensors")
    nested = {(f"logit_head.{k}" if k.startswith(("markov", "confidence")) else k): v for k, v in tensors.items()}
    save_file(nested, folder / "model.safetensors")
    loads_like(folder, "specforge_qwen3_dspark")


@pytest.mark.parametrize("name", ["specforge_qwen3_dspark", "zlab_dflash_qwen3"])
def test_layer_ids_that_go_without_saying(copy, name):
    folder = copy(name)
    edit(folder, lambda config: config["dflash_config"].pop("target_layer_ids"))
    config = DSparkConfig.from_pretrained(folder)
    assert config.target_layer_ids == [1, 3]
    edit(folder, lambda config: config.update(num_hidden_layers=1, layer_types=["full_attention"]))
    assert DSparkConfig.from_pretrained(folder).target_layer_ids == [3]


def test_block_size_inside_the_section(copy):
    folder = copy("zlab_dflash_qwen3")
    edit(folder, lambda config: config["dflash_config"].update(block_size=config.pop("block_size")))
    loads_like(folder, "zlab_dflash_qwen3", block_size=8, gamma=7)


def test_speculators_without_tables(copy):
    folder, case = copy("speculators_qwen3_dspark"), case_of("speculators_qwen3_dspark")
    tensors = load_file(folder / "model.safetensors")
    for missing in (["embed_tokens.weight"], ["lm_head.weight"]):
        for name in missing:
            del tensors[name]
        save_file(tensors, folder / "model.safetensors")
        head, target = DSparkHead.from_pretrained(folder), case.any_target()
        check_drafts(case, target, head)


def test_speculators_that_predict_behind_the_anchor(copy):
    """The rnn state takes a step at the unused row too."""
    folder, case = copy("speculators_qwen3_dspark_swa"), case_of("speculators_qwen3_dspark_swa")
    edit(folder, lambda config: config.update(sample_from_anchor=False))
    head, target = DSparkHead.from_pretrained(folder), case.any_target()
    assert (head.config.block_size, head.config.gamma) == (8, 7)
    embeddings, generator = head.share_embeddings(target), torch.Generator().manual_seed(0)
    hidden, anchor = torch.randn(1, 8, 64, generator=generator), torch.tensor([9])
    with torch.no_grad():
        block = head.sample_block(hidden, anchor, embeddings, 7, lambda logits: (logits.argmax(-1), logits))
        previous = torch.cat([anchor, anchor, block.tokens[0, :-1]])[None]
        expected = head.base_logits(hidden, embeddings) + biases(head, hidden, previous)
    torch.testing.assert_close(block.logits, expected[:, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_keep_their_type(dtype):
    head = DSparkHead.from_pretrained(case_of("speculators_qwen3_dspark").folder / "head", dtype=dtype)
    assert head.d2t.dtype == torch.int64 and head.fc.weight.dtype == dtype
    assert torch.equal(head.d2t, case_of("speculators_qwen3_dspark").head().d2t)


# -- Malformed heads --------------------------------------------------------------------------------------------

REQUIRED = {
    "deepspec": ["block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "vocab_size", "hidden_size",
                 "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "markov_rank"],
    "specforge": ["block_size", "dflash_config", "dflash_config.mask_token_id", "num_target_layers", "hidden_size",
                  "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size"],
    "modelopt": ["block_size", "dflash_config.mask_token_id", "dflash_config.markov_rank", "rope_theta", "hidden_size",
                 "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "num_target_layers"],
    "dflash": ["block_size", "dflash_config.mask_token_id", "num_target_layers", "hidden_size", "num_hidden_layers",
               "num_key_value_heads", "head_dim", "vocab_size"],
    "speculators": ["block_size", "mask_token_id", "aux_hidden_state_layer_ids", "markov_rank", "markov_head_type",
                    "transformer_layer_config", "transformer_layer_config.hidden_size",
                    "transformer_layer_config.num_hidden_layers", "transformer_layer_config.vocab_size"],
}  # fmt: skip
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def section_of(config: dict, key: str) -> tuple[dict, str]:
    """Where a dotted path, or a key of the draft layers, lies."""
    if "." in key:
        outer, key = key.split(".")
        return config[outer], key
    nested = config.get("transformer_layer_config", {})
    return (nested, key) if key in nested else (config, key)


def missing_key(folder, dialect, draw):
    def change(config):
        section, key = section_of(config, draw.choice(REQUIRED[dialect]))
        del section[key]

    edit(folder, change)


def wrong_type(folder, dialect, draw):
    def change(config):
        section, key = section_of(config, draw.choice([*REQUIRED[dialect], "rms_norm_eps", "rope_parameters"]))
        if key == "rope_parameters" and key not in section:
            key = "rope_theta"
        # A width of 2.5 is none, a base of 2.5 is one.
        section[key] = draw.choice(["seven", [[1]], {"a": 1}, -3, True, -0.5])

    edit(folder, change)


def contradiction(folder, dialect, draw):
    def layers_beyond(config):
        for path in ("target_layer_ids", "aux_hidden_state_layer_ids"):
            for section in (config, config.get("dflash_config", {})):
                if path in section:
                    section[path] = draw.choice([section[path][::-1], [-7, 1], section[path] * 2, []])

    def too_many(config):
        section, key = section_of(config, "num_hidden_layers")
        section[key] = draw.choice([1, 3, 10**9])

    def other_width(config):
        # Nothing in a plain DFlash file is as long as the vocabulary.
        section, key = section_of(config, draw.choice(WIDTHS[: -1 if dialect == "dflash" else None]))
        section[key] *= 2

    def no_such_head(config):
        for section in (config, config.get("dflash_config", {})):
            if section.get("markov_head_type"):
                section["markov_head_type"] = "quadratic"
                return
        config["layer_types"] = ["no_attention", "full_attention"]

    def heads_that_do_not_divide(config):
        section, key = section_of(config, "num_key_value_heads")
        section[key] = 3
        if "num_global_key_value_heads" in config:
            config["num_global_key_value_heads"] = 3

    def mask_outside(config):
        config.get("dflash_config", config)["mask_token_id"] = 10_000

    def windows_without_size(config):
        section, key = section_of(config, "layer_types")
        section[key] = ["sliding_attention", "full_attention"]
        section["sliding_window"] = None

    changes = [layers_beyond, too_many, other_width, no_such_head, heads_that_do_not_divide, mask_outside]
    edit(folder, draw.choice([*changes, windows_without_size]))


def layer_beyond_the_target(folder, dialect, draw):
    def change(config):
        if dialect == "speculators":
            # How many layers the target has is not in the file: generation refuses ids that are too large.
            config["aux_hidden_state_layer_ids"] = [-1, 3]
        else:
            config.get("dflash_config", config)["target_layer_ids"] = [1, 99]

    edit(folder, change)


def unknown_architecture(folder, dialect, draw):
    def change(config):
        name = draw.choice(["LlamaForCausalLM", "Eagle3", "DFlash2DraftModel", "", "Qwen3DSparkModelX"])
        config["architectures"] = [name]
        config.pop("dflash_config", None)
        if "speculators_model_type" in config:
            config["speculators_model_type"] = draw.choice(["eagle3", "mtp", None])

    edit(folder, change)


def foreign_code(folder, dialect, draw):
    evil = f"open({str(folder / 'executed')!r}, 'w')\n"
    (folder / "evil.py").write_text(evil)
    (folder / "config.py").write_text(evil)
    classes = ["evil.Model", "someone/evil--modeling.Model"]
    edit(
        folder, lambda config: config.update(auto_map={"AutoModel": draw.choice(classes), "AutoConfig": "evil.Config"})
    )


def pickled(folder, dialect, draw):
    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "executed"), "w"))

    (folder / "model.safetensors").unlink()
    name = draw.choice(["pytorch_model.bin", "model.safetensors"])
    (folder / name).write_bytes(pickle.dumps({"fc.weight": Evil()}))


def truncated(folder, dialect, draw):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: draw.choice([0, 3, 8, 100, len(content) // 2, len(content) - 1])])


def broken_header(folder, dialect, draw):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[draw.choice([0, 7, 8, 9])] = 0xFF
    path.write_bytes(content)


def broken_json(folder, dialect, draw):
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(draw.choice([text[: len(text) // 2], "[1, 2]", "", "null", '"head"']))


def tensors_changed(folder, dialect, draw):
    tensors = load_file(folder / "model.safetensors")
    name = draw.choice(sorted(tensors))
    if dialect == "speculators" and name in ("embed_tokens.weight", "lm_head.weight", "t2d"):
        name = "fc.weight"
    kind = draw.choice(["missing", "shape", "dtype", "renamed", "left over"])
    if kind == "shape":
        tensors[name] = torch.zeros(*tensors[name].shape, 2, dtype=tensors[name].dtype)
    elif kind == "dtype":
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)
    elif kind == "left over":
        tensors["extra.weight"] = torch.zeros(2)
    else:
        tensor = tensors.pop(name)
        if kind == "renamed":
            tensors[f"{name}_2"] = tensor
    save_file(tensors, folder / "model.safetensors")


def wrong_maps(folder, dialect, draw):
    if "d2t" not in (tensors := load_file(folder / "model.safetensors")):
        return tensors_changed(folder, dialect, draw)
    change = draw.choice(["beyond", "falling", "mask"])
    if change == "beyond":
        tensors["d2t"][-1] += 1000
    elif change == "falling":
        tensors["d2t"][0] += 5
    else:
        tensors["t2d"] = ~tensors["t2d"]
    save_file(tensors, folder / "model.safetensors")


MUTATIONS = [
    missing_key,
    wrong_type,
    contradiction,
    layer_beyond_the_target,
    unknown_architecture,
    foreign_code,
    pickled,
    truncated,
    broken_header,
    broken_json,
    tensors_changed,
    wrong_maps,
]


@pytest.mark.parametrize("seed", range(240))
def test_malformed_heads(copy, seed, monkeypatch):
    """One typed error that names the file, the key, what was found and what was expected; before any tensor is read."""
    from transformers import PreTrainedModel

    draw, mutate = random.Random(seed), MUTATIONS[seed % len(MUTATIONS)]
    name = sorted(DIALECT)[seed // len(MUTATIONS) % len(DIALECT)]
    folder = copy(name)
    mutate(folder, DIALECT[name], draw)
    loaded = []
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *args, **kwargs: loaded.append(args))
    with pytest.raises(CheckpointError) as caught:
        DSparkHead.from_pretrained(folder)
    error = caught.value
    assert str(folder) in error.file and error.key and error.found is not None and error.expected
    assert all(part in str(error) for part in (error.file, error.key, str(error.found), error.expected))
    assert not loaded and not (folder / "executed").exists()
