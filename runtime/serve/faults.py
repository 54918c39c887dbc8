"""What goes wrong in a request, as a status with OpenAI's or Ollama's body. Knows errors; no requests, no routes."""

from __future__ import annotations

from typing import Any

from pocketllava.errors import (
    BackendError,
    BundleError,
    ContextOverflow,
    EngineDied,
    InputError,
    ModelNotFound,
    PocketLlavaError,
    StateError,
    UnsupportedSchema,
)

INVALID = "invalid_request_error"
UNAVAILABLE = "unavailable_error"
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would send a request again that ended the engine
OVERFLOW_CODE = "context_length_exceeded"
OVERFLOW_WORDS = (
    "prompt is too long"  # LangChain and LiteLLM look for them: openai's errors do not show the code
)
OVERFLOW_TYPE = "exceed_context_size_error"  # llama-server's


class Fault(Exception):
    """An answer that is an error: an HTTP status, a message, and OpenAI's fields for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        code: str | int | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.code, self.param = code, param
        self.headers, self.extra = headers or {}, extra or {}

    def body(self, ollama: bool) -> dict[str, Any]:
        """The JSON body, in the form of either API."""
        if ollama:
            return {"error": self.message}
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields | self.extra}


def invalid(message: str, param: str | None = None, code: str | None = None) -> Fault:
    """A request that cannot be answered as it is."""
    return Fault(400, message, param=param, code=code)


def queue_full(n: int) -> Fault:
    """More requests wait than the server holds."""
    return Fault(
        429,
        f"queue: {n} requests are waiting, which is all this server holds; ask again in a moment",
        type="rate_limit_error",
        code="queue_full",
        headers={"retry-after": "2"},
    )


def quarantined() -> Fault:
    """A request during which the engine ended twice."""
    return Fault(
        503,
        "request: the engine ended twice while it answered this one, so it is refused; change the picture or text",
        type=UNAVAILABLE,
        code="quarantined",
        headers=NO_RETRY,
    )


def fault_of(error: BaseException) -> Fault:
    """The answer that tells of an exception. An unforeseen one is named by its class alone."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, ContextOverflow):
        numbers = {"n_prompt_tokens": error.needed, "n_ctx": error.available}
        message = f"{OVERFLOW_WORDS}: {str(error).removeprefix('prompt: ')}"
        return Fault(400, message, type=OVERFLOW_TYPE, code=OVERFLOW_CODE, param="messages", extra=numbers)
    if isinstance(error, UnsupportedSchema):
        return invalid(str(error), "response_format", "unsupported_schema")
    if isinstance(error, InputError):
        return invalid(str(error), _param(str(error)))
    # The last two: the model's files went while it was served.
    if isinstance(error, BackendError | StateError | BundleError | ModelNotFound):
        headers = {} if isinstance(error, StateError) else NO_RETRY
        code = "engine_died" if isinstance(error, EngineDied) else None
        return Fault(503, str(error), type=UNAVAILABLE, code=code, headers=headers)
    message = str(error) if isinstance(error, PocketLlavaError) else f"server error ({type(error).__name__})"
    return Fault(500, message, type="server_error", headers=NO_RETRY)


def _param(message: str) -> str | None:
    """The argument that our one-line errors begin with: "temperature: found ..."."""
    name = message.partition(":")[0]
    return name if name.isidentifier() else None
