"""Targets with compressed caches, DeepSeek V4: rows of a batch go their own ways, rejected tokens leave no trace."""

import functools

import pytest
import torch
from conftest import whole_blocks
from scipy.stats import chi2
from shares import rest_slow
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from dspark_hf import DSparkConfig, DSparkHead
from dspark_hf.checkpoints import deepseek_v4
from dspark_hf.checkpoints.export import export
from dspark_hf.generation.releases import CACHE
from dspark_hf.generation.target import Target
from dspark_hf.training.step import target_states

v4 = pytest.importorskip("transformers.models.deepseek_v4", reason="this release has no DeepSeek V4")

VOCABULARY, COUNT = 24, 64
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
# On both sides of window and entries.
PROMPTS = ([3, 7, 5], [2, 9, 9, 4, 11, 1, 8, 6], [5, 1, 20, 8, 13, 13, 2, 7, 19, 4, 4, 6, 3, 10, 12, 5, 17])


def tiny_v4(kinds=(0, 1, 2, 1), **kwargs):
    torch.manual_seed(0)
    config = v4.DeepseekV4Config(
        vocab_size=VOCABULARY, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=len(kinds),
        layer_types=[KINDS[kind] for kind in kinds], mlp_layer_types=["hash_moe"] + ["moe"] * (len(kinds) - 1),
        num_attention_heads=2, head_dim=16, q_lora_rank=8, o_lora_rank=8, o_groups=2, n_routed_experts=4,
        num_experts_per_tok=2, index_n_heads=2, index_head_dim=8, index_topk=64, sliding_window=8, hc_mult=2,
        hc_sinkhorn_iters=4,
        compress_rates={KINDS[1]: 4, KINDS[2]: 8}, partial_rotary_factor=0.5, max_position_embeddings=512,
        initializer_range=0.5, pad_token_id=0, bos_token_id=None, eos_token_id=None, **kwargs,
    )  # fmt: skip
    return v4.DeepseekV4ForCausalLM(config).eval()


def head_for(target, texts: list[list[int]] = (), block_size: int = 4) -> DSparkHead:
    """A head of V4's stages that knows which token mostly follows which in `texts`, so that drafts are accepted and
    rejected."""
    published = target.config.to_dict() | {
        "dspark_block_size": block_size,
        "dspark_noise_token_id": VOCABULARY - 1,
        "dspark_target_layer_ids": [0, target.config.num_hidden_layers - 1],
        "dspark_markov_rank": VOCABULARY,
    }
    torch.manual_seed(1)
    head = DSparkHead(DSparkConfig(**deepseek_v4.read_config(published, "tiny"))).eval()
    counts = torch.zeros(VOCABULARY, VOCABULARY)
    for text in texts:
        for before, token in zip(text, text[1:], strict=False):
            counts[token, before] += 1
    with torch.no_grad():
        head.markov_head.markov_w1.weight.copy_(torch.eye(VOCABULARY))
        head.markov_head.markov_w2.weight.copy_(counts * 20)
    return whole_blocks(head)


@functools.cache
def pair(kinds: tuple[int, ...]):
    """A target, what it writes after the prompts, and a head that has seen that."""
    target = tiny_v4(kinds)
    texts = [plain(target, prompt, COUNT) for prompt in PROMPTS]
    return target, texts, head_for(target, texts)


def plain(target, prompt: list[int], count: int) -> list[int]:
    return target.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


def batch(prompts) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts]),
    }


@pytest.mark.parametrize("schedule", ["constant", "load"])
@pytest.mark.parametrize("kinds", rest_slow([(0, 0), (0, 1), (2, 2), (0, 1, 2, 1)], quick=[(2, 2)]), ids=str)
def test_greedy(kinds, schedule):
    """Alone and in a padded batch every row writes what plain decoding writes of its prompt alone, where transformers'
    own padded batches of V4 compress the padding with the text."""
    target, texts, head = pair(kinds)
    head.generation_config.num_assistant_tokens_schedule = schedule
    settings = {"max_new_tokens": COUNT, "do_sample": False, "assistant_model": head, "return_dict_in_generate": True}
    for prompts, expected in (([PROMPTS[1]], [texts[1]]), (PROMPTS, texts)):
        output = target.generate(**batch(prompts), **settings)
        assert output.sequences[:, max(map(len, prompts)) :].tolist() == expected
        if schedule == "constant":
            lengths = [length for row in output.dspark.committed_lengths for length in row]
            assert min(lengths) == 1 and max(lengths) > 2


@pytest.mark.parametrize("count", [1, 3, 6])
@torch.no_grad()
def test_rejected_tokens_leave_no_trace(count):
    """Behind a pass of which only the first tokens are kept the cache is that of these tokens, tensor by tensor."""
    target = tiny_v4()
    runner, ids = Target(target, [1]), torch.randint(1, VOCABULARY, (1, 40))
    caches = [runner.new_cache(1) for _ in range(2)]
    start = 0
    for width in (7, 7, 8, 7):
        wrong = torch.cat([ids[:, start : start + count], torch.randint(1, VOCABULARY, (1, width - count))], dim=1)
        for cache, tokens in zip(caches, (wrong, ids[:, start : start + count]), strict=True):
            runner.forward(tokens, cache)
            cache.commit([count])
        start += count
        assert caches[0].lengths == caches[1].lengths == [start]
        for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
            compare(vars(ours.held[0]), vars(theirs.held[0]))


def compare(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, dict):
            compare(value, theirs[name])
        elif torch.is_tensor(value):
            torch.testing.assert_close(value, theirs[name], atol=2e-5, rtol=1e-4)
        else:
            assert value == theirs[name], name


def test_sampling():
    """The first two tokens are distributed as the target's own."""

    target, prompt = tiny_v4((0, 1)), PROMPTS[1]
    with torch.no_grad():
        target.lm_head.weight.mul_(0.4)
        first = target(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        ids = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        second = target(ids).logits[:, -1].softmax(-1)
    head, draws = head_for(target, [plain(target, prompt, 60)]), []
    for _ in range(2):
        rows = batch([prompt] * 200)
        sequences = target.generate(**rows, do_sample=True, top_k=0, max_new_tokens=3, assistant_model=head)
        draws.append(sequences[:, len(prompt) : len(prompt) + 2])
    observed, expected = torch.cat(draws), (first[:, None] * second).double()
    flat = torch.bincount(observed @ torch.tensor([VOCABULARY, 1]), minlength=VOCABULARY**2).double()
    wanted = expected.flatten() * len(observed)
    # Rare pairs are one cell.
    often = wanted >= 5
    flat, wanted = (torch.cat([x[often], x[~often].sum()[None]]) for x in (flat, wanted))
    statistic = ((flat - wanted) ** 2 / wanted).sum().item()
    assert often.sum() > 5 and chi2.sf(statistic, int(often.sum())) > 1e-4


@torch.no_grad()
def test_features_are_means_of_true_outputs():
    """Also those of the last layer, in passes of ours and in training; what others see of the model stays as it is."""
    target, ids, outputs = tiny_v4(), torch.tensor([PROMPTS[2]]), []
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in target.model.layers]
    before = target(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    expected = torch.cat([outputs[i].mean(dim=2) for i in (1, 3)], dim=-1)
    runner = Target(target, [1, 3], all_hidden_states=True)
    passed = runner.forward(ids, runner.new_cache(1))
    torch.testing.assert_close(passed.features, expected, atol=1e-5, rtol=1e-5)
    assert len(passed.hidden_states) == len(before)
    for ours, theirs in zip(passed.hidden_states, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    features, last = target_states(target, ids, [1, 3])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, before[-1], atol=1e-5, rtol=1e-5)
    assert len(target.model.layers[-1]._forward_hooks) == len(target.model.layers[0]._forward_hooks)


def test_a_head_in_the_published_layout(tmp_path):
    """Written beside nothing, read back, and as quick to draft the same text."""
    target = tiny_v4()
    text = plain(target, PROMPTS[0], 40)
    head = head_for(target, [text])
    export(head, "deepseek_v4", tmp_path, target)
    again = whole_blocks(DSparkHead.from_pretrained(tmp_path, dtype=torch.float32).eval())
    settings = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    found = [target.generate(**batch(PROMPTS[:1]), assistant_model=own, **settings) for own in (head, again)]
    assert found[0].sequences[0, 3:].tolist() == found[1].sequences[0, 3:].tolist() == text
    assert found[0].dspark.committed_lengths == found[1].dspark.committed_lengths


def test_a_cache_of_the_caller_is_refused():
    target = tiny_v4()
    with pytest.raises(ValueError, match="cannot continue from a DynamicCache"):
        target.generate(
            **batch(PROMPTS[:1]),
            **{CACHE: DynamicCache(config=target.config)},
            assistant_model=head_for(target),
            max_new_tokens=4,
        )


def test_requests_that_come_and_go():
    """Of any length, also where prompts are read in pieces: each as alone."""
    target, texts, head = pair((0, 1, 2, 1))
    for piece in (512, 5):
        config = ContinuousBatchingConfig(max_batch_tokens=piece, max_requests_per_batch=2)
        results = target.generate_batch(
            list(PROMPTS),
            generation_config=GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=None),
            continuous_batching_config=config,
            assistant_model=head,
        )
        found = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
        assert [found[tuple(prompt)] for prompt in PROMPTS] == [text[:20] for text in texts]


def test_no_cache_is_returned():
    """transformers' has all rows at one place; ours does not."""
    target, texts, head = pair((0, 1, 2, 1))
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "assistant_model": head}
    output = target.generate(**batch(PROMPTS), **settings)
    assert (output.cache if hasattr(output, "cache") else output.past_key_values) is None
    output = target.generate(**batch(PROMPTS[:1]), **settings, output_hidden_states=True, output_scores=True)
    assert output.sequences[0, 3:].tolist() == texts[0][:8] and len(output.scores) == len(output.hidden_states) == 8


def test_a_compiled_model_is_refused():
    target = tiny_v4((0, 1))
    head = head_for(target)
    target.compile(backend="eager")
    with pytest.raises(ValueError, match="compressed layers"):
        target.generate(**batch(PROMPTS[:1]), assistant_model=head, max_new_tokens=4)
