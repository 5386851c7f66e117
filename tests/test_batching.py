"""Requests that come and go on one engine: what each writes is what it writes alone."""

import asyncio
import ctypes
import inspect
import os
import queue
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import psutil
import pytest
import torch
from conftest import GSM8K_SAMPLE, tiny_head, tiny_target, whole_blocks
from test_sampling import PROMPTS, SETTINGS, TOKENS, VOCABULARY, exact_distribution, p_value
from transformers import ContinuousBatchingConfig, GenerationConfig, GenerationMixin, LogitsProcessor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

import dspark_hf
from dspark_hf.evaluation.prompts import encode, read_prompts
from dspark_hf.generation.planner import Planner
from dspark_hf.generation.releases import PAGE_SIZE
from dspark_hf.serving import hook, memory
from dspark_hf.serving import manager as manager_module
from dspark_hf.serving import request as request_module
from dspark_hf.serving.manager import DSparkBatchingManager

LONG = {"max_position_embeddings": 1024}


def config(slots=4, **kwargs):
    return ContinuousBatchingConfig(max_requests_per_batch=slots, num_blocks=64, **{PAGE_SIZE: 256} | kwargs)


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(vocab_size=40, sharpness=3, **LONG)
    return target, whole_blocks(tiny_head(target))


def texts(count, seed=0, longest=30):
    chance = random.Random(seed)
    return [[chance.randrange(1, 40) for _ in range(chance.randrange(1, longest))] for _ in range(count)]


def alone(target, prompt, **kwargs):
    """What plain `generate` writes."""
    output = target.generate(torch.tensor([prompt]), **{"do_sample": False, "max_new_tokens": 20} | kwargs)
    return output[0, len(prompt) :].tolist()


def encoded(prompt, tokenizer):
    return encode([prompt], tokenizer, "cpu")["input_ids"][0].tolist()


def results(manager, count):
    """The last word on so many requests, by id."""
    found = {}
    while len(found) < count:
        result = manager.get_result(timeout=30)
        assert result is not None, "nothing came"
        if result.is_finished():
            found[result.request_id] = result
    return found


# -- What is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_every_prompt_of_a_batch_is_continued_as_alone(pair, slots):
    target, head = pair
    prompts = texts(12)
    outputs = target.generate_batch(
        prompts,
        assistant_model=head,
        continuous_batching_config=config(slots, return_logprobs=True),
        record_timestamps=True,
        max_new_tokens=20,
        do_sample=False,
    )
    assert list(outputs) == [f"req_{i}" for i in range(12)]
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert output.prompt_ids == prompt and output.error is None
        assert output.generated_tokens == alone(target, prompt)
        assert len(output.logprobs) == len(output.timestamps) == 20 and output.timestamps == sorted(output.timestamps)
        assert output.created_time <= output.lifespan[0] <= output.timestamps[0] <= output.lifespan[1]


def test_logprobs_are_those_of_the_target(pair):
    target, head = pair
    (prompt,) = texts(1, seed=3)
    settings = {"continuous_batching_config": config(return_logprobs=True), "max_new_tokens": 9, "do_sample": False}
    (output,) = target.generate_batch([prompt], assistant_model=head, **settings).values()
    with torch.no_grad():
        logits = target(torch.tensor([prompt + output.generated_tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(output.generated_tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(output.logprobs), expected, atol=1e-4)


def test_requests_that_arrive_at_random_with_settings_of_their_own(pair):
    """Limits, ends, penalties: each as alone, whoever its neighbours are."""
    target, head = pair
    chance = random.Random(1)
    kinds = [{}, {"eos_token_id": [3, 7, 9]}, {"repetition_penalty": 1.3}, {"min_new_tokens": 4, "eos_token_id": 5}]
    asked = [(prompt, chance.choice(kinds) | {"max_new_tokens": chance.randrange(1, 25)}) for prompt in texts(24)]
    sampled = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 12}
    with target.continuous_batching_context_manager(
        GenerationConfig(do_sample=False), continuous_batching_config=config(), assistant_model=head
    ) as manager:
        ids = {}
        for i, (prompt, settings) in enumerate(asked):
            ids[manager.add_request(prompt, **settings)] = i
            if i % 5 == 0:
                manager.add_request(prompt, request_id=f"beside {i}", **sampled)
            if chance.random() < 0.5:
                manager.loop.wake_up.wait(0.01)
        found = results(manager, len(asked) + 5)
    for request_id, i in ids.items():
        assert found[request_id].generated_tokens == alone(target, asked[i][0], **asked[i][1]), asked[i][1]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["temperature 0.7", "top-p 0.8"])
def test_sampled_requests_are_distributed_as_the_target(setting):
    target = tiny_target(VOCABULARY, sharpness=2)
    head, (kwargs, warpers) = tiny_head(target), SETTINGS[setting]
    drawn = target.generate_batch(
        [PROMPTS[0]] * 3000,
        GenerationConfig(**{"do_sample": True, "top_k": 0, "max_new_tokens": TOKENS + 1} | kwargs),
        continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=200),
        assistant_model=head,
    )
    tokens = torch.tensor([output.generated_tokens[:TOKENS] for output in drawn.values()])
    assert p_value(tokens, exact_distribution(target, PROMPTS[0], warpers)) > 1e-4


def test_beside_a_sampled_request_no_schedule_looks_ahead(pair, monkeypatch):
    """Whatever the manager's own default is: it would bias what is sampled."""
    target, head = pair
    seen, plan = [], Planner.plan

    def noting(self, rows, *args):
        planned = plan(self, rows, *args)
        seen.append((self.scheduler.greedy, any(row.processors.do_sample for row in rows)))
        return planned

    monkeypatch.setattr(Planner, "plan", noting)
    for default in (False, True):
        with target.continuous_batching_context_manager(
            GenerationConfig(do_sample=default), continuous_batching_config=config(), assistant_model=head
        ) as manager:
            manager.add_request([3, 5], max_new_tokens=10, do_sample=True)
            manager.add_request([7, 2], max_new_tokens=60, do_sample=False)
            results(manager, 2)
    assert set(seen) == {(False, True), (True, False)}


def test_a_seed_reproduces_a_sample_whoever_is_beside(pair):
    target, head = pair
    prompt, *others = texts(8, seed=5)
    settings = {"do_sample": True, "temperature": 1.2, "max_new_tokens": 15}
    written = []
    for beside in ([], others, others[:3]):
        with target.continuous_batching_context_manager(
            continuous_batching_config=config(),
            assistant_model=head,
            num_assistant_tokens_schedule="constant",
        ) as manager:
            for other in beside:
                manager.add_request(other, max_new_tokens=9 + len(other), do_sample=len(other) % 2 == 0)
            own = manager.add_request(prompt, seed=11, **settings)
            another = manager.add_request(prompt, seed=12, **settings)
            found = results(manager, len(beside) + 2)
        written.append((found[own].generated_tokens, found[another].generated_tokens))
    assert written[0] == written[1] == written[2] and written[0][0] != written[0][1]


def test_several_texts_of_a_prompt(pair):
    target, head = pair
    settings = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3, "max_new_tokens": 12}
    outputs = target.generate_batch(texts(2), assistant_model=head, seed=4, **settings)
    names = [f"req_{i}{child}" for i in range(2) for child in ("__child#0", "__child#1", "")]
    assert list(outputs) == names and all(len(output.generated_tokens) == 12 for output in outputs.values())
    assert len({tuple(output.generated_tokens) for output in outputs.values()}) == 6


def test_stop_strings_end_a_request():
    target, head, tokenizer = dspark_hf.embedded_pair(torch.float32)
    prompt = encoded("Tom has 3 apples and buys 5 more. How many apples does he have?", tokenizer)
    whole = tokenizer.decode(alone(target, prompt, max_new_tokens=24))
    stop = whole.split()[3]
    settings = {"stop_strings": [stop], "tokenizer": tokenizer, "max_new_tokens": 24, "do_sample": False}
    with target.continuous_batching_context_manager(assistant_model=head) as manager:
        manager.add_request(prompt, **settings)
        (found,) = results(manager, 1).values()
    assert found.generated_tokens == alone(target, prompt, **settings)
    assert len(found.generated_tokens) < 24


@pytest.mark.slow
def test_word_problems_at_random_times_are_answered_as_alone():
    target, head, tokenizer = dspark_hf.embedded_pair(torch.float32)
    prompts = [encoded(prompt, tokenizer) for prompt in read_prompts(GSM8K_SAMPLE)] * 3
    chance = random.Random(0)
    with target.continuous_batching_context_manager(
        GenerationConfig(do_sample=False, max_new_tokens=48),
        continuous_batching_config=config(16),
        assistant_model=head,
    ) as manager:
        ids = {}
        for i, prompt in enumerate(prompts[:64]):
            ids[manager.add_request(prompt)] = i
            manager.loop.wake_up.wait(chance.random() / 20)
        found = results(manager, len(ids))
    for request_id, i in ids.items():
        assert found[request_id].generated_tokens == alone(target, prompts[i], max_new_tokens=48)


# -- Prompts whose beginning is known ----------------------------------------------------------------------------------


def tokens_read(target):
    """Of every pass the tokens of all rows, from now on."""
    read = []
    hook = target.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    return read, hook


def test_the_next_turn_of_a_chat_reads_what_is_new(pair):
    target, head = pair
    (first,) = texts(1, seed=7, longest=60)
    first = (first * 8)[:60]
    passes = {}
    for shares in (True, False):
        with target.continuous_batching_context_manager(
            GenerationConfig(do_sample=False, max_new_tokens=20),
            continuous_batching_config=config(allow_block_sharing=shares),
            assistant_model=head,
        ) as manager:
            manager.add_request(first)
            (answer,) = results(manager, 1).values()
            second = first + answer.generated_tokens + [4, 8, 15]
            read, own = tokens_read(target)
            manager.add_request(second)
            (found,) = results(manager, 1).values()
            own.remove()
        assert found.generated_tokens == alone(target, second)
        passes[shares] = read
    # The last token of the answer, which the target had not seen, and the new ones; then as many rounds as without.
    assert passes[True][0] == 4 and passes[False][0] == len(second)
    assert passes[True][1:] == passes[False][1:]


def test_a_text_that_parts_ways_is_of_use_up_to_there(pair):
    target, head = pair
    (first,) = texts(1, seed=9)
    first = (first * 8)[:40]
    other = first[:25] + [(first[25] + 1) % 40] + first[26:]
    with target.continuous_batching_context_manager(
        GenerationConfig(do_sample=False, max_new_tokens=10), continuous_batching_config=config(), assistant_model=head
    ) as manager:
        manager.add_request(first)
        results(manager, 1)
        for prompt, rest in ((other, 15), (first, 1)):
            read, own = tokens_read(target)
            manager.add_request(prompt)
            (found,) = results(manager, 1).values()
            own.remove()
            assert read[0] == rest and found.generated_tokens == alone(target, prompt, max_new_tokens=10)


def test_old_texts_make_room(pair):
    target, head = pair
    manager = target.init_continuous_batching(
        GenerationConfig(do_sample=False, max_new_tokens=5),
        ContinuousBatchingConfig(max_requests_per_batch=1, num_blocks=1, **{PAGE_SIZE: 512}),
        assistant_model=head,
    )
    manager.start()
    manager.add_requests(texts(30, seed=2))
    results(manager, 30)
    manager.stop()
    assert 0 < sum(map(len, manager.loop.texts.texts)) <= 128 and not manager.loop.texts.known


def test_a_long_prompt_is_read_between_the_rounds_of_others(pair):
    target, head = pair
    (short,) = texts(1, seed=4)
    long = (short * 40)[:200]
    with target.continuous_batching_context_manager(
        GenerationConfig(do_sample=False),
        continuous_batching_config=config(max_batch_tokens=16),
        assistant_model=head,
    ) as manager:
        first = manager.add_request(short, max_new_tokens=60, streaming=True)
        next(manager.request_id_iter(first))
        read, own = tokens_read(target)
        second = manager.add_request(long, max_new_tokens=10)
        found = results(manager, 2)
        own.remove()
    assert found[first].generated_tokens == alone(target, short, max_new_tokens=60)
    assert found[second].generated_tokens == alone(target, long, max_new_tokens=10)
    pieces = [i for i, count in enumerate(read) if count == 16]
    assert len(pieces) >= 200 // 16 - 1 and pieces[-1] - pieces[0] > 200 // 16, "rounds should come in between"


# -- The manager -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention, shares", [("sdpa", True), ("eager", False)])
def test_prompts_are_read_in_the_rounds_of_others(attention, shares):
    """In one pass of the target, where its attention can be packed: who is there writes on while others join."""
    target = tiny_target(vocab_size=40, sharpness=3, **LONG)
    target.set_attn_implementation(attention)
    manager = target.init_continuous_batching(
        GenerationConfig(do_sample=False, max_new_tokens=20), config(), assistant_model=whole_blocks(tiny_head(target))
    )
    loop, passes, prompts = manager.loop, [], texts(3, seed=5)
    handle = target.register_forward_pre_hook(lambda *args: passes.append(1))
    manager.add_request(prompts[0])
    loop._turn()
    loop._turn()
    (first,), before = [own.row for own in loop.active], len(passes)
    written = len(first.committed)
    manager.add_requests(prompts[1:])
    loop._turn()
    assert len(passes) - before == 1 and (len(first.committed) > written) == shares
    assert [len(own.row.committed) for own in loop.active[1:]] == [1, 1]
    while loop.active:
        loop._turn()
    outputs = sorted((loop.router.output_queue.get() for _ in prompts), key=lambda own: own.request_id)
    handle.remove()
    assert [own.generated_tokens for own in outputs] == [alone(target, prompt) for prompt in prompts]


def test_results_stream_and_can_be_iterated(pair):
    target, head = pair
    (prompt,) = texts(1)
    with target.continuous_batching_context_manager(
        continuous_batching_config=config(), assistant_model=head
    ) as manager:
        request = manager.add_request(prompt, max_new_tokens=20, do_sample=False, streaming=True)
        seen = [output.generated_tokens for output in manager.request_id_iter(request)]
    assert len(seen) > 2 and seen[-1] == alone(target, prompt)
    assert all(before == after[: len(before)] for before, after in zip(seen, seen[1:], strict=False))


def test_an_event_loop_is_told(pair):
    target, head = pair

    async def ask(manager, prompt):
        request, done = f"mine {prompt[0]}", asyncio.get_running_loop().create_future()
        manager.register_result_handler(request, lambda result: result.is_finished() and done.set_result(result))
        manager.add_request(prompt, request_id=request, max_new_tokens=8, do_sample=False)
        return (await done).generated_tokens

    async def ask_all(manager, prompts):
        return await asyncio.gather(*(ask(manager, prompt) for prompt in prompts))

    prompts = [[i, 5, 9] for i in range(1, 7)]
    with target.continuous_batching_context_manager(
        continuous_batching_config=config(), assistant_model=head
    ) as manager:
        assert asyncio.run(ask_all(manager, prompts)) == [alone(target, p, max_new_tokens=8) for p in prompts]
        assert not manager.loop.router.result_handlers


def test_handlers_of_two_event_loops_and_of_none_share_a_manager(pair):
    target, head = pair
    seen = {}

    def asked_in(name, manager, prompt):
        async def ask():
            done = asyncio.get_running_loop().create_future()

            def told(result):
                seen.setdefault(name, set()).add(threading.current_thread())
                if result.is_finished():
                    done.set_result(result.generated_tokens)

            manager.register_result_handler(name, told)
            manager.add_request(prompt, request_id=name, streaming=True, max_new_tokens=30, do_sample=False)
            return await done, threading.current_thread()

        return asyncio.run(ask())

    first, second, third = texts(3, seed=8)
    with (
        target.continuous_batching_context_manager(
            continuous_batching_config=config(), assistant_model=head
        ) as manager,
        ThreadPoolExecutor(2) as pool,
    ):
        results = queue.SimpleQueue()
        loops = {name: pool.submit(asked_in, name, manager, p) for name, p in (("one", first), ("two", second))}
        manager.register_result_handler("none", results.put)
        manager.add_request(third, request_id="none", max_new_tokens=30, do_sample=False)
        assert results.get(timeout=30).generated_tokens == alone(target, third, max_new_tokens=30)
        for (name, future), prompt in zip(loops.items(), (first, second), strict=True):
            written, thread = future.result(timeout=30)
            assert written == alone(target, prompt, max_new_tokens=30) and seen[name] == {thread}


def test_drafts_can_be_switched_off_and_on(pair):
    """Plain continuous batching in between, and the same text."""
    target, head = pair
    (prompt,) = texts(1, seed=9)
    verified = []
    with target.continuous_batching_context_manager(
        GenerationConfig(do_sample=False), continuous_batching_config=config(), assistant_model=head
    ) as manager:
        for drafts in (False, True):
            manager.drafts = drafts
            manager.add_request(prompt, max_new_tokens=30)
            (output,) = results(manager, 1).values()
            assert output.generated_tokens == alone(target, prompt, max_new_tokens=30) and manager.drafts == drafts
            verified.append(output.verified)
    assert verified[0] == 0 < verified[1]


def test_a_canceled_request_frees_its_row(pair):
    target, head = pair
    prompts = texts(4, seed=6)
    with target.continuous_batching_context_manager(
        GenerationConfig(do_sample=False), continuous_batching_config=config(2), assistant_model=head
    ) as manager:
        endless = [manager.add_request(prompt, max_new_tokens=400, streaming=True) for prompt in prompts[:2]]
        next(manager.request_id_iter(endless[0]))
        waiting = manager.add_request(prompts[2], max_new_tokens=400)
        last = manager.add_request(prompts[3], max_new_tokens=10)
        for request in (endless[0], waiting, "nobody's"):
            manager.cancel_request(request)
        found = {}
        while last not in found:
            result = manager.get_result(timeout=30)
            if result.is_finished():
                found[result.request_id] = result
        manager.cancel_request(endless[1])
        found |= results(manager, 1)
    assert found[last].generated_tokens == alone(target, prompts[3], max_new_tokens=10)
    assert found[waiting].generated_tokens == []
    for request, prompt in zip(endless, prompts, strict=False):
        written = found[request].generated_tokens
        assert 0 < len(written) < 400 and written == alone(target, prompt, max_new_tokens=400)[: len(written)]


def test_a_stopped_manager_has_answered_or_says_so(pair):
    target, head = pair
    manager = target.init_continuous_batching(GenerationConfig(do_sample=False), config(2), assistant_model=head)
    manager.add_requests(texts(3), max_new_tokens=6)
    manager.start()
    manager.stop()
    assert not manager.is_running() and len(results(manager, 3)) == 3
    manager.start()
    manager.add_requests(texts(3), max_new_tokens=800)
    manager.stop(hard_stop=True)
    assert all("stopped" in output.error for output in results(manager, 3).values())
    assert manager.get_result(timeout=1) is None


def test_what_goes_wrong_with_one_request_is_its_own(pair):
    """A token whose embedding is no number: the row that reads it ends, its neighbours and who comes next do not."""
    target, head = tiny_target(vocab_size=40, sharpness=3), None
    head = whole_blocks(tiny_head(target))
    prompts = [[1 + p % 38 for p in prompt] for prompt in texts(6, seed=8)]
    good = [alone(target, prompt, suppress_tokens=[39]) for prompt in prompts]
    with torch.no_grad():
        target.get_input_embeddings().weight[39] = torch.nan
    with target.continuous_batching_context_manager(
        GenerationConfig(do_sample=False, max_new_tokens=20, suppress_tokens=[39]),
        continuous_batching_config=config(2),
        assistant_model=head,
    ) as manager:
        ids = []
        for prompt in prompts:
            ids.append(manager.add_request(prompt))
            manager.add_request([5, 39, 2], request_id=f"bad {len(ids)}")
        found = results(manager, 12)
    assert [found[request].generated_tokens for request in ids] == good
    assert all("NaN" in found[f"bad {i + 1}"].error and not found[f"bad {i + 1}"].generated_tokens for i in range(6))


def test_a_round_that_fails_ends_its_requests_only(pair, monkeypatch):
    target, head = pair
    first, second = texts(2, seed=11)
    manager = target.init_continuous_batching(GenerationConfig(do_sample=False), config(1), assistant_model=head)
    monkeypatch.setattr(manager.loop.engine, "step", lambda: 1 / 0)
    manager.add_request(first, request_id="first", max_new_tokens=9)
    manager.add_request(second, request_id="second", max_new_tokens=9)
    manager.start()
    found = results(manager, 2)
    manager.stop()
    assert "ZeroDivisionError" in found["first"].error
    assert found["second"].generated_tokens == alone(target, second, max_new_tokens=9)


def test_requests_that_choose_alike_are_treated_as_one(pair):
    """And only those: settings that look the same when they are printed are not."""
    target, head = pair
    manager = target.init_continuous_batching(continuous_batching_config=config(), assistant_model=head)

    def processors(**settings):
        manager.add_request([1, 2], max_new_tokens=3, **settings)
        return manager.loop.incoming.queue[-1].row.processors

    assert processors(do_sample=False) is processors(do_sample=False)
    assert processors(do_sample=True, temperature=0.5) is processors(do_sample=True, temperature=0.5)
    assert processors(do_sample=True, temperature=0.5) is not processors(do_sample=True, temperature=0.6)
    many = [*range(1, 1100), 1101], [*range(1, 1100), 1102]
    assert processors(suppress_tokens=many[0]) is not processors(suppress_tokens=many[1])


class Odd(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
        ({"num_beams": 2}, "num_beams"),
        ({"nonsense": 3}, "nonsense"),
        ({"logits_processor": [Odd()]}, "Odd"),
        ({"num_assistant_tokens": 3}, "num_assistant_tokens"),
        ({"max_new_tokens": 5000}, "memory"),
        ({"seed": -1}, "seed"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"streamer": mock.Mock()}, "streamer"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_anything_runs(pair, settings, message):
    target, head = pair
    manager = target.init_continuous_batching(continuous_batching_config=config(), assistant_model=head)
    with pytest.raises(ValueError, match=message):
        manager.add_request([1, 2, 3], **settings)
    with pytest.raises(ValueError, match="prompt"):
        manager.add_request([])


@pytest.mark.parametrize("kwargs", [{"scheduler_type": "prefill_first"}, {"cpu_offload_space": 1.0}])
def test_settings_of_a_manager_that_it_cannot_keep(pair, kwargs):
    target, head = pair
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        target.init_continuous_batching(continuous_batching_config=config(**kwargs), assistant_model=head)
    with pytest.raises(ValueError, match="temperature"):
        target.init_continuous_batching(assistant_model=head, temperature=0.5)


def test_the_free_memory_of_a_host_is_what_can_be_had():
    """On a laptop most of it is taken by caches of files."""
    unused = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (
        0.9 * unused < memory.free_bytes(torch.device("cpu")) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's")
def test_what_the_c_library_keeps_is_given_back():
    kept, dropped = [], []
    for _ in range(1000):
        dropped.append(bytearray(100_000))
        kept.append(bytearray(2000))
    dropped.clear()
    before = psutil.Process().memory_info().rss
    memory.give_back()
    assert before - psutil.Process().memory_info().rss > 50 * 2**20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc's")
@pytest.mark.parametrize("together", [True, False])
def test_threads_take_memory_from_one_heap(together):
    """In a process of its own, of whose heaps the C library gives account; by default a thread has one to itself."""
    code = f"""if True:
        import ctypes, threading
        from dspark_hf.serving.memory import keep_together
        if {together}:
            keep_together()
        libc, kept = ctypes.CDLL(None), []
        for _ in range(2):
            thread = threading.Thread(target=lambda: kept.append(bytearray(2000)))
            thread.start()
            thread.join()
        libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout.count("<heap ") == 1) == together


def test_too_little_memory_is_named_with_what_helps(pair, monkeypatch):
    target, head = pair
    token = memory.bytes_of_token(target.config, target.dtype) + memory.bytes_of_token(head.config, head.dtype)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8000 * token)
    manager = target.init_continuous_batching(assistant_model=head)
    with pytest.raises(ValueError, match="16 slots of 512 tokens.*for 4800.*max_requests_per_batch") as found:
        manager.add_request([1] * 100, max_new_tokens=200)
    assert "max_new_tokens" in str(found.value) and "max_memory_percent" in str(found.value)
    few = ContinuousBatchingConfig(max_requests_per_batch=9)
    manager = target.init_continuous_batching(continuous_batching_config=few, assistant_model=head)
    manager.add_request([1] * 100, max_new_tokens=200)


def test_managers_are_called_as_transformers_own(pair):
    """Every public method is there, with its arguments in their order; a stopped one can go on."""
    (target, head), prompt = pair, texts(1)[0]
    for name, stock in inspect.getmembers(ContinuousBatchingManager, inspect.isfunction):
        if name.startswith("_") or name == "switch_to_cb_friendly_attn":
            continue
        parameters = list(inspect.signature(getattr(DSparkBatchingManager, name)).parameters)
        asked = [own.name for own in inspect.signature(stock).parameters.values() if own.kind is not own.VAR_KEYWORD]
        assert set(asked) <= set(parameters) or name == "add_requests", name
    settings = GenerationConfig(do_sample=False, max_new_tokens=6)
    manager = target.init_continuous_batching(settings, config(), assistant_model=head)
    for _ in range(2):
        manager.start()
        manager.add_request(prompt)
        manager.stop()
        assert manager.get_result(timeout=1).generated_tokens == alone(target, prompt, max_new_tokens=6)
    positional = settings, config(), True, False, False, True
    (output,) = target.generate_batch([prompt], *positional, assistant_model=head).values()
    assert output.generated_tokens == alone(target, prompt, max_new_tokens=6) and len(output.timestamps) == 6


def test_settings_that_do_nothing_are_pointed_out(pair, monkeypatch):
    """Compiled rounds and what is made beforehand; the text is the same."""
    (target, head), said = pair, []
    for place in (manager_module, request_module, hook):
        monkeypatch.setattr(place.logger, "warning_once", said.append)
    settings = {"continuous_batching_config": config(), "assistant_model": head}
    (plain,) = target.generate_batch([[1, 2, 3]], GenerationConfig(max_new_tokens=5), **settings).values()
    assert not said
    static = GenerationConfig(max_new_tokens=5, cache_implementation="static")
    (output,) = target.generate_batch([[1, 2, 3]], static, **settings).values()
    assert output.generated_tokens == plain.generated_tokens
    assert "eagerly" in said[0] and "cache_implementation" in said[0]
    del said[:]
    settings["continuous_batching_config"] = config(use_cuda_graph=True)
    target.generate_batch([[1, 2, 3]], GenerationConfig(max_new_tokens=1), warmup=True, **settings)
    assert "warmup" in said[0] and "use_cuda_graph=True" in said[1]


def test_a_full_queue_says_so(pair):
    target, head = pair
    manager = target.init_continuous_batching(continuous_batching_config=config(max_queue_size=2), assistant_model=head)
    manager.add_requests([[1], [2]], max_new_tokens=2)
    with pytest.raises(queue.Full):
        manager.add_request([3], max_new_tokens=2)


def test_without_a_head_the_calls_are_transformers_own(monkeypatch):
    called = []
    target = tiny_target()
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        wrapped = getattr(GenerationMixin, name).__wrapped__
        assert wrapped.__module__.startswith("transformers.")
        method = hook._wrap(lambda self, *args, **kwargs: called.append((args, kwargs)), getattr(hook, name))
        method(target, [[1]], max_new_tokens=3)
        method(target, [[1]], assistant_model=None, max_new_tokens=3)
    assert called == [(([[1]],), {"max_new_tokens": 3})] * 6
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        target.generate_batch([[1]], assistant_model=tiny_target())
