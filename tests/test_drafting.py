"""What the head drafts does not depend on how the schedule got there."""

import pytest
import torch
from conftest import tiny_head, tiny_target
from transformers import LogitsProcessorList

from dspark_hf.generation import drafting
from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.processors import BlockProcessors
from dspark_hf.generation.target import Part, Target

ROWS = 4


@pytest.fixture
def pair():
    target = tiny_target(sharpness=3)
    return target, tiny_head(target)


def committed(rounds, seed=0):
    """States [R, C, m*d] and counts of several rounds."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(ROWS, 5, 32, generator=generator), torch.randint(1, 6, (ROWS,), generator=generator).tolist())
        for _ in range(rounds)
    ]


def block(drafter, rows=None, anchors=(3, 5, 7, 9), **kwargs):
    sampler = BlockProcessors(LogitsProcessorList(), True).draft_sampler(None)
    torch.manual_seed(1)
    return drafter.draft(torch.tensor(anchors), 3, sampler, rows, **kwargs)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_draft_catches_up_on_rounds_without_one(pair):
    often, once = Drafter(pair[1], pair[0], ROWS), Drafter(pair[1], pair[0], ROWS)
    for features, counts in committed(6):
        often.append(features, counts)
        once.append(features, counts)
        expected = block(often)
    found = block(once)
    close(found.logits[:, 0], expected.logits[:, 0])
    close(found.confidence_logits[:, 0], expected.confidence_logits[:, 0])
    assert once.cache.lengths == often.cache.lengths


@torch.no_grad()
def test_some_rows_draft_and_the_others_catch_up_later(pair):
    everybody, some = Drafter(pair[1], pair[0], ROWS), Drafter(pair[1], pair[0], ROWS)
    plans = [[0, 2], [1], [0, 1, 3], [2], None]
    for rows, (features, counts) in zip(plans, committed(5), strict=True):
        everybody.append(features, counts)
        some.append(features, counts)
        expected, found = block(everybody), block(some, rows)
        close(found.logits[:, 0], expected.logits[range(ROWS) if rows is None else rows, 0])
    assert some.cache.lengths == everybody.cache.lengths


@torch.no_grad()
def test_rows_that_leave_take_what_waits_along(pair):
    whole, fewer = Drafter(pair[1], pair[0], ROWS), Drafter(pair[1], pair[0], ROWS)
    for features, counts in committed(3):
        whole.append(features, counts)
        fewer.append(features.clone(), counts)
    fewer.keep([1, 3])
    expected = block(whole)
    sampler = BlockProcessors(LogitsProcessorList(), True).draft_sampler(None)
    found = fewer.draft(torch.tensor([5, 9]), 3, sampler)
    close(found.logits[:, 0], expected.logits[[1, 3], 0])


@torch.no_grad()
def test_what_waits_is_taken_in_before_it_becomes_much(pair, monkeypatch):
    monkeypatch.setattr(drafting, "LONGEST_WAIT", 12)
    often, once = Drafter(pair[1], pair[0], ROWS), Drafter(pair[1], pair[0], ROWS)
    for features, counts in committed(9):
        often.append(features, counts)
        once.append(features, counts)
        expected = block(often)
        once.flush()
        assert sum(features.shape[1] for features, _ in once.pending) <= 12 + 5 + 5
    close(block(once).logits[:, 0], expected.logits[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_short_draft_saves_the_positions_behind(pair, length, monkeypatch):
    """LM head, sequential head and choice run for drafted positions only."""
    target, head = pair
    drafter, whole = Drafter(head, target, ROWS), Drafter(head, target, ROWS)
    (features, counts), projected, steps = committed(1)[0], [], []
    drafter.append(features, counts)
    whole.append(features, counts)
    expected = block(whole)
    base, step = head.base_logits, head.markov_head.step
    monkeypatch.setattr(
        head, "base_logits", lambda hidden, embeddings: projected.append(hidden.shape[1]) or base(hidden, embeddings)
    )
    monkeypatch.setattr(head.markov_head, "step", lambda *args: steps.append(1) or step(*args))
    sampler = BlockProcessors(LogitsProcessorList(), True).draft_sampler(None)
    torch.manual_seed(1)
    found = drafter.draft(torch.tensor((3, 5, 7, 9)), length, sampler)
    assert found.tokens.tolist() == expected.tokens[:, :length].tolist()
    close(found.confidence_logits, expected.confidence_logits[:, :length])
    assert len(steps) == length and projected == [length]


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 5])
def test_a_packed_pass_equals_a_padded_one(window):
    kwargs = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0} if window else {}
    target = tiny_target(**kwargs)
    runner = Target(target, [0, 1])
    assert runner.packs
    lengths = torch.tensor([3, 0, 2, 1])
    tokens = torch.randint(1, 16, (ROWS, 4))
    results, caches = [], []
    for packed in (False, True):
        cache = runner.new_cache(ROWS)
        prompt = torch.arange(ROWS * 9).view(ROWS, 9) % 16
        runner.forward(prompt, cache)
        cache.commit([9, 4, 7, 8])
        part = Part(tokens, cache.packing(1 + lengths, 4, 4 + 6))
        results.append(runner.forward_packed([part], cache)[0] if packed else runner.forward(tokens, cache))
        caches.append(cache)
    filled = torch.arange(4) <= lengths[:, None]
    for name in ("logits", "features"):
        padded, packed = (getattr(result, name) for result in results)
        close(packed[filled], padded[filled])
        assert not packed[~filled].any()
    for r, (start, count) in enumerate(zip([9, 4, 7, 8], (1 + lengths).tolist(), strict=True)):
        for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
            close(a.keys[r, :, : start + count], b.keys[r, :, : start + count])


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [[3, 0, 2], [3, 3, 3]])
def test_prompts_read_beside_drafts_equal_those_read_alone(window, lengths):
    """Rows at different places of which one goes on from a text that is cached."""
    kwargs = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0} if window else {}
    runner = Target(tiny_target(**kwargs), [0, 1])
    lengths, counts, cached = torch.tensor(lengths), torch.tensor([6, 2]), [0, 5]
    tokens, prompts = torch.randint(1, 16, (3, 4)), torch.randint(1, 16, (2, 6))

    def cache_of(starts):
        cache = runner.new_cache(len(starts))
        text = torch.arange(len(starts) * 9).view(len(starts), 9) % 16
        runner.forward(text, cache)
        cache.commit(list(starts))
        return cache

    starts = [9, 4, 7]
    cache = cache_of([*starts, *cached])
    drafts = Part(tokens, cache.packing(1 + lengths, 4, 3 + int(lengths.sum())))
    beside = Part(prompts, cache.packing(counts, 6, 8, first=3), is_prompt=True)
    passed, read = runner.forward_packed([drafts, beside], cache)
    alone = runner.forward(tokens, cache_of([*starts, *cached]), rows=[0, 1, 2])
    filled = torch.arange(4) <= lengths[:, None]
    close(passed.logits[filled], alone.logits[filled])
    close(passed.features[filled], alone.features[filled])
    for r, count in enumerate(counts.tolist()):
        other = cache_of([*starts, *cached])
        one = runner.forward(prompts[r : r + 1, :count], other, rows=[3 + r])
        close(read.logits[r, 0], one.logits[0, -1])
        close(read.features[r, :count], one.features[0])
        for a, b in zip(cache.layers, other.layers, strict=True):
            close(a.keys[3 + r, :, : cached[r] + count], b.keys[3 + r, :, : cached[r] + count])


def test_packing_ends_with_the_pass():
    """An error inside leaves transformers' attention as it was."""
    target = tiny_target()
    runner = Target(target, [0])
    cache = runner.new_cache(2)
    part = Part(torch.full((2, 2), 10**6), cache.packing(torch.tensor([2, 1]), 2, 3))
    with pytest.raises(IndexError):
        runner.forward_packed([part], cache)
    ids = torch.tensor([[1, 2, 3]])
    assert target.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 6)
