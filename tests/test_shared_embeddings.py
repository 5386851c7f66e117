"""The ends of a draft: embedding and LM head of targets that scale, cap, quantise, pad or extend them."""

import pytest
import torch
import transformers
from conftest import tiny_head, tiny_target, whole_blocks
from shares import rest_slow
from test_sampling import PROMPTS, VOCABULARY, exact_distribution, p_value
from test_sampling import draw as draw_samples
from test_targets import GROUPED, SIZES, bigram_head, check_same_tokens, prompts
from torch import nn

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.shared_embeddings import TargetLogits, scales_logits, target_logits
from dspark_hf.training.blocks import sample_blocks
from dspark_hf.training.losses import dspark_losses
from dspark_hf.training.step import target_states, training_step

# Families that do something behind the decoder other than their LM head, by name and fields.
SCALING = {
    "divided": ("Granite", {"logits_scaling": 8.0}),
    "multiplied": ("Cohere", {"logit_scale": 0.0625}),
    "capped": ("Gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "capped, nested": ("Gemma3", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
}
PLAIN = {"llama": "Llama", "learned positions inside the decoder": "OPT", "parallel": "GPTNeoX"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def model_of(family: str, **fields):
    torch.manual_seed(1)
    grouped = {} if family in ("OPT", "GPTNeoX") else GROUPED
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**SIZES | grouped | fields)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def last_states(target) -> torch.Tensor:
    return target_states(target, prompts(1)["input_ids"], [1])[1]


# -- Scaling and caps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALING)
@torch.no_grad()
def test_logits_are_those_of_the_target(name):
    family, fields = SCALING[name]
    target = model_of(family, **fields)
    head, hidden = tiny_head(target), last_states(target)
    expected = target(input_ids=prompts(1)["input_ids"]).logits
    assert scales_logits(target) and (target.lm_head(hidden) - expected).abs().max() > 1
    tables = head.share_embeddings(target)
    torch.testing.assert_close(head.base_logits(hidden, tables), expected)
    # Any number of leading dimensions, as training has them.
    blocks = hidden[:, :8].unflatten(1, (2, 4))
    torch.testing.assert_close(head.base_logits(blocks, tables), expected[:, :8].unflatten(1, (2, 4)))


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_targets_without_scaling_are_asked_for_their_lm_head_only(name):
    target = model_of(PLAIN[name])
    hidden = torch.randn(1, 3, 32)
    assert not scales_logits(target)
    torch.testing.assert_close(TargetLogits(target)(hidden), target.get_output_embeddings()(hidden))
    assert target_logits(target).module is target.get_output_embeddings()


@pytest.mark.parametrize("name", SCALING)
def test_a_scaling_target_keeps_its_text(name):
    family, fields = SCALING[name]
    check_same_tokens(model_of(family, **fields))


def test_a_cap_of_the_heads_own_is_applied_once():
    target = model_of("Gemma2", query_pre_attn_scalar=8, final_logit_softcapping=3.0)
    head = tiny_head(target, final_logit_softcapping=3.0)
    hidden = last_states(target)
    expected = 3.0 * torch.tanh(target.lm_head(hidden) / 3.0)
    torch.testing.assert_close(head.base_logits(hidden, head.share_embeddings(target)), expected)


def test_heads_of_trainers_that_leave_the_scaling_out(tmp_path):
    """They were taught with the LM head's output as it is, and say so wherever they are saved."""
    target = model_of("Granite", logits_scaling=8.0)
    head, hidden = tiny_head(target, borrow_logit_scaling=False), last_states(target)
    head.save_pretrained(tmp_path)
    for each in (head, DSparkHead.from_pretrained(tmp_path)):
        torch.testing.assert_close(each.base_logits(hidden, each.share_embeddings(target)), target.lm_head(hidden))


@pytest.mark.parametrize("borrows", [True, False])
def test_training_compares_with_what_the_target_samples_from(borrows, monkeypatch):
    """Also where the head itself is taught without the scaling."""
    target = model_of("Granite", logits_scaling=8.0)
    head = tiny_head(target, borrow_logit_scaling=borrows)
    ids = torch.randint(1, 48, (1, 12))
    batch = {"input_ids": ids, "loss_mask": torch.ones_like(ids)}
    seen = []
    from dspark_hf.training import step

    def recorded(draft, draft_logits, aligned, logits, *args):
        seen.append(logits(aligned))
        return dspark_losses(draft, draft_logits, aligned, logits, *args)

    monkeypatch.setattr(step, "dspark_losses", recorded)
    training_step(head, target, head.share_embeddings(target), batch, 4, torch.Generator().manual_seed(3))
    anchors = sample_blocks(batch["loss_mask"], 4, torch.Generator().manual_seed(3)).anchors[0]
    logits = target(input_ids=ids).logits[0]
    positions = (anchors[:, None] + torch.arange(head.config.block_size)).clamp(max=11)
    torch.testing.assert_close(seen[0][0], logits[positions])


# -- Quantised tables --------------------------------------------------------------------------------------------


class Int8(nn.Module):
    """Weights as int8 with a scale a row; takes floating-point states only."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        assert x.dtype == torch.float32
        return nn.functional.linear(x, self.weight * self.scale)


class Packed(nn.Module):
    """Without a `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().to(torch.float16))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype))


class PackedEmbedding(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.register_buffer("qweight", table.weight.detach().to(torch.float16))

    def forward(self, ids):
        return self.qweight[ids].float()


@pytest.mark.parametrize("kind", [Int8, Packed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_lm_heads_are_called(kind, dtype):
    """With states of the type that the target computes in, also by a head of another type."""
    target = model_of("Qwen3")
    target.lm_head = kind(target.lm_head)
    head, hidden = tiny_head(target).to(dtype), torch.randn(1, 3, 32).to(dtype)
    expected = target.lm_head(hidden.float())
    torch.testing.assert_close(head.base_logits(hidden, head.share_embeddings(target)), expected)
    check_same_tokens(target)


def test_quantised_tables_beside_a_head_with_copies():
    """The copies stay: they are what the head was made with."""
    target = tiny_target()
    head = tiny_head(target, borrow_embeddings=False, borrow_lm_head=False)
    with torch.no_grad():
        head.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
        head.lm_head.weight.copy_(target.lm_head.weight)
    target.lm_head, target.model.embed_tokens = Packed(target.lm_head), PackedEmbedding(target.model.embed_tokens)
    tables = head.share_embeddings(target)
    assert tables.embed is head.embed_tokens and tables.logits.module is head.lm_head


def test_a_quantised_embedding_that_the_head_scales():
    target = tiny_target()
    head = tiny_head(target, embedding_scale=4.0)
    expected = head.embed_block(torch.tensor([3]), head.share_embeddings(target))
    target.model.embed_tokens = PackedEmbedding(target.model.embed_tokens)
    found = head.embed_block(torch.tensor([3]), head.share_embeddings(target))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


# -- Vocabularies of two sizes -----------------------------------------------------------------------------------

KINDS = {
    "borrowed": {},
    "copies": {"borrow_embeddings": False, "borrow_lm_head": False},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {"markov_rank": 0, "sample_from_anchor": False},
}


def head_of_another_size(target, size: int, **fields) -> DSparkHead:
    """A head for a vocabulary of `size` tokens."""
    torch.manual_seed(1)
    fields = {"num_hidden_layers": 1, "block_size": 4, "markov_rank": 8, "initializer_range": 0.2} | fields
    config = DSparkConfig.from_target(target.config, vocab_size=size, mask_token_id=1, **fields)
    return whole_blocks(DSparkHead(config).eval())


@pytest.mark.parametrize("size", rest_slow([12, 20], quick=[12]))
@pytest.mark.parametrize("kind", rest_slow(KINDS, quick=["borrowed"]))
def test_sampling_with_another_vocabulary_is_exact(size, kind, monkeypatch):
    """The target's tokens that the head does not know are never drafted, and sampled as often as without it; they may
    be the anchor, too."""
    import test_sampling

    monkeypatch.setattr(test_sampling, "DRAWS", 4000)
    target = tiny_target(VOCABULARY, sharpness=1)
    head = head_of_another_size(target, size, **KINDS[kind])
    p = exact_distribution(target, PROMPTS[0], []).sum(dim=(1, 2))
    assert size > VOCABULARY or p[size:].sum() > 0.02
    ends_unknown = [*PROMPTS[0], VOCABULARY - 1]
    for prompt, tokens in zip(
        [PROMPTS[0], ends_unknown], draw_samples(target, head, [PROMPTS[0], ends_unknown]), strict=True
    ):
        assert p_value(tokens, exact_distribution(target, prompt, [])) > 1e-4


@pytest.mark.parametrize("extra", [8, -8])
def test_a_target_resized_after_the_head_was_made(extra):
    """`resize_token_embeddings`, after which the head is told nothing."""
    target = model_of("Qwen3")
    plain = target.generate(**prompts(1), max_new_tokens=40, do_sample=False)[:, 9:]
    head = bigram_head(target, plain, mask_token_id=1)
    target.resize_token_embeddings(48 + extra, mean_resizing=False)
    inputs = {"input_ids": prompts(1)["input_ids"].clamp(max=47 + min(extra, 0)), "max_new_tokens": 40}
    inputs["input_ids"][0, -1] = 47 + extra
    expected = target.generate(**inputs, do_sample=False)
    found = target.generate(**inputs, do_sample=False, assistant_model=head, return_dict_in_generate=True)
    assert found.sequences.tolist() == expected.tolist()
    drafted = {token for rounds in found.dspark.draft_tokens for round in rounds for token in round}
    assert sum(found.dspark.accepted) and max(drafted) < min(48, 48 + extra)


def test_a_reduced_draft_vocabulary_beside_a_smaller_target():
    target = tiny_target(VOCABULARY)
    head = head_of_another_size(target, 20, draft_vocab_size=6)
    drafted = torch.tensor([1, 4, 9, 15, 17, 19])
    head.d2t.copy_(drafted - torch.arange(6))
    tables = head.share_embeddings(target)
    hidden = torch.randn(2, 3, 32)
    logits = head.base_logits(hidden, tables)
    torch.testing.assert_close(logits, target.lm_head(hidden)[..., [1, 4, 9, 15]])
    whole = head.in_target_vocabulary(logits, tables)
    assert whole.shape[-1] == VOCABULARY
    assert (whole.softmax(-1) > 0).nonzero()[:, -1].unique().tolist() == [1, 4, 9, 15]


def test_a_mask_token_that_the_target_does_not_have():
    target = tiny_target(VOCABULARY)
    config = DSparkConfig.from_target(target.config, vocab_size=20, mask_token_id=18, num_hidden_layers=1)
    with pytest.raises(ValueError, match="mask token 18.*vocabulary of 16"):
        target.generate(**{"input_ids": torch.tensor([[1, 2]])}, assistant_model=DSparkHead(config))
