"""Generation through the Triton kernels; without a GPU in Triton's interpreter, as if tensors were on one."""

import dspark_kernels
import pytest
import torch
from conftest import biases, tiny_head, tiny_target
from dspark_kernels import dispatch
from shares import rest_slow
from test_sampling import PROMPTS, SETTINGS, TOKENS, draw, exact_distribution, p_value
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList

from dspark_hf.generation import attention, experience
from dspark_hf.generation import round as rounds
from dspark_hf.generation.processors import BlockProcessors


@pytest.fixture
def launches(monkeypatch):
    """Kernels run for CPU tensors too; names of the modules asked for."""
    pytest.importorskip("triton")
    used = []
    for module in (dispatch, dspark_kernels):
        monkeypatch.setattr(module, "uses_kernels", lambda *tensors: True)
    load = dispatch.importlib.import_module

    def import_module(name, package=None):
        used.append(name.removeprefix("."))
        return load(name, package)

    monkeypatch.setattr(dispatch.importlib, "import_module", import_module)
    return used


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(16, sharpness=2)
    return target, tiny_head(target)


def greedy(target, **kwargs):
    ids = torch.tensor([[0, 0, *PROMPTS[0]], [*PROMPTS[2]]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    return target.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **kwargs)


@pytest.mark.parametrize("ahead", rest_slow([False, True], quick=[True]))
def test_greedy_tokens_are_plain_generates(pair, launches, monkeypatch, ahead):
    target, head = pair
    monkeypatch.setattr(experience, "runs_ahead", lambda device: ahead)
    assert torch.equal(greedy(target, assistant_model=head), greedy(target))
    assert {"verify", "sequential"} <= set(launches)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("sample", [False, True])
def test_drafts_of_every_sequential_head(launches, monkeypatch, kind, sample):
    """Kernels draft what torch drafts; sampled drafts come from the logits that are returned with them."""
    target = tiny_target(16, sharpness=2)
    head = tiny_head(target, markov_head_type=kind)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, head.config.block_size, head.config.hidden_size, generator=g)
    anchors, embeddings = torch.tensor([1, 5, 9]), head.share_embeddings(target)
    sampler = BlockProcessors(LogitsProcessorList(), sample).draft_sampler(None)
    with torch.no_grad():
        found = head.sample_block(hidden, anchors, embeddings, 3, sampler)
        assert "sequential" in launches
        if not sample:
            monkeypatch.setattr(dspark_kernels, "uses_kernels", lambda *tensors: False)
            expected = head.sample_block(hidden, anchors, embeddings, 3, sampler)
            assert torch.equal(found.tokens, expected.tokens) and found.logits is None
            torch.testing.assert_close(found.confidence_logits, expected.confidence_logits)
            return
        previous = torch.cat([anchors[:, None], found.tokens[:, :-1]], dim=1)
        expected = head.base_logits(hidden[:, :3], embeddings) + biases(head, hidden[:, :3], previous)
        torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_attention_by_name(pair, launches, packed, request):
    target, head = pair
    expected = greedy(target)
    if packed:
        request.getfixturevalue("shuffled")
    before = target.config._attn_implementation
    target.set_attn_implementation(attention.NAME)
    try:
        assert torch.equal(greedy(target), expected)
        assert "attention" not in launches
        assert torch.equal(greedy(target, assistant_model=head), expected)
        assert "attention" in launches
    finally:
        target.set_attn_implementation(before)


@pytest.mark.slow
def test_attention_by_name_where_prompts_are_read_beside_drafts(pair, launches):
    """Short prompts by the kernel, one that is too long for it by sdpa."""
    target, head = pair
    prompts = [[*PROMPTS[0]], [*PROMPTS[2]], [1 + i % 15 for i in range(2 * dspark_kernels.LARGEST_BLOCK)], [3]]
    limits = [9, 4, 6, 7]
    expected = [
        target.generate(torch.tensor([prompt]), max_new_tokens=limit, do_sample=False)[0, len(prompt) :].tolist()
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    before = target.config._attn_implementation
    target.set_attn_implementation(attention.NAME)
    try:
        settings = ContinuousBatchingConfig(max_requests_per_batch=2)
        manager = target.init_continuous_batching(GenerationConfig(do_sample=False), settings, assistant_model=head)
        for prompt, limit in zip(prompts, limits, strict=True):
            manager.add_request(prompt, max_new_tokens=limit)
        loop = manager.loop
        while manager.num_waiting or manager.num_running:
            loop._turn()
        outputs = sorted((loop.router.output_queue.get() for _ in prompts), key=lambda own: own.request_id)
    finally:
        target.set_attn_implementation(before)
    assert [own.generated_tokens for own in outputs] == expected and "attention" in launches


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one prompt", "a batch"])
def test_samples_are_distributed_as_the_targets(pair, launches, monkeypatch, prompts, setting):
    """The joint distribution of three tokens, 5,000 draws or a few more (in torch, test_sampling.py takes 20,000 by
    default; there and here a seed gives the same tokens)."""
    monkeypatch.setattr("test_sampling.ROWS", 200)
    monkeypatch.setattr("test_sampling.DRAWS", 5000 if len(prompts) == 1 else 1800)
    target, head = pair
    kwargs, warpers = SETTINGS[setting]
    drawn = draw(target, head, list(prompts), max_new_tokens=TOKENS + 1, **kwargs)
    assert "verify" in launches and ("sequential" in launches) == setting.startswith("temperature")
    for prompt, tokens in zip(prompts, drawn, strict=True):
        assert p_value(tokens, exact_distribution(target, prompt, warpers)) > 1e-4


@pytest.mark.slow
def test_samples_under_a_schedule_that_changes(pair, launches, monkeypatch, shuffled):
    monkeypatch.setattr("test_sampling.ROWS", 200)
    monkeypatch.setattr("test_sampling.DRAWS", 1800)
    target, head = pair
    for prompt, tokens in zip(PROMPTS, draw(target, head, list(PROMPTS), max_new_tokens=TOKENS + 1), strict=True):
        assert p_value(tokens, exact_distribution(target, prompt, [])) > 1e-4


@pytest.mark.slow
def test_the_same_seed_gives_the_same_sample(pair, launches):
    target, head = pair
    samples = []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(target.generate(torch.tensor([PROMPTS[0]]), do_sample=True, assistant_model=head))
    assert torch.equal(*samples)


@pytest.mark.parametrize("where", ["kernels", "torch"])
def test_logits_that_are_no_distribution_are_an_error(pair, where, request, monkeypatch):
    target, head = pair
    if where == "kernels":
        request.getfixturevalue("launches")
    verify = rounds.verify

    def spoilt(*args):
        passed, drafts = verify(*args)
        passed.logits.fill_(float("nan"))
        return passed, drafts

    monkeypatch.setattr(rounds, "verify", spoilt)
    with pytest.raises(ValueError, match="row 0 of the batch hold NaN"):
        greedy(target, assistant_model=head)
