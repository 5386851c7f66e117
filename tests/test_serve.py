"""The server, asked by OpenAI's own client."""

import asyncio
import contextlib
import json
import signal
import socket
import string
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn
from ports import free_port
from shares import rest_slow
from test_batching import alone
from test_hybrids import pair
from test_targets import VOCAB
from tokenizers import Tokenizer, decoders, models
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerFast

import dspark_hf
from dspark_hf.serving.app import Limits, Service, build
from dspark_hf.serving.text import TextStream

KEY, NAME = "a secret", "pair"
QUESTION = "Tom has 3 apples and buys 5 more. How many apples does he have?"


def wait_for(condition):
    """Until something has happened that must; a test that hangs here has failed."""
    while not condition():
        time.sleep(0.01)


@contextlib.contextmanager
def serving(service):
    """A server that runs in a thread, and its address."""
    server = uvicorn.Server(uvicorn.Config(build(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def parts():
    return dspark_hf.embedded_pair(torch.float32)


@pytest.fixture(scope="module")
def service(parts):
    target, head, tokenizer = parts
    manager = target.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=target.generation_config.eos_token_id),
        ContinuousBatchingConfig(max_requests_per_batch=16, max_queue_size=64),
        assistant_model=head,
    )
    return Service(manager, tokenizer, NAME, KEY, Limits(body=20_000, prompt=500))


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as own:
        yield own


def chat_ids(tokenizer, text=QUESTION):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def expected(parts, ids, count):
    target, _, tokenizer = parts
    return tokenizer.decode(alone(target, ids, max_new_tokens=count), skip_special_tokens=True)


def ask(text=QUESTION, **kwargs):
    return {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 24} | kwargs


# -- Answers ---------------------------------------------------------------------------------------------------------


def test_chat(client, parts):
    answer = client.chat.completions.create(**ask())
    assert answer.choices[0].message.content == expected(parts, chat_ids(parts[2]), 24)
    assert answer.model == NAME and answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens == len(chat_ids(parts[2])) and usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    drafts, details = usage.dspark, usage.completion_tokens_details
    assert details.accepted_prediction_tokens == drafts["accepted"]
    assert drafts["accepted"] <= drafts["verified"] <= drafts["drafted"]
    # A round writes what it accepts and one more; the first token comes from the prompt.
    assert usage.completion_tokens <= 1 + drafts["rounds"] + drafts["accepted"]


def test_a_chat_streams(client, parts):
    chunks = list(client.chat.completions.create(**ask(stream=True, stream_options={"include_usage": True})))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == expected(parts, chat_ids(parts[2]), 24) and len(pieces) > 2
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens and not chunks[-1].choices


def test_a_conversation_with_parts(client, parts):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Tom has 3 apples."}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "How many?"},
    ]
    plain = [{"role": own["role"], "content": own["content"]} for own in messages]
    plain[0]["content"] = "Tom has 3 apples."
    ids = parts[2].apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=12)
    assert answer.choices[0].message.content == expected(parts, ids, 12)


def test_completions_of_text_and_of_tokens(client, parts):
    target, _, tokenizer = parts
    ids = tokenizer("def add(a, b):")["input_ids"]
    for prompt in ("def add(a, b):", ids, ["def add(a, b):"]):
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=16, temperature=0, logprobs=0)
        assert answer.choices[0].text == expected(parts, ids, 16)
        logprobs = answer.choices[0].logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == answer.usage.completion_tokens
        assert all(value <= 0 for value in logprobs.token_logprobs)
    streamed = client.completions.create(model=NAME, prompt=ids, max_tokens=16, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected(parts, ids, 16)


def test_logprobs_of_a_chat_are_of_every_token(client):
    whole = client.chat.completions.create(**ask(logprobs=True))
    logprobs = [own.logprob for own in whole.choices[0].logprobs.content]
    assert len(logprobs) == whole.usage.completion_tokens
    streamed = client.chat.completions.create(**ask(logprobs=True, stream=True))
    told = [own for chunk in streamed for own in chunk.choices[0].logprobs.content]
    assert [own.logprob for own in told] == pytest.approx(logprobs, abs=1e-4)


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(client, parts):
    whole = expected(parts, chat_ids(parts[2]), 24)
    stop = whole[8:11]
    answer = client.chat.completions.create(**ask(stop=[stop, "never"]))
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 24
    streamed = client.chat.completions.create(**ask(stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole[: whole.index(stop)]


def test_sampling_settings_are_taken(client):
    texts = {
        client.chat.completions.create(**ask(temperature=1.5, top_p=0.95)).choices[0].message.content for _ in range(4)
    }
    assert len(texts) > 1


def test_a_text_is_told_as_far_as_it_is_final():
    class Letters:
        def decode(self, tokens, skip_special_tokens):
            return "".join(map(chr, tokens)).replace("#", "\ufffd")

    stream = TextStream(Letters(), ["stop"])
    text = [ord(letter) for letter in "a sto b# c stop d"]
    pieces = [stream.piece(text[:n], n == len(text)) for n in range(1, len(text) + 1)]
    assert pieces[4] == "" and "".join(pieces) == "a sto b\ufffd c " and stream.is_stopped
    stream = TextStream(Letters(), ["stop"])
    assert stream.piece([ord(letter) for letter in "a sto"], True) == "a sto" and not stream.is_stopped


# -- Many ------------------------------------------------------------------------------------------------------------


def test_32_streams_at_once(url, parts, service):
    questions = [f"Sam reads {n} pages a day. How many pages does he read in {n % 7 + 2} days?" for n in range(2, 34)]

    async def text_of(own, question):
        stream = await own.chat.completions.create(**ask(question, stream=True, max_tokens=9))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_texts():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as own:
            return await asyncio.gather(*(text_of(own, question) for question in questions))

    texts = asyncio.run(all_texts())
    assert texts == [expected(parts, chat_ids(parts[2], question), 9) for question in questions]
    wait_for(lambda: not service.manager.num_running)


def test_a_client_that_leaves_frees_its_row(client, service):
    stream = client.chat.completions.create(**ask(max_tokens=1500, temperature=2, stream=True))
    next(iter(stream))
    assert service.manager.num_running
    stream.close()
    wait_for(lambda: not service.manager.num_running)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_hangs_up_frees_its_row_within_a_round(url, service, monkeypatch, stream, begun):
    """Counted in rounds, that under way included, from when the server has noticed; before the first token too."""
    manager, steps = service.manager, []
    wait_for(lambda: not manager.num_running)
    # A queue that answers as it would, and says what was put in.
    canceled, step = [], manager.loop.engine.step
    monkeypatch.setattr(
        manager, "cancel_request", lambda own, of=manager.cancel_request: (of(own), canceled.append(own))
    )
    monkeypatch.setattr(manager.loop.engine, "step", lambda: (steps.append(len(canceled)), step())[1])
    body = json.dumps(ask(max_tokens=1500, temperature=2, stream=stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\n"
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        stack.enter_context(manager.pause())
        client = socket.create_connection((host, int(port)))
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: manager.num_running)
        if begun:
            stack.close()
            wait_for(lambda: len(steps) > 2)
            stack.enter_context(manager.pause())
        client.close()
        wait_for(lambda: canceled)
    wait_for(lambda: not manager.num_running)
    assert sum(count > 0 for count in steps) <= 1


def test_a_full_queue_is_told_to_come_again(client, service, monkeypatch):
    monkeypatch.setattr(service.manager.config, "max_queue_size", 1)
    asked = [threading.Thread(target=client.chat.completions.create, kwargs=ask(max_tokens=1)) for _ in range(2)]
    with service.manager.pause():
        asked[0].start()
        wait_for(lambda: service.manager.num_running)
        asked[1].start()
        wait_for(lambda: service.manager.num_waiting)
        with pytest.raises(openai.RateLimitError) as found:
            client.chat.completions.create(**ask(max_tokens=1))
    for thread in asked:
        thread.join()
    assert found.value.response.headers["retry-after"] == "1" and found.value.code == "queue_full"


# -- What is refused -------------------------------------------------------------------------------------------------


def test_keys(url):
    for key in ("wrong", KEY[:-1], KEY + "s"):
        response = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as own,
        pytest.raises(openai.AuthenticationError),
    ):
        own.chat.completions.create(**ask())
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "changes, status, word",
    [
        ({"model": "another"}, 404, "another"),
        ({"temperature": 3}, 400, "temperature"),
        ({"n": 2}, 400, "n"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**12}, 400, "memory"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "500"),
        ({"messages": [{"role": "user", "content": "word " * 6000}]}, 413, "20000"),
    ],
)
def test_what_means_nothing_here_is_refused_by_name(client, changes, status, word):
    with pytest.raises(openai.APIStatusError) as found:
        client.post("/chat/completions", body=ask() | changes, cast_to=object)
    assert found.value.status_code == status and word in found.value.body["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"a"', b"\xff\xfe", json.dumps({"model": NAME}).encode()])
def test_malformed_bodies(url, content):
    response = httpx.post(f"{url}/v1/completions", content=content, headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_other_paths_and_methods(url):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        response = httpx.request(method, url + path)
        assert response.status_code == status and path in response.json()["error"]["message"]


# -- Targets with recurrent states -----------------------------------------------------------------------------------


def letters():
    """A tokenizer of tiny targets: every token is a letter, that of padding aside, and a chat is its first message."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(("_" + string.ascii_letters)[:VOCAB])}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages[0]['content'] }}")


@pytest.mark.parametrize("family", rest_slow(["qwen3-next", "lfm2"], quick=["lfm2"]))
def test_a_hybrid_answers(family):
    """Chats and completions at once, as plain `generate` of each prompt alone."""
    target, head = pair(family)
    tokenizer, prompts = letters(), ["dspark", "b", "aHybridTarget"]
    settings = ContinuousBatchingConfig(max_requests_per_batch=2)
    service = Service(
        target.init_continuous_batching(GenerationConfig(), settings, assistant_model=head), tokenizer, NAME
    )
    with serving(service) as (address, _):

        async def answers():
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as own:
                fields = {"model": NAME, "max_tokens": 40, "temperature": 0}
                texts = (own.completions.create(prompt=prompt, **fields) for prompt in prompts)
                messages = ([{"role": "user", "content": prompt}] for prompt in prompts)
                chats = (own.chat.completions.create(messages=message, **fields) for message in messages)
                return await asyncio.gather(*texts), await asyncio.gather(*chats)

        completions, chats = asyncio.run(answers())
    for prompt, text, chat in zip(prompts, completions, chats, strict=True):
        plain = tokenizer.decode(alone(target, tokenizer(prompt)["input_ids"], max_new_tokens=40))
        assert text.choices[0].text == chat.choices[0].message.content == plain
    drafts = [answer.usage.dspark for answer in (*completions, *chats)]
    assert 0 < sum(own["accepted"] for own in drafts) < sum(own["verified"] for own in drafts)


# -- Around ----------------------------------------------------------------------------------------------------------


def test_models_and_metrics(client, url):
    assert [own.id for own in client.models.list().data] == [NAME]
    client.chat.completions.create(**ask())
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    assert values["dspark_generated_tokens_total"] > 0 and values["dspark_tau"] >= 1
    assert values["dspark_running_requests"] == values["dspark_waiting_requests"] == 0
    assert values['dspark_requests_total{end="finished"}'] >= 1
    assert values["dspark_first_token_seconds_count"] >= values["dspark_request_seconds_count"] > 0


def test_a_server_that_is_stopped_ends_what_it_writes(parts):
    target, head, tokenizer = parts
    own = Service(target.init_continuous_batching(assistant_model=head), tokenizer, NAME)
    with serving(own) as (address, server), openai.OpenAI(base_url=f"{address}/v1", api_key="any") as asking:
        stream = iter(asking.chat.completions.create(**ask(stream=True, temperature=0)))
        pieces = [next(stream).choices[0].delta.content]
        server.should_exit = True
        pieces += [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == expected(parts, chat_ids(tokenizer), 24)
    assert not own.manager.is_running()


@pytest.mark.slow
def test_products_of_many_shapes_leave_little_behind():
    """In a process of its own: 600 shapes in bfloat16, which by default leave twice as much behind."""
    code = """if True:
        import resource, torch
        from dspark_hf.serving.products import keep_few
        keep_few()
        weight = torch.zeros(64, 64, dtype=torch.bfloat16)
        def product(rows):
            torch.nn.functional.linear(torch.zeros(rows, 64, dtype=torch.bfloat16), weight)
        product(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for rows in range(2, 602):
            product(rows)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 200 * 1024


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end():
    port = free_port()
    command = [sys.executable, "-m", "dspark_hf.cli", "serve", "--port", str(port), "--batch", "2"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert f"http://127.0.0.1:{port}/v1 serves dspark-pair" in server.stdout.readline()

    def healthy():
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=120).json() == {"status": "ok"}
        assert server.poll() is None

    wait_for(healthy)
    server.terminate()
    assert server.wait() in (0, -signal.SIGTERM)
