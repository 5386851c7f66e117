"""Prompts with pictures: targets of image and text, untrained and tiny, write with a head what they write without."""

from unittest import mock

import pytest
import torch
import transformers
from test_targets import GROUPED, SIZES, VOCAB, bigram_head
from transformers import CompileConfig

from dspark_hf.generation import generate

NEW_TOKENS = 40
IMAGE = VOCAB - 1
VISION = {"hidden_size": 16, "intermediate_size": 32, "patch_size": 4}
TEXT = SIZES | GROUPED | {"initializer_range": 0.2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VOCAB - 2, "vision_start_token_id": VOCAB - 3}
QWEN = {"text_config": TEXT | {"rope_parameters": ROPE}, **TOKENS, "vision_end_token_id": VOCAB - 4}
SIGLIP = {"num_hidden_layers": 2, "num_attention_heads": 2}


def qwen2_5():
    vision = VISION | {
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 16,
    }
    config = transformers.Qwen2_5_VLConfig(**QWEN, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3():
    vision = VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 64}
    config = transformers.Qwen3VLConfig(**QWEN, vision_config=vision | {"deepstack_visual_indexes": [0]})
    return transformers.Qwen3VLForConditionalGeneration(config)


def gemma3():
    mixed = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
    text = TEXT | mixed | {"query_pre_attn_scalar": 8, "initializer_range": 0.5}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION | SIGLIP | {"image_size": 16},
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3,
        tie_word_embeddings=False,
    )  # fmt: skip
    target = transformers.Gemma3ForConditionalGeneration(config)
    # Untrained it lets nothing of a picture through.
    torch.nn.init.normal_(target.model.multi_modal_projector.mm_input_projection_weight)
    return target


def gemma4():
    mixed = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_hidden_layers": 6}
    # Tables of every layer, and two layers that read the keys of those before.
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2}
    config = transformers.Gemma4Config(
        text_config=TEXT | mixed | own | {"global_head_dim": 16, "use_bidirectional_attention": "vision"},
        vision_config=VISION | SIGLIP | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2},
        boi_token_id=VOCAB - 3, eoi_token_id=VOCAB - 4, image_token_id=IMAGE, video_token_id=VOCAB - 2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Gemma4ForConditionalGeneration(config)


def lfm2():
    types = ["conv", "full_attention", "conv", "conv"]
    config = transformers.Lfm2VlConfig(
        text_config=TEXT | {"layer_types": types, "model_type": "lfm2"},
        vision_config=VISION | SIGLIP | {"num_patches": 16, "model_type": "siglip2_vision_model"},
        image_token_id=IMAGE, projector_hidden_size=32,
    )  # fmt: skip
    return transformers.Lfm2VlForConditionalGeneration(config)


def of_qwen(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A picture of 4 x 4 patches for each row, of which the model makes four tokens."""
    rows = len(ids)
    grid = torch.tensor([[1, 4, 4]] * rows)
    pixels = torch.randn(16 * rows, 3 * 2 * 4 * 4)
    return {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}


def of_gemma(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(ids), 3, 16, 16), "token_type_ids": (ids == IMAGE).long()}


def of_gemma4(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1).expand(len(ids), -1, -1)
    pixels = torch.randn(len(ids), 16, 3 * 4 * 4)
    return {"pixel_values": pixels, "image_position_ids": places, "mm_token_type_ids": (ids == IMAGE).int()}


def of_lfm(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = len(ids)
    shapes, mask = torch.tensor([[4, 4]] * rows), torch.ones(rows, 16, dtype=torch.long)
    return {"pixel_values": torch.randn(rows, 16, 48), "spatial_shapes": shapes, "pixel_attention_mask": mask}


FAMILIES = {
    "qwen2.5-vl": (qwen2_5, of_qwen),
    "qwen3-vl": (qwen3, of_qwen),
    "gemma3": (gemma3, of_gemma),
    "gemma4": (gemma4, of_gemma4),
    "lfm2-vl": (lfm2, of_lfm),
}


def prompts(family: str, rows: int) -> dict[str, torch.Tensor]:
    """Prompts with a picture each, at different places, padded on the left."""
    torch.manual_seed(2)
    ids, mask = torch.randint(1, VOCAB - 4, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    for row, (pad, at) in enumerate([(0, 4), (3, 5), (1, 2)]):
        ids[row, :pad], mask[row, :pad] = 0, 0
        ids[row, at : at + 4], ids[row, at - 1] = IMAGE, VOCAB - 3
    ids = ids[:rows]
    return {"input_ids": ids, "attention_mask": mask[:rows]} | FAMILIES[family][1](ids)


def build(family: str):
    torch.manual_seed(1)
    target = FAMILIES[family][0]().eval()
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, rows):
    target = build(family)
    inputs = prompts(family, rows) | {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    inputs |= {"return_dict_in_generate": True, "output_logits": True}
    plain = target.generate(**inputs)
    head = bigram_head(target, plain.sequences[:, 12:])
    output = target.generate(**inputs, assistant_model=head)
    assert output.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(plain.logits), atol=1e-3, rtol=1e-3)
    accepted, verified = sum(output.dspark.accepted), sum(output.dspark.verified)
    # A single text may repeat itself so that all drafts are right.
    assert accepted > 0 and (rows == 1 or accepted < verified)
    blind = target.generate(**inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}, assistant_model=head)
    assert blind.sequences.tolist() != plain.sequences.tolist(), "the text must depend on the picture"


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone(family):
    target = build(family)
    inputs = {"input_ids": torch.tensor([[3, 9, 4, 7], [0, 5, 2, 6]]), "max_new_tokens": 20, "do_sample": False}
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    plain = target.generate(**inputs)
    assert torch.equal(target.generate(**inputs, assistant_model=bigram_head(target, plain[:, 4:])), plain)


def test_the_head_knows_the_prompt():
    """Tokens of a prompt with a picture wait for the head as those of any prompt do."""
    target, inputs = build("qwen2.5-vl"), prompts("qwen2.5-vl", 3)
    head = bigram_head(target, torch.ones(1, 2, dtype=torch.long))
    seen = []
    handle = head.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    target.generate(**inputs, max_new_tokens=4, do_sample=False, assistant_model=head)
    handle.remove()
    # Twelve columns of the longest, of which the last is read when the rounds begin.
    assert seen[0] == 12


def test_what_does_not_go_with_pictures():
    target, inputs = build("qwen2.5-vl"), prompts("qwen2.5-vl", 1)
    head = bigram_head(target, torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="output_hidden_states"):
        target.generate(
            **inputs, max_new_tokens=4, return_dict_in_generate=True, output_hidden_states=True, assistant_model=head
        )
    pictures = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="pixel_values"):
        target.generate_batch(inputs["input_ids"].tolist(), assistant_model=head, max_new_tokens=4, **pictures)


def test_static_caches():
    """Rounds behind pictures are not captured, and say so."""
    target, inputs = build("qwen2.5-vl"), prompts("qwen2.5-vl", 1) | {"max_new_tokens": 9, "do_sample": False}
    plain = target.generate(**inputs)
    head = bigram_head(target, plain[:, 12:])
    static = {"cache_implementation": "static", "compile_config": CompileConfig()}
    with mock.patch.object(generate.logger, "warning_once") as warning:
        assert torch.equal(target.generate(**inputs, **static, assistant_model=head), plain)
    assert any("pictures" in str(call) for call in warning.call_args_list)
