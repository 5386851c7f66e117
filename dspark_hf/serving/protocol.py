"""What OpenAI's clients send and expect, as far as it means something here; anything else is refused by name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class StreamOptions(BaseModel):
    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of completion take."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    # What clients send and what changes no text.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in given if stop]

    @property
    def wants_logprobs(self) -> bool:
        raise NotImplementedError

    def settings(self, most: int) -> dict[str, Any]:
        """As `generate` takes them; what is not said is as in the model's generation config."""
        found: dict[str, Any] = {"max_new_tokens": most if self.max_tokens is None else self.max_tokens}
        if self.temperature == 0:
            return found | {"do_sample": False}
        if self.temperature is not None:
            found |= {"do_sample": True, "temperature": self.temperature}
        if self.top_p is not None:
            found |= {"do_sample": True, "top_p": self.top_p}
        return found


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content if not isinstance(self.content, list) else "".join(part.text for part in self.content)
        return self.model_dump(exclude_none=True) | {"content": content or ""}


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: Literal[0] | None = None

    def model_post_init(self, context: Any) -> None:
        self.max_tokens = self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs


class CompletionBody(Body):
    prompt: str | list[int] | list[str]
    logprobs: Literal[0] | None = None
    echo: Literal[False] = False

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class RequestError(Exception):
    """What a client is told went wrong, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def as_dict(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
