"""Targets with recurrent and convolutional layers: what they keep of a text cannot be cut back, and still a head
changes none of the tokens. Logits are compared too: a state that is a little wrong need not show in a greedy text."""

import functools
import itertools
from unittest import mock

import pytest
import torch
import transformers
from conftest import tiny_head
from shares import rest_slow
from test_sampling import p_value
from test_targets import EXPERTS, GROUPED, SIZES, VOCAB, bigram_head
from transformers import CompileConfig, ContinuousBatchingConfig

from dspark_hf.generation import generate
from dspark_hf.generation.hook import stock_loop
from dspark_hf.generation.releases import CACHE

NEW_TOKENS = 60
# What a chunk of a prompt has, as far as it can be chosen: Mamba 2. The delta rule has chunks of 64.
CHUNK = 16
LINEAR, CONVOLUTION = ({"layer_types": [kind, "full_attention", kind, kind]} for kind in ("linear_attention", "conv"))
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": CHUNK}
SHARED = {"shared_expert_intermediate_size": 32}
FAMILIES = {
    "qwen3-next": ("Qwen3Next", GROUPED | EXPERTS | DELTA | LINEAR | SHARED),
    "qwen3.5": ("Qwen3_5", GROUPED | DELTA | LINEAR),
    "qwen3.5-moe": ("Qwen3_5Moe", GROUPED | EXPERTS | DELTA | LINEAR | SHARED),
    "olmo-hybrid": ("OlmoHybrid", GROUPED | DELTA | LINEAR),
    "kimi-linear": (
        "KimiLinear",
        LINEAR
        | {"linear_head_dim": 8, "linear_num_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
        | {"qk_rope_head_dim": 4, "v_head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "num_shared_experts": 1}
        | {"num_key_value_heads": 4},
    ),
    "lfm2": ("Lfm2", GROUPED | CONVOLUTION),
    "lfm2-moe": ("Lfm2Moe", GROUPED | EXPERTS | CONVOLUTION | {"num_dense_layers": 1}),
    "nemotron-h": (
        "NemotronH",
        GROUPED
        | {"layer_types": ["linear_attention", "full_attention", "moe", "mlp", "linear_attention"]}
        | {"num_hidden_layers": 5, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8}
        | {"chunk_size": CHUNK, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"moe_shared_expert_intermediate_size": 32},
    ),
    "bamba": ("Bamba", GROUPED | MAMBA | {"attn_layer_indices": [1]}),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        GROUPED | MAMBA | LINEAR | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    ),
    "falcon-h1": ("FalconH1", GROUPED | MAMBA | {"mamba_d_ssm": 64}),
    "jamba": (
        "Jamba",
        GROUPED
        | {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 4, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
    ),
}
CONFIGS = {"Qwen3_5": "Qwen3_5TextConfig", "Qwen3_5Moe": "Qwen3_5MoeTextConfig"}
# One of each kind of layer: gated delta, Mamba 2, beside attention, Mamba, convolutions.
KINDS = ["qwen3-next", "nemotron-h", "falcon-h1", "jamba", "lfm2"]
RECORDED = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def build(family: str, seed: int = 1, **kwargs):
    """An untrained target whose greedy text varies."""
    name, fields = FAMILIES[family]
    # Sharper weights would make of rounding something else within 60 tokens.
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))
    torch.manual_seed(seed)
    fields = SIZES | {"initializer_range": 0.2} | fields | kwargs
    return getattr(transformers, f"{name}ForCausalLM")(config(**fields)).eval()


@functools.cache
def pair(family: str):
    """A target, and a head that knows what its text is like."""
    target = build(family)
    text = target.generate(**prompts(9, 4, 6), max_new_tokens=NEW_TOKENS, do_sample=False)[:, 9:]
    return target, bigram_head(target, text)


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left."""
    torch.manual_seed(2)
    width = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = torch.randint(1, VOCAB, (length,)), 1
    return {"input_ids": ids, "attention_mask": mask}


def check_same(target, head, inputs, **kwargs):
    """Plain `generate` and one with a head write the same, with the same logits as long as a row has not ended."""
    plain, output = (
        target.generate(**inputs, **RECORDED | {"max_new_tokens": NEW_TOKENS} | kwargs | extra)
        for extra in ({}, {"assistant_model": head})
    )
    assert output.sequences.tolist() == plain.sequences.tolist()
    for ours, theirs in zip(output.logits, plain.logits, strict=True):
        goes_on = ours.any(dim=-1)
        torch.testing.assert_close(ours[goes_on], theirs[goes_on], atol=1e-3, rtol=1e-3)
    return output


@pytest.mark.parametrize("family", rest_slow(FAMILIES, [*KINDS, "kimi-linear"]))
def test_family(family):
    check_family(family, 9, 4, 6)


@pytest.mark.parametrize("family", rest_slow(FAMILIES, KINDS))
def test_family_at_batch_1(family):
    check_family(family, 9)


def check_family(family: str, *lengths: int) -> None:
    target, head = pair(family)
    output = check_same(target, head, prompts(*lengths))
    assert min(len(set(row)) for row in output.sequences[:, 9:].tolist()) > 4
    assert 0 < sum(output.dspark.accepted) < sum(output.dspark.verified), "drafts must be accepted and rejected"


@pytest.mark.parametrize(
    "lengths",
    # Kernels have 3 or 4 tokens, chunks 16 or 64.
    rest_slow(
        [[1], [1, 2, 3, 4, 5], [CHUNK - 1, CHUNK, CHUNK + 1], [63, 64, 65], [70, 2, 70]],
        quick=[[1, 2, 3, 4, 5], [63, 64, 65]],
    ),
    ids=str,
)
@pytest.mark.parametrize("family", rest_slow(FAMILIES, KINDS))
def test_prompts_on_both_sides_of_kernels_and_chunks(family, lengths):
    check_same(*pair(family), prompts(*lengths), max_new_tokens=20)


@pytest.mark.parametrize("family", KINDS)
def test_rows_that_end_early(family):
    target, head = pair(family)
    common = target.generate(**prompts(9, 4, 6), max_new_tokens=30, do_sample=False)[:, 9:].flatten().mode().values
    check_same(target, head, prompts(9, 4, 6), eos_token_id=int(common), pad_token_id=0)


@pytest.mark.parametrize("family", rest_slow(["qwen3-next", "nemotron-h", "jamba", "lfm2"], quick=["nemotron-h"]))
def test_sampled(family):
    """The joint distribution of the first three tokens, against the target's own."""
    target = build(family, vocab_size=16, initializer_range=0.3)
    head, prompt = tiny_head(target, seed=2), [1, 5, 9, 2]
    ids = torch.tensor([[*prompt, *prefix] for prefix in itertools.product(range(16), repeat=2)])
    with torch.no_grad():
        p = target(input_ids=ids).logits[:, 3:].softmax(-1).double().view(16, 16, 3, 16)
    expected = p[:1, :1, 0].view(-1, 1, 1) * p[:, :1, 1].view(16, 16, 1) * p[:, :, 2]
    kwargs = {"do_sample": True, "top_k": 0, "max_new_tokens": 5, "return_dict_in_generate": True}
    outputs = [target.generate(torch.tensor([prompt] * 500), assistant_model=head, **kwargs) for _ in range(8)]
    assert p_value(torch.cat([output.sequences[:, 4:7] for output in outputs]), expected) > 1e-3
    stats = outputs[0].dspark
    assert 0 < sum(stats.accepted) < sum(stats.verified)


@pytest.mark.parametrize("pattern", rest_slow(["hhh", "php", "hph"], quick=["hph"]))
@pytest.mark.parametrize("family", KINDS)
def test_a_cache_goes_from_turn_to_turn(family, pattern):
    """Of a row that ended within a block it holds no more than its text."""
    target, head = pair(family)
    turns = [torch.tensor([own]) for own in ([3, 9, 4, 7], [5, 2], [11, 8, 1])]

    def last(helpers):
        sequences, cache = torch.zeros(1, 0, dtype=torch.long), None
        for helper, turn in zip(helpers, turns, strict=True):
            ids, ends = torch.cat([sequences, turn], dim=1), {"eos_token_id": end, "pad_token_id": 0}
            extra = {"assistant_model": head} if helper == "h" else {}
            output = target.generate(ids, **{CACHE: cache}, **RECORDED, **ends, max_new_tokens=20, **extra)
            sequences, cache = output.sequences, output[CACHE]
        return output

    end = target.generate(turns[0], max_new_tokens=8, do_sample=False)[0, -1].item()
    found, expected = last(pattern), last("ppp")
    if family == "jamba":
        # Plain decoding forgets, as several tokens come: only a text that goes on token by token compares.
        expected = target.generate(
            found.sequences[:, : -len(found.logits)], **RECORDED, max_new_tokens=len(found.logits)
        )
        if "p" in pattern:
            return
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("piece", rest_slow([None, 5], quick=[5]))
@pytest.mark.parametrize("family", KINDS)
def test_requests_that_come_and_go(family, piece):
    """With long prompts read in pieces too. A state is none of a text's beginning, so nothing is reused."""
    target, head = pair(family)
    texts = [prompts(length)["input_ids"][0].tolist() for length in (9, 4, 20, 4, 1)]
    texts.append(texts[2] + [5, 7])
    settings = ContinuousBatchingConfig(max_requests_per_batch=2, max_batch_tokens=piece, use_cuda_graph=False)
    outputs = target.generate_batch(
        texts, assistant_model=head, continuous_batching_config=settings, max_new_tokens=20, do_sample=False
    )
    for text, output in zip(texts, outputs.values(), strict=True):
        plain = target.generate(torch.tensor([text]), max_new_tokens=20, do_sample=False)
        assert output.generated_tokens == plain[0, len(text) :].tolist()


@pytest.mark.parametrize("family", KINDS)
def test_outputs_of_prompts_of_several_lengths(family):
    """Hidden states and attentions of every token lie where plain decoding has them."""
    target, head = pair(family)
    target.set_attn_implementation("eager")
    kwargs = RECORDED | {"max_new_tokens": 6, "output_hidden_states": True}
    plain, output = (
        target.generate(**prompts(9, 4, 6), **kwargs, **extra) for extra in ({}, {"assistant_model": head})
    )
    target.set_attn_implementation("sdpa")
    for ours, theirs in zip(output.hidden_states[1:], plain.hidden_states[1:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    real = prompts(9, 4, 6)["attention_mask"].bool()
    for a, b in zip(output.hidden_states[0], plain.hidden_states[0], strict=True):
        torch.testing.assert_close(a[real], b[real], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("hidden", [3, [7, 8]], ids=["inside", "right"])
def test_padding_elsewhere_than_on_the_left_is_refused(hidden):
    """Also where `generate` takes a token of the prompt for padding."""
    target, head = pair("lfm2")
    inputs = prompts(9)
    inputs["attention_mask"][:, hidden] = 0
    ids = inputs["input_ids"] * inputs["attention_mask"]
    for given in (inputs, {"input_ids": ids}):
        with pytest.raises(ValueError, match=r"hides column \d of row 0.*padding_side"):
            target.generate(**given, max_new_tokens=9, assistant_model=head)
    check_same(target, head, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, max_new_tokens=20)


def test_static_caches():
    """Rounds with states are not captured, and say so."""
    target, head = pair("qwen3-next")
    inputs = prompts(9) | {"max_new_tokens": 9, "do_sample": False}
    static = {"cache_implementation": "static", "compile_config": CompileConfig()}
    plain = target.generate(**inputs)
    with mock.patch.object(generate.logger, "warning_once") as warning:
        assert torch.equal(target.generate(**inputs, **static, assistant_model=head), plain)
    assert any("recurrent state" in str(call) for call in warning.call_args_list)


def test_the_stock_loop_refuses():
    """It cannot take back what such layers have read."""
    target, head = pair("qwen3-next")
    with stock_loop(), pytest.raises(ValueError, match="stateful"):
        target.generate(**prompts(9), max_new_tokens=9, assistant_model=head)


def test_a_compiled_model_is_refused():
    target = build("lfm2")
    target.compile(backend="eager")
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM.*model\.compile"):
        target.generate(**prompts(9), max_new_tokens=9, assistant_model=pair("lfm2")[1])


def test_nothing_is_left_behind_in_a_model():
    """Passes of others, also with a model whose recurrences are wrapped, are as they were."""
    target = build("qwen3-next", seed=4)
    inputs = prompts(9, 4) | {"max_new_tokens": 9, "do_sample": False}
    before = target.generate(**inputs)
    target.generate(**inputs, assistant_model=pair("qwen3-next")[1])
    assert torch.equal(target.generate(**inputs), before)
