"""Every supported family of targets, untrained and tiny: a head changes none of the tokens of greedy `generate`."""

import pytest
import torch
import transformers
from conftest import whole_blocks
from torch.nn.attention.flex_attention import create_mask

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.generation.cache import Placement, causal_mask
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


def check_same_tokens(target, head=None, batches: tuple[int, ...] = (1, 3), reference=None, **kwargs):
    """Plain `generate`, of `reference` if given, and `generate` with a head agree for one row and for padded rows."""
    for batch in batches:
        inputs = prompts(batch) | {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
        plain = (reference or target).generate(**inputs)
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
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3"])
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


LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8}
REFUSED = {
    "qwen3-next": ("Qwen3Next", GROUPED | EXPERTS | LINEAR | HYBRID | {"shared_expert_intermediate_size": 32}),
    "qwen3.5": ("Qwen3_5", GROUPED | LINEAR | HYBRID),
    "nemotron-h": (
        "NemotronH",
        GROUPED | MAMBA | {"layer_types": ["linear_attention", "full_attention", "moe", "linear_attention"]},
    ),
    "mamba": ("Mamba", {}),
    "llama4": ("Llama4", GROUPED | {"num_local_experts": 2, "intermediate_size_mlp": 64}),
    "bart": ("Bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}),
    "bloom": ("Bloom", {}),
    "falcon-alibi": ("Falcon", {"alibi": True}),
}
CONFIGS |= {"Qwen3_5": "Qwen3_5TextConfig", "Llama4": "Llama4TextConfig"}


@pytest.mark.parametrize(
    "family, reasons",
    [
        ("qwen3-next", ["Qwen3NextForCausalLM", "recurrent layers (linear_attention)", "rolled back"]),
        ("qwen3.5", ["Qwen3_5ForCausalLM", "recurrent layers (linear_attention)", "rolled back"]),
        ("nemotron-h", ["NemotronHForCausalLM", "recurrent layers (linear_attention)", "rolled back"]),
        ("mamba", ["MambaForCausalLM", "recurrent layers", "rolled back"]),
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
