"""OpenAI's chat completions: a request -> messages and options, chunks -> OpenAI's objects.

Knows the API's fields, in the forms that clients really send; no queue, no model.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pocketllava.serve.faults import Fault, invalid
from pocketllava.serve.served import Limits, Served
from pocketllava.serve.transport import counted, encoded, in_ms, per_second
from pocketllava.types import Chunk, Message, Options, Role, Timings, TokenLogprob
from pocketllava.version import __version__

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXTS, IMAGES = ("text", "input_text", "output_text"), ("image_url", "input_image")
SAMPLED = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
ANY_OBJECT = {"type": "object"}
MAX_STOPS = 4
DONE = b"data: [DONE]\n\n"


class ImageUrl(msgspec.Struct):
    """Where a picture is: a data URI. OpenAI's `detail` changes nothing: the tower has one size."""

    url: str


class Part(msgspec.Struct):
    """A part of a message's content, in Chat Completions' form or Responses'."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Turn(msgspec.Struct):
    """A message as it was sent."""

    role: str
    content: str | list[Part | str] | None = None


class Named(msgspec.Struct):
    """A schema, or a function's parameters."""

    name: str = "output"
    schema: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None


class Format(msgspec.Struct):
    """response_format; `schema` beside json_object is llama-server's."""

    type: str
    json_schema: Named | None = None
    schema: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    """A function that a model could call."""

    type: str = "function"
    function: Named | None = None


class StreamOptions(msgspec.Struct):
    """What a stream brings beside its text."""

    include_usage: bool | None = False


class ChatRequest(msgspec.Struct):
    """The fields that change an answer. All others are accepted and ignored, as OpenAI's own servers do."""

    messages: list[Turn]
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Format | None = None
    tools: list[Tool] | None = None
    tool_choice: str | Tool | None = None
    return_progress: bool | None = False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


def messages_of(turns: list[Turn], limits: Limits, *, ends_with_user: bool = True) -> list[Message]:
    """The conversation. Raises Fault that names the message by its index."""
    if not turns:
        raise invalid("messages: found none, expected at least one of the user", "messages")
    if len(turns) > limits.messages:
        raise invalid(f"messages: found {len(turns)}, expected at most {limits.messages}", "messages")
    messages = [_message(turn, f"messages[{index}]") for index, turn in enumerate(turns)]
    if ends_with_user and messages[-1].role != "user":
        place = f"messages[{len(turns) - 1}].role"
        raise invalid(f"{place}: found {turns[-1].role!r}, expected the last message to be the user's", place)
    counted(sum(len(message.images) for message in messages), limits)
    return messages


def _message(turn: Turn, place: str) -> Message:
    role = ROLES.get(turn.role)
    if role is None:
        expected = "expected system, developer, user or assistant"
        raise invalid(f"{place}.role: found {turn.role!r}, {expected}", f"{place}.role")
    if turn.content is None or isinstance(turn.content, str):
        content: list[Part | str] = [turn.content or ""]
    else:
        content = turn.content
    if not content or (role == "user" and turn.content is None):
        raise invalid(f"{place}.content: found nothing, expected a text or parts", f"{place}.content")
    parts = [_part(part, f"{place}.content[{index}]") for index, part in enumerate(content)]
    texts = [value for is_image, value in parts if not is_image]
    images = [value for is_image, value in parts if is_image]
    if images and role != "user":
        raise invalid(f"{place}: found images of {turn.role!r}, only the user shows images", place)
    return Message(role, " ".join(texts), images)


def _part(part: Part | str, place: str) -> tuple[bool, str]:
    """(whether it is an image, its text or data URI)."""
    if isinstance(part, str):
        return False, part
    if part.type in TEXTS and part.text is not None:
        return False, part.text
    if part.type in IMAGES and part.image_url is not None:
        url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
        return True, data_uri(url, f"{place}.image_url")
    raise invalid(f"{place}: found a part of type {part.type[:40]!r}, expected text or image_url", place)


def data_uri(url: str, place: str) -> str:
    """A data URI as it is. Raises Fault for every other address: the server opens none, and no file."""
    if url[:5].lower() != "data:":
        shown = repr(url[:40])
        raise invalid(f"{place}: found {shown}, expected a data URI (data:image/...;base64,...)", place)
    return url


def options_of(request: ChatRequest) -> Options:
    """How the answer is sampled. Raises Fault, InputError."""
    if request.n not in (None, 1):
        raise invalid(f"n: found {request.n}, expected 1", "n", "unsupported_value")
    given = sampled(msgspec.structs.asdict(request))
    limits = [n for n in (request.max_tokens, request.max_completion_tokens) if n is not None]
    if limits:
        given["max_tokens"] = min(limits)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop: found {len(stops)} texts, expected at most {MAX_STOPS}", "stop")
    if stops := [stop for stop in stops if stop]:
        given["stop"] = tuple(stops)
    if request.logprobs:
        given["top_logprobs"] = request.top_logprobs or 0
    return Options(**given, schema=schema_of(request))


def sampled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Options that both APIs name as we do; a seed below 0 asks for a new one."""
    given = {name: fields[name] for name in SAMPLED if fields.get(name) is not None}
    if isinstance(given.get("seed"), int) and given["seed"] < 0:
        del given["seed"]
    return given


def schema_of(request: ChatRequest) -> dict[str, Any] | None:
    """What the answer must fit: a forced function's parameters, or the response format."""
    tool = forced_tool(request)
    if tool is not None:
        return tool.parameters or ANY_OBJECT
    form = request.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return form.schema or ANY_OBJECT
    if form.type == "json_schema":
        schema = form.schema if form.json_schema is None else form.json_schema.schema
        if schema is None:
            place = "response_format.json_schema.schema"
            raise invalid(f"{place}: missing, expected a JSON schema", place)
        return schema
    expected = "expected text, json_object or json_schema"
    raise invalid(f"response_format.type: found {form.type[:40]!r}, {expected}", "response_format.type")


def forced_tool(request: ChatRequest) -> Named | None:
    """The one function that the client insists on, whose parameters are a schema.

    Raises Fault where the model would have to choose.
    """
    choice = request.tool_choice
    if not request.tools or choice == "none":
        return None
    functions = [tool.function for tool in request.tools if tool.function is not None]
    if isinstance(choice, Tool) and choice.function is not None:
        wanted = choice.function.name
        functions = [function for function in functions if function.name == wanted]
        if not functions:
            raise invalid(f"tool_choice: found {wanted[:40]!r}, which is not among tools", "tool_choice")
    elif choice != "required" or len(functions) != 1:
        message = "tools: LLaVA cannot choose tools; use response_format json_schema, or force one function"
        raise invalid(message, "tools", "unsupported_parameter")
    return functions[0]


class Completion:
    """One answer in OpenAI's form, whole or in pieces."""

    def __init__(self, request: ChatRequest, served: Served) -> None:
        self.request = request
        self._tool = forced_tool(request)
        self._call_id = f"call_{secrets.token_hex(12)}"
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"pl-{__version__}-{served.sha256[:8]}",
        }

    def whole(self, chunks: list[Chunk], queue_s: float) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        last, timings = chunks[-1], _timings(chunks[-1])
        text = "".join(chunk.text for chunk in chunks)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._tool is not None:
            call = {"name": self._tool.name, "arguments": text}
            calls = [{"id": self._call_id, "type": "function", "function": call}]
            message |= {"content": None, "tool_calls": calls}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(token for chunk in chunks for token in chunk.logprobs),
            "finish_reason": last.finish_reason,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(timings),
            "timings": times(timings, queue_s),
        }

    def opening(self) -> bytes:
        """The first event: it opens the stream while the picture is still evaluated."""
        return self._event({"role": "assistant", "content": "" if self._tool is None else None}) + (
            b"" if self._tool is None else self._event({"tool_calls": [self._call("", opens=True)]})
        )

    def piece(self, chunk: Chunk) -> bytes:
        """The event of one chunk's text; nothing for a chunk without."""
        if not chunk.text and not chunk.logprobs:
            return b""
        delta = {"content": chunk.text} if self._tool is None else {"tool_calls": [self._call(chunk.text)]}
        return self._event(delta, logprobs=self._logprobs(chunk.logprobs))

    def closing(self, chunk: Chunk, queue_s: float) -> bytes:
        """The events after the text: why it ended, the usage if it was asked for, and the end."""
        timings = _timings(chunk)
        end = self._event({}, finish=chunk.finish_reason, timings=times(timings, queue_s))
        if self.request.include_usage:
            end += _event(
                {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(timings)}
            )
        return end + DONE

    def progress(self, stage: str, done: int, total: int) -> bytes:
        """How far the prompt is: a comment for people, llama-server's object for those who ask for it."""
        if self.request.return_progress:
            fields = {"total": total, "cache": 0, "processed": done, "stage": stage}
            return self._event({}, prompt_progress=fields)
        return comment(stage_of(stage, done, total))

    def failure(self, fault: Fault) -> bytes:
        """An error in the middle of a stream, which no [DONE] follows."""
        body = fault.body(ollama=False)
        body["error"]["status"] = fault.status
        return _event(body)

    def _call(self, arguments: str, *, opens: bool = False) -> dict[str, Any]:
        assert self._tool is not None
        if not opens:
            return {"index": 0, "function": {"arguments": arguments}}
        function = {"name": self._tool.name, "arguments": arguments}
        return {"index": 0, "id": self._call_id, "type": "function", "function": function}

    def _event(
        self, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.request.include_usage else {}
        return _event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage, **more})

    def _logprobs(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        content = [
            {**_logprob(t.token, t.logprob, t.bytes), "top_logprobs": [_logprob(*other) for other in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


def comment(text: str) -> bytes:
    """A line that clients skip; it keeps the connection open."""
    return f": {text}\n\n".encode()


def stage_of(stage: str, done: int, total: int) -> str:
    """How far the prompt is, for people."""
    return f"{stage} {100 * done // max(total, 1)}%"


def usage(t: Timings) -> dict[str, Any]:
    """Tokens, as OpenAI counts them."""
    return {
        "prompt_tokens": t.prompt_tokens,
        "completion_tokens": t.answer_tokens,
        "total_tokens": t.prompt_tokens + t.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": t.cached_tokens, "image_tokens": t.image_tokens},
    }


def times(t: Timings, queue_s: float) -> dict[str, Any]:
    """llama-server's names first, then ours."""
    n_prompt = t.prompt_tokens - t.cached_tokens
    return {
        "cache_n": t.cached_tokens,
        "prompt_n": n_prompt,
        "prompt_ms": in_ms(t.prompt_s),
        "prompt_per_token_ms": round(1000 * t.prompt_s / n_prompt, 3) if n_prompt else 0.0,
        "prompt_per_second": per_second(n_prompt, t.prompt_s),
        "predicted_n": t.answer_tokens,
        "predicted_ms": in_ms(t.decode_s),
        "predicted_per_token_ms": round(1000 * t.decode_s / t.answer_tokens, 3) if t.answer_tokens else 0.0,
        "predicted_per_second": round(t.tokens_per_s, 2),
        "queue_ms": in_ms(queue_s),
        "image_ms": in_ms(t.preprocess_s),
        "encode_ms": in_ms(t.encode_s),
        "first_token_ms": in_ms(t.first_token_s + queue_s),
        "device": t.devices[0],
        "vision_device": t.devices[1],
    }


def _timings(chunk: Chunk) -> Timings:
    return chunk.timings or Timings()


def _logprob(token: str, logprob: float, data: bytes) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(data)}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + encoded(value) + b"\n\n"
