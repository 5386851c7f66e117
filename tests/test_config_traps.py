"""What trainers leave unsaid, say twice or say with another word: read as they mean it, or refused by name."""

import json
import shutil

import pytest
import torch
from conftest import case_of, tiny_head, tiny_target
from test_dialects import DIALECT, check_drafts, edit, loads_like

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.checkpoints import CheckpointError, dialect_of
from dspark_hf.checkpoints.export import export
from dspark_hf.scheduling import settings

# A case of every layout whose keys are said in their own places.
LAYOUTS = {
    "deepspec": "deepspec_qwen3_vanilla",
    "specforge": "specforge_qwen3_dspark",
    "modelopt": "modelopt_qwen3_dspark",
    "dflash": "zlab_dflash_qwen3",
    "speculators": "speculators_qwen3_dspark",
}
UNSAID = object()


@pytest.fixture
def copy(tmp_path):
    """Copies the head of a layout's case, with keys of its draft layers changed or left out."""

    def copy(layout: str, **changes):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case_of(LAYOUTS[layout]).folder / "head", folder)

        def change(config):
            section = config.get("transformer_layer_config", config)
            section.update(changes)
            for key in [key for key, value in changes.items() if value is UNSAID]:
                del section[key]

        edit(folder, change)
        return folder

    return copy


# -- Rotary embeddings ----------------------------------------------------------------------------------------------

ROPES = {
    "at the top": lambda theta: {"rope_theta": theta, "rope_parameters": UNSAID},
    "at the top, beside null": lambda theta: {"rope_theta": theta, "rope_parameters": None, "rope_scaling": None},
    "at the top, beside nothing": lambda theta: {"rope_theta": theta, "rope_parameters": {}, "rope_scaling": {}},
    "inside": lambda theta: {"rope_theta": UNSAID, "rope_parameters": {"rope_type": "default", "rope_theta": theta}},
    "inside, beside null": lambda theta: {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    },
    "inside without its type": lambda theta: {"rope_theta": UNSAID, "rope_parameters": {"rope_theta": theta}},
    "type inside, base at the top": lambda theta: {"rope_theta": theta, "rope_parameters": {"rope_type": "default"}},
    "in both": lambda theta: {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}},
}


@pytest.mark.parametrize("place", ROPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rotary_base_is_read_wherever_it_is(layout, place, copy):
    case = case_of(LAYOUTS[layout])
    whole = case.head()
    head = DSparkHead.from_pretrained(copy(layout, **ROPES[place](whole.config.rope_parameters["rope_theta"])))
    torch.testing.assert_close(head.rotary_emb.inv_freq, whole.rotary_emb.inv_freq)
    check_drafts(case, case.any_target(), head)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_old_and_new_names_of_a_scaled_rotary_embedding(layout, copy):
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    expected = {"rope_type": "yarn", "rope_theta": 5e5} | scaling
    for name in ("type", "rope_type"):
        folder = copy(layout, rope_theta=5e5, rope_scaling={name: "yarn"} | scaling, rope_parameters=None)
        config = DSparkConfig.from_pretrained(folder)
        assert config.rope_parameters == expected
    folder = copy(layout, rope_theta=5e5, rope_scaling={"type": "yarn"} | scaling, rope_parameters=expected)
    assert DSparkConfig.from_pretrained(folder).rope_parameters == expected


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_theta": 0, "rope_parameters": None}, "rope_parameters"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_parameters"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        (
            {
                "rope_theta": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "rope_scaling",
        ),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_embeddings_that_contradict_themselves(layout, changes, key, copy):
    with pytest.raises(CheckpointError) as caught:
        DSparkHead.from_pretrained(copy(layout, **changes))
    assert key in caught.value.key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rotary_base_at_all(layout, copy):
    """speculators leaves out what is the default of Qwen3's config class; elsewhere something is missing."""
    folder = copy(layout, rope_theta=None, rope_parameters=None)
    if layout == "speculators":
        assert DSparkConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 10000.0
        return
    with pytest.raises(CheckpointError, match="rope_theta"):
        DSparkConfig.from_pretrained(folder)


# -- Windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, UNSAID, 0, 512])
@pytest.mark.parametrize("types", [None, UNSAID, ["full_attention"] * 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_of_layers_that_do_not_slide(layout, types, window, copy):
    folder = copy(layout, sliding_window=window, layer_types=types, use_sliding_window=False)
    loads_like(folder, LAYOUTS[layout], sliding_window=None, layer_types=["full_attention"] * 2)


@pytest.mark.parametrize("window", [None, UNSAID, 0])
@pytest.mark.parametrize("layout", ["specforge", "dflash", "speculators"])
def test_sliding_layers_need_a_window(layout, window, copy):
    folder = copy(layout, sliding_window=window, layer_types=["sliding_attention", "full_attention"])
    if layout == "speculators" and window is UNSAID:
        # The default of Qwen3's config class, which may be left out there.
        assert DSparkConfig.from_pretrained(folder).sliding_window == 4096
        return
    with pytest.raises(CheckpointError, match="sliding_window"):
        DSparkHead.from_pretrained(folder)


@pytest.mark.parametrize("layout", ["specforge", "dflash", "speculators"])
def test_layers_that_slide_without_being_named(layout, copy):
    """As Qwen3's config class says it: from some layer on."""
    keys = {"layer_types": UNSAID, "use_sliding_window": True, "sliding_window": 12}
    config = DSparkConfig.from_pretrained(copy(layout, **keys, max_window_layers=1))
    assert config.layer_types == ["full_attention", "sliding_attention"] and config.sliding_window == 12
    config = DSparkConfig.from_pretrained(copy(layout, **keys, max_window_layers=28))
    assert config.layer_types == ["full_attention"] * 2 and config.sliding_window is None


@pytest.mark.parametrize("off", [None, UNSAID, 0, False])
def test_windows_of_model_optimizer(off, copy):
    folder = copy("modelopt")

    def change(config, **keys):
        config["dflash_config"].update({key: value for key, value in keys.items() if value is not UNSAID})

    edit(folder, lambda config: change(config, use_swa=off, swa_window_size=off))
    loads_like(folder, LAYOUTS["modelopt"], sliding_window=None)
    edit(folder, lambda config: change(config, use_swa=True))
    with pytest.raises(CheckpointError, match="swa_window_size|sliding_window"):
        DSparkHead.from_pretrained(folder)


# -- Alignment, names, lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [None, UNSAID])
@pytest.mark.parametrize("name", sorted(DIALECT))
def test_an_alignment_that_is_unsaid_is_the_trainers_own(name, said, tmp_path):
    case = case_of(name)
    folder = shutil.copytree(case.folder / "head", tmp_path / "head")

    def change(config):
        config.pop("sample_from_anchor", None)
        if said is None:
            config["sample_from_anchor"] = None

    edit(folder, change)
    head = DSparkHead.from_pretrained(folder)
    assert head.config.sample_from_anchor == case.head().config.sample_from_anchor == (name != "zlab_dflash_qwen3")
    check_drafts(case, case.any_target(), head)


def test_an_alignment_that_is_unsaid_in_speculators_dflash(tmp_path):
    case = case_of("zlab_dflash_qwen3")
    export(case.head(), "speculators", tmp_path, case.any_target())
    edit(tmp_path, lambda config: config.pop("sample_from_anchor"))
    assert json.loads((tmp_path / "config.json").read_text())["speculators_model_type"] == "dflash"
    check_drafts(case, case.any_target(), DSparkHead.from_pretrained(tmp_path))


@pytest.mark.parametrize("layout", ["deepspec", "dflash"])
def test_an_alignment_that_is_said_counts(layout, copy):
    folder = copy(layout, sample_from_anchor=layout == "dflash")
    assert DSparkHead.from_pretrained(folder).config.sample_from_anchor == (layout == "dflash")


@pytest.mark.parametrize("name", ["DSparkDraftModel", "DFlashDraftModel", "Qwen3DSparkModel"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_class_name_of_several_trainers(layout, name, copy):
    """Engines write over the class name so that their registries find it; the keys stay the trainer's. A plain DFlash
    head alone has none of its own beside a DSpark one: its name counts."""
    if layout == "dflash" and name != "DFlashDraftModel":
        pytest.skip("nothing but the name tells it")
    folder, case = copy(layout), case_of(LAYOUTS[layout])
    edit(folder, lambda config: config.update(architectures=[name]))
    assert layout == dialect_of(json.loads((folder / "config.json").read_text()), "here").NAME
    check_drafts(case, case.any_target(), DSparkHead.from_pretrained(folder))


def test_more_drafts_than_the_block_holds(vanilla, monkeypatch):
    """Are not made, which is said; those that are made are what they would be."""
    warnings = []
    monkeypatch.setattr(settings.logger, "warning_once", warnings.append)
    target, head, prompt = vanilla.target(), vanilla.head(), vanilla.expected["prompts"][0]
    kwargs = {"input_ids": torch.tensor([prompt["input_ids"]]), "max_new_tokens": 64, "do_sample": False}
    output = target.generate(**kwargs, assistant_model=head, num_assistant_tokens=64, return_dict_in_generate=True)
    committed = output.dspark.committed_lengths[0]
    assert committed[:-1] == prompt["acceptance_lengths"][: len(committed) - 1]
    assert len(warnings) == 1 and "num_assistant_tokens=64" in warnings[0] and f"{head.config.gamma}" in warnings[0]


# -- Shapes that are published --------------------------------------------------------------------------------------

SHAPES = {
    "8 taps, window 2048, block 8": {
        "target_layer_ids": [0, 1, 2, 3, 4, 5, 6, 7], "block_size": 8, "num_hidden_layers": 5,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"], "sliding_window": 2048,
    },
    "32,000 tokens, 3 layers, block 8": {"draft_vocab_size": 32_000, "num_hidden_layers": 3, "block_size": 8},
    "49,152 tokens": {"draft_vocab_size": 49_152},
    "block 3": {"block_size": 3, "num_hidden_layers": 5},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_published_heads(shape, tmp_path):
    fields = SHAPES[shape]
    target = tiny_target(vocab_size=65_536 if "draft_vocab_size" in fields else 64, num_hidden_layers=10, sharpness=3)
    head = tiny_head(target, window_counted_from="block", **fields)
    if head.config.draft_vocab_size:
        generator = torch.Generator().manual_seed(0)
        drafted = torch.randperm(65_536, generator=generator)[: head.config.draft_vocab_size].sort().values
        head.d2t.copy_(drafted - torch.arange(len(drafted)))
    export(head, "speculators", tmp_path, target)
    again = DSparkHead.from_pretrained(tmp_path)
    again.generation_config.num_assistant_tokens_schedule = "constant"
    for key, value in fields.items():
        assert getattr(again.config, key) == value
    ids = torch.randint(1, 64, (2, 12))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    output = target.generate(**kwargs, assistant_model=again, return_dict_in_generate=True)
    assert torch.equal(output.sequences, target.generate(**kwargs)) and min(output.dspark.verified) > 24
