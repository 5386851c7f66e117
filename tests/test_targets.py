"""Every supported family of targets, untrained and tiny: a head changes none of the tokens of greedy `generate`."""

import pytest
import torch
import transformers
from conftest import whole_blocks
from shares import rest_slow
from torch.nn.attention.flex_attention import create_mask

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.generation.placement import Placement, causal_mask
from dspark_hf.generation.releases import CACHE
from dspark_hf.generation.target import block_mask

VOCAB, NEW_TOKENS, WINDOW = 48, 40, 6
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES = {
    "qwen3": ("Qwen3", GROUPED),
    "qwen3-mixed": ("Qwen3", GROUPED | MIXED | {"use_sliding_window": True}),
    "qwen3-sliding": (
        "Qwen3",
        GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    ),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3-moe": ("Qwen3Moe", GROUPED | EXPERTS),
    "qwen3-moe-sliding": ("Qwen3Moe", GROUPED | EXPERTS | {"use_sliding_window": True, "sliding_window": WINDOW}),
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    "mistral-sliding": ("Mistral", GROUPED | {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2", GROUPED | MIXED | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", GROUPED | MIXED | {"query_pre_attn_scalar": 8}),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt-neox-serial": ("GPTNeoX", {"use_parallel_residual": False}),
    "gpt-oss": ("GptOss", GROUPED | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "olmo3": ("Olmo3", GROUPED | MIXED),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def build(family: str, seed: int = 1, **kwargs):
    """An untrained target whose greedy text varies."""
    name, fields = (FAMILIES | REFUSED)[family]
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**SIZES | fields | kwargs)
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def bigram_head(target, sequences: torch.Tensor, **kwargs) -> DSparkHead:
    """An untrained head, except that its Markov head knows which token mostly follows which in `sequences`: drafts
    are accepted and rejected in every position."""
    torch.manual_seed(1)
    fields = {"block_size": 4, "num_hidden_layers": 1, "initializer_range": 0.2, "markov_rank": VOCAB}
    head = DSparkHead(DSparkConfig.from_target(target.config, **fields | kwargs)).eval()
    counts = torch.zeros(VOCAB, VOCAB)
    for row in sequences.tolist():
        for previous, token in zip(row, row[1:], strict=False):
            counts[token, previous] += 1
    with torch.no_grad():
        head.markov_head.markov_w1.weight.copy_(torch.eye(VOCAB))
        head.markov_head.markov_w2.weight.copy_(counts * 20)
    return whole_blocks(head)


def prompts(batch: int) -> dict[str, torch.Tensor]:
    """One prompt of 9 tokens, or 3 of 9, 4 and 6, padded on the left."""
    torch.manual_seed(2)
    ids = torch.randint(1, VOCAB, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :3] = 0
    return {"input_ids": (ids * mask)[:batch], "attention_mask": mask[:batch]}


def check_same_tokens(target, head=None, batches: tuple[int, ...] = (1, 3), reference=None, plainly=None, **kwargs):
    """Plain `generate`, of `reference` and with settings `plainly` if given, and `generate` with a head agree for one
    row and for padded rows."""
    for batch in batches:
        inputs = prompts(batch) | {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
        plain = (reference or target).generate(**inputs, **plainly or {})
        new = plain[:, 9:]
        assert min(len(set(row)) for row in new.tolist()) > 4, "the target repeats itself, so the test shows little"
        output = target.generate(
            **inputs, assistant_model=head or bigram_head(target, new), return_dict_in_generate=True
        )
        assert output.sequences.tolist() == plain.tolist()
        assert 0 < sum(output.dspark.accepted) < sum(output.dspark.verified), "drafts must be accepted and rejected"


def refusal(target, head) -> str:
    """The error of a `generate` call, after checking that the target never ran."""
    calls = []
    handle = target.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError) as caught:
        target.generate(**prompts(1), max_new_tokens=4, assistant_model=head)
    handle.remove()
    assert not calls
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    check_same_tokens(build(family))


@pytest.mark.parametrize("family", [name for name, (_, fields) in FAMILIES.items() if fields.get("sliding_window")])
def test_windows_are_smaller_than_the_text(family):
    """The families above that slide would write something else with a window that holds the whole text."""
    inputs = prompts(3) | {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    narrow, wide = build(family), build(family, sliding_window=256)
    assert not torch.equal(narrow.generate(**inputs), wide.generate(**inputs))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", rest_slow(["llama", "mistral-sliding", "gemma3"], quick=["gemma3"]))
def test_attention_implementations(family, implementation):
    target = build(family, attn_implementation=implementation)
    assert target.config._attn_implementation == implementation
    check_same_tokens(target)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3"])
def test_flex_attention(family):
    """Compared with sdpa: on a CPU, stock `generate` with flex attention does not compile for padded batches."""
    sizes = {"hidden_size": 64, "head_dim": 16}
    target = build(family, attn_implementation="flex_attention", **sizes)
    check_same_tokens(target, batches=(3,), reference=build(family, attn_implementation="sdpa", **sizes))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_block_mask_says_what_the_boolean_mask_says(window):
    slots = torch.tensor([[3, 4, 5], [9, 10, 11]])
    mask = block_mask(Placement(slots, None, 12), window)
    assert mask.shape == (2, 1, 3, 12)
    dense = create_mask(mask.mask_mod, 2, 1, 3, 12, device="cpu")
    assert torch.equal(dense, causal_mask(Placement(slots, None, 12), window))


def test_flash_attention_is_refused():
    target = build("llama")
    head = bigram_head(target, torch.ones(1, 2, dtype=torch.long))
    target.config._attn_implementation = "flash_attention_2"
    message = refusal(target, head)
    assert (
        "LlamaForCausalLM" in message
        and "flash_attention_2" in message
        and 'set_attn_implementation("sdpa")' in message
    )


REFUSED = {
    "mamba": ("Mamba", {}),
    "llama4": ("Llama4", GROUPED | {"num_local_experts": 2, "intermediate_size_mlp": 64}),
    "bart": ("Bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}),
    "bloom": ("Bloom", {}),
    "falcon-alibi": ("Falcon", {"alibi": True}),
}
CONFIGS |= {"Llama4": "Llama4TextConfig"}


@pytest.mark.parametrize(
    "family, reasons",
    [
        ("mamba", ["MambaForCausalLM", "recurrent layers", "qwen3_next"]),
        ("llama4", ["Llama4ForCausalLM", "chunked_attention"]),
        ("bart", ["BartForCausalLM", "position_ids"]),
        ("bloom", ["BloomForCausalLM", "position_ids"]),
        ("falcon-alibi", ["FalconForCausalLM", "ALiBi"]),
    ],
)
def test_refused_family(family, reasons):
    target = build(family)
    message = refusal(target, bigram_head(target, torch.ones(1, 2, dtype=torch.long)))
    assert all(reason in message for reason in [*reasons, "assistant_model"]), message


def test_unknown_layer_type_is_named():
    target = build("qwen3")
    head = bigram_head(target, torch.ones(1, 2, dtype=torch.long))
    target.config.layer_types = ["full_attention", "indexed_attention"] * 2
    message = refusal(target, head)
    assert "Qwen3ForCausalLM" in message and "indexed_attention" in message
    target.config.layer_types = ["full_attention", "linear_attention"] * 2
    message = refusal(target, head)
    assert "recurrent layers (linear_attention)" in message and "qwen3_next" in message


# -- Positions ---------------------------------------------------------------------------------------------------------

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}


def phi3(original: int):
    """Longrope whose border is at `original` tokens, where plain decoding reads the text anew."""
    rope = LONGROPE | {"original_max_position_embeddings": original, "partial_rotary_factor": 1.0}
    fields = {"head_dim": 8, "sliding_window": None, "original_max_position_embeddings": original}
    return build("phi3", **fields, rope_parameters=rope)


@pytest.mark.parametrize("original", [6, 9, 10, 24, 128])
def test_longrope_on_both_sides_of_its_border(original):
    """Compared with plain decoding without a cache: with one it loses the text at the border in transformers 5.17."""
    check_same_tokens(phi3(original), plainly={"use_cache": False})


@pytest.mark.parametrize("longest", [8, 24])
def test_dynamic_ntk(longest):
    check_same_tokens(build("llama", max_position_embeddings=longest, rope_parameters=DYNAMIC))


def test_dynamic_ntk_leaves_the_target_as_it_was():
    target = build("llama", max_position_embeddings=24, rope_parameters=DYNAMIC)
    inputs = prompts(1) | {"max_new_tokens": 40, "do_sample": False}
    plain = target.generate(**inputs)
    head = bigram_head(target, plain[:, 9:])
    target.generate(**inputs | {"max_new_tokens": 60}, assistant_model=head)
    assert torch.equal(target.generate(**inputs), plain)


def test_a_turn_that_crosses_the_border_of_longrope():
    """The cache of the first turn is of the other frequencies; plain decoding drops it."""
    target = phi3(24)
    first = target.generate(**prompts(1), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    head = bigram_head(target, target.generate(**prompts(1), max_new_tokens=40, do_sample=False)[:, 9:])
    longer = torch.cat([first.sequences, torch.arange(1, 15)[None]], dim=1)
    kwargs = {"input_ids": longer, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(
        target.generate(**kwargs, **{CACHE: first[CACHE]}, assistant_model=head), target.generate(**kwargs)
    )


def test_yarn_beyond_its_positions():
    """As Qwen3 documents long texts: `max_position_embeddings` stays what it was."""
    target = build("qwen3", max_position_embeddings=20, rope_parameters=YARN)
    ids = torch.randint(1, VOCAB, (2, 30))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    plain = target.generate(**kwargs)
    assert torch.equal(target.generate(**kwargs, assistant_model=bigram_head(target, plain)), plain)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_table_of_positions_is_not_left(family):
    """Prompts of 9 and 4 tokens: when the long one has reached the last of 40 positions, the other still drafts."""
    fields = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=40, n_embd=32, n_layer=4, n_head=4, **fields)
    else:
        config = transformers.OPTConfig(
            vocab_size=VOCAB, max_position_embeddings=40, hidden_size=32, ffn_dim=64, num_hidden_layers=4,
            num_attention_heads=4, word_embed_proj_dim=32, **fields,
        )  # fmt: skip
    torch.manual_seed(1)
    target = transformers.AutoModelForCausalLM.from_config(config).eval()
    kwargs = prompts(3) | {"max_new_tokens": 31, "do_sample": False}
    plain = target.generate(**kwargs)
    head = bigram_head(target, plain[:, 9:])
    assert torch.equal(target.generate(**kwargs, assistant_model=head), plain)
    with pytest.raises(ValueError, match="41 tokens.* 40 positions"):
        target.generate(**kwargs | {"max_new_tokens": 40}, assistant_model=head)
