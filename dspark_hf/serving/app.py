"""An OpenAI-compatible server: HTTP in front of a [`DSparkBatchingManager`]."""

import asyncio
import hmac
import json
import queue
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from .manager import DSparkBatchingManager
from .metrics import Metrics
from .protocol import Body, ChatBody, CompletionBody, RequestError
from .request import RequestOutput
from .text import TextStream

# Seconds in which a token must have been decoded for a server to be called healthy, and in which requests end at last.
HEALTHY, LAST = 30.0, 10.0


@dataclass(frozen=True)
class Limits:
    """What a client may ask for at most.

    body: bytes. prompt: tokens, `None` for as many as there is memory for. new_tokens: where a request does not say.
    """

    body: int = 1 << 20
    prompt: int | None = None
    new_tokens: int = 1024


class Service:
    """What the routes share.

    Args:
        name: what clients call the model. api_key: what they must show; nothing when `None`.
    """

    def __init__(
        self,
        manager: DSparkBatchingManager,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        api_key: str | None = None,
        limits: Limits | None = None,
    ):
        self.manager, self.tokenizer, self.name, self.api_key = manager, tokenizer, name, api_key
        self.limits, self.metrics, self.created = limits or Limits(), Metrics(manager), int(time.time())

    def check_key(self, request: Request) -> None:
        """Raise unless the request shows the key."""
        if self.api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise RequestError(401, "The API key is missing or wrong.", "invalid_api_key", WWW_Authenticate="Bearer")

    def check_model(self, body: Body) -> None:
        if body.model != self.name:
            raise RequestError(
                404, f"There is no model {body.model!r} here, only {self.name!r}.", "model_not_found", "model"
            )

    def chat_prompt(self, body: ChatBody) -> list[int]:
        """The tokens of a conversation."""
        if self.tokenizer.chat_template is None:
            raise RequestError(400, "The model has no chat template; use /v1/completions.", param="messages")
        messages = [message.as_dict() for message in body.messages]
        try:
            encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:
            # Templates raise what they like for roles that they do not know.
            raise RequestError(400, f"The chat template takes no such messages: {error}", param="messages") from None
        return list(encoded["input_ids"])

    def text_prompt(self, body: CompletionBody) -> list[int]:
        """The tokens of a prompt."""
        prompt = body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise RequestError(400, f"One prompt a request, got {len(prompt)}.", param="prompt")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        vocabulary = self.manager.model.config.get_text_config(decoder=True).vocab_size
        if not all(0 <= token < vocabulary for token in prompt):
            raise RequestError(400, f"Tokens are from 0 to {vocabulary - 1}.", param="prompt")
        return list(prompt)

    async def begin(self, prompt: Sequence[int], body: Body) -> tuple[str, "asyncio.Queue[RequestOutput | None]"]:
        """Queue a request. Returns its id, and where its results come."""
        limit = self.limits.prompt
        if limit is not None and len(prompt) > limit:
            raise RequestError(
                400, f"The prompt has {len(prompt)} tokens; at most {limit} are taken.", "context_length_exceeded"
            )
        request_id, results = uuid.uuid4().hex, asyncio.Queue()
        self.manager.register_result_handler(request_id, results.put_nowait)
        settings = body.settings(self.limits.new_tokens)
        if body.stops:
            settings |= {"stop_strings": body.stops, "tokenizer": self.tokenizer}
        try:
            await run_in_threadpool(
                self.manager.add_request,
                prompt,
                request_id,
                streaming=True,
                seed=body.seed,
                logprobs=body.wants_logprobs,
                **settings,
            )
        except queue.Full as error:
            self.manager.forget(request_id)
            raise RequestError(429, f"The server is busy: {error} Try again.", "queue_full", Retry_After="1") from None
        except ValueError as error:
            self.manager.forget(request_id)
            raise RequestError(400, str(error)) from None
        return request_id, results

    async def outputs(
        self, request_id: str, results: "asyncio.Queue[RequestOutput | None]", request: Request | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Results of a request up to its last. Whoever stops reading, or is gone, ends it."""
        last, end = None, "abandoned"
        watch = None if request is None else asyncio.create_task(self._end_with_client(request, request_id, results))
        try:
            while last is None or not last.is_finished():
                output = await results.get()
                if output is None:
                    return
                if last is None:
                    self.metrics.begun(output)
                last = output
                end = "abandoned" if not output.is_finished() else "failed" if output.error else "finished"
                yield output
        finally:
            if watch is not None:
                watch.cancel()
            if end == "abandoned":
                self.manager.cancel_request(request_id)
            if last is not None:
                self.metrics.ended(last, end)

    async def _end_with_client(
        self, request: Request, request_id: str, results: "asyncio.Queue[RequestOutput | None]"
    ) -> None:
        """End a request as soon as its client is gone, whatever is waited for; its reader is told by a `None`."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.manager.cancel_request(request_id)
        results.put_nowait(None)


def build(service: Service) -> FastAPI:
    """The application; its manager runs as long as it does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.manager.start()
        yield
        # What is still being written may end; who is still there then is told.
        await run_in_threadpool(service.manager.stop, True, LAST)
        await run_in_threadpool(service.manager.stop, hard_stop=True)

    app = FastAPI(title="dspark-hf", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, most=service.limits.body)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.as_dict(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return await refused(request, RequestError(error.status_code, f"{request.url.path}: {error.detail}."))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return await refused(request, RequestError(500, f"{type(error).__name__}: {error}"))

    @app.get("/health")
    async def health() -> Response:
        body = CompletionBody(model=service.name, prompt=[0], max_tokens=1, temperature=0)
        try:
            request_id, results = await service.begin([0], body)
        except RequestError as error:
            # A full queue is no illness.
            return JSONResponse({"status": str(error)}, 200 if error.status == 429 else 503)
        try:
            async with asyncio.timeout(HEALTHY):
                async for output in service.outputs(request_id, results):
                    last = output
        except TimeoutError:
            return JSONResponse({"status": "no token in time"}, 503)
        if last.error is not None:
            return JSONResponse({"status": last.error}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.check_key(request)
        own = {"id": service.name, "object": "model", "created": service.created, "owned_by": "dspark-hf"}
        return {"object": "list", "data": [own]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, ChatBody, Chat(), service.chat_prompt)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _answer(service, request, CompletionBody, Completion(), service.text_prompt)

    return app


def parsed(kind: type[Body], content: bytes) -> Any:
    """The body of a request, after its key has been looked at."""
    try:
        return kind.model_validate_json(content)
    except ValueError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RequestError(400, f"{place or 'body'}: {first['msg']}.", param=place or None) from None


# -- Answers ----------------------------------------------------------------------------------------------------------


class Chat:
    """How answers of /v1/chat/completions are laid out."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, finish_reason: str, logprobs: list | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def delta(self, text: str, finish_reason: str | None, logprobs: Any, is_first: bool) -> dict[str, Any]:
        delta = {"content": text} if text or finish_reason is None else {}
        delta |= {"role": "assistant"} if is_first else {}
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, tokens: list[str], values: list[float]) -> dict[str, Any]:
        pairs = zip(tokens, values, strict=True)
        return {
            "content": [
                {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
                for token, value in pairs
            ]
        }


class Completion:
    """How answers of /v1/completions are laid out."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def choice(self, text: str, finish_reason: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def delta(self, text: str, finish_reason: str | None, logprobs: Any, is_first: bool) -> dict[str, Any]:
        return self.choice(text, finish_reason, logprobs)

    def logprobs(self, tokens: list[str], values: list[float]) -> dict[str, Any]:
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": []}


async def _answer(
    service: Service,
    request: Request,
    kind: type[Body],
    layout: Chat | Completion,
    prompt_of: Callable[[Any], list[int]],
) -> Response:
    service.check_key(request)
    body = parsed(kind, await request.body())
    service.check_model(body)
    request_id, results = await service.begin(prompt_of(body), body)
    head = {"id": layout.prefix + request_id, "created": int(time.time()), "model": service.name}
    stream = TextStream(service.tokenizer, body.stops)

    def logprobs_of(output: RequestOutput, start: int) -> Any:
        if not body.wants_logprobs:
            return None
        tokens = [service.tokenizer.decode([token]) for token in output.generated_tokens[start:]]
        return layout.logprobs(tokens, output.logprobs[start:])

    if not body.stream:
        output = None
        async for latest in service.outputs(request_id, results, request):
            output = latest
        if output is None or not output.is_finished():
            # Nobody is there to read it.
            return Response(status_code=499)
        if output.error is not None:
            raise RequestError(500, output.error)
        text = stream.piece(output.generated_tokens, True)
        choice = layout.choice(text, finish_reason(output, stream, body, service), logprobs_of(output, 0))
        return JSONResponse(head | {"object": layout.whole, "choices": [choice], "usage": usage(output)})

    async def events() -> AsyncIterator[str]:
        reported, head_of_part, output = 0, head | {"object": layout.part}, None
        async for output in service.outputs(request_id, results, request):
            if output.error is not None:
                yield event(RequestError(500, output.error).as_dict())
                return
            piece = stream.piece(output.generated_tokens, output.is_finished())
            reason = finish_reason(output, stream, body, service) if output.is_finished() else None
            logprobs = logprobs_of(output, reported)
            if piece or reason is not None or (logprobs is not None and len(output.generated_tokens) > reported):
                yield event(head_of_part | {"choices": [layout.delta(piece, reason, logprobs, reported == 0)]})
                reported = len(output.generated_tokens)
        if output is None or not output.is_finished():
            return
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event(head_of_part | {"choices": [], "usage": usage(output)})
        yield "data: [DONE]\n\n"

    # A generator that has begun ends its request also where its client is gone before the rest is asked for.
    begun = events()
    first = await anext(begun, None)
    if first is None:
        return Response(status_code=499)
    return StreamingResponse(
        _chained(first, begun), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _chained(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for one in rest:
        yield one


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def finish_reason(output: RequestOutput, stream: TextStream, body: Body, service: Service) -> str:
    """Why a text ended: by itself or a stop string, or at its limit."""
    most = body.settings(service.limits.new_tokens)["max_new_tokens"]
    ends = service.manager.ends
    by_itself = stream.is_stopped or (output.generated_tokens and output.generated_tokens[-1] in ends)
    return "length" if len(output.generated_tokens) >= most and not by_itself else "stop"


def usage(output: RequestOutput) -> dict[str, Any]:
    """Counts of tokens, those of drafts among them."""
    prompt, written = len(output.prompt_ids), len(output.generated_tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "completion_tokens_details": {
            "accepted_prediction_tokens": output.accepted,
            "rejected_prediction_tokens": output.drafted - output.accepted,
        },
        "dspark": {name: getattr(output, name) for name in ("rounds", "drafted", "verified", "accepted")},
    }


class BodyLimit:
    """Refuses bodies of more than so many bytes, while they come."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise RequestError(413, f"The body has more than {self.most} bytes.", "body_too_large")
            return message

        await self.app(scope, counted, send)
