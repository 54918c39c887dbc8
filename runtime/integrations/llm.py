"""The plugin of simonw/llm: models of the store, and "demo", in `llm models`; `llm -m NAME -a photo.jpg "..."`.

Knows llm's hooks, messages and options. llm imports it with every command, so a model's code is imported when one is
asked.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import llm
from llm.parts import AttachmentPart, TextPart
from pydantic import Field, create_model

from pocketllava.errors import PocketLlavaError, UnsupportedOption
from pocketllava.settings import Setting, settings
from pocketllava.types import Chunk, ImageSource, Message, Options

if TYPE_CHECKING:
    from pocketllava.llava import Llava

DEMO = "demo"
ALIAS = "llava"  # of the first model in the store
ELSEWHERE = ("schema", "choices", "top_logprobs")  # llm has schemas of its own, and no place for the others
TYPES: dict[str, Any] = {"whole": int, "number": float, "choice": str, "text": str, "texts": str | list[str]}
KINDS = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "avif", "heic", "heif")


def _option(setting: Setting) -> tuple[Any, Any]:
    """An option's type and field in pydantic's terms: llm prints its help, and refuses what is out of range."""
    low = {"gt" if setting.above_low else "ge": setting.low} if math.isfinite(setting.low) else {}
    high = {"le": setting.high} if math.isfinite(setting.high) else {}
    return TYPES[setting.kind] | None, Field(default=None, description=setting.help, **low, **high)


class _Shared:
    """What the two models of a name have in common."""

    can_stream = True
    supports_schema = True
    attachment_types = frozenset(f"image/{kind}" for kind in KINDS)
    Options = create_model(
        "Options",
        __base__=llm.Options,
        **{name: _option(setting) for name, setting in settings(Options).items() if name not in ELSEWHERE},
    )

    def __init__(self, name: str) -> None:
        self.model_id = name


class PocketLlava(_Shared, llm.Model):  # type: ignore[misc]
    """A model, for `llm` and `llm.get_model`."""

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Iterator[str]:  # noqa: ARG002
        """Texts of the answer. Raises llm.ModelError."""
        with _translated():
            messages, options = _messages(prompt), _options(prompt)
            with closing(_model(self.model_id).stream(messages, options=options)) as chunks:  # type: ignore[type-var]
                for chunk in chunks:
                    yield chunk.text
                    _note(chunk, response)


class AsyncPocketLlava(_Shared, llm.AsyncModel):  # type: ignore[misc]
    """The same for `llm.get_async_model`: the event loop stays free."""

    async def execute(
        self,
        prompt: Any,
        stream: bool,  # noqa: ARG002
        response: Any,
        conversation: Any = None,  # noqa: ARG002
    ) -> AsyncIterator[str]:
        """Texts of the answer. Raises llm.ModelError."""
        with _translated():
            messages, options = _messages(prompt), _options(prompt)
            model = await asyncio.to_thread(_model, self.model_id)
            async with aclosing(model.astream(messages, options=options)) as chunks:
                async for chunk in chunks:
                    yield chunk.text
                    _note(chunk, response)


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Any) -> None:
    """Every name of the store, then the model in the package. No file of them is opened."""
    names = _stored()
    for name in dict.fromkeys((*names, DEMO)):
        aliases = (ALIAS,) if name == next(iter(names), None) else ()
        register(PocketLlava(name), AsyncPocketLlava(name), aliases=aliases)


def _stored() -> list[str]:
    """Names in the store; none where it cannot be read, which must not end every command of llm."""
    from pocketllava.models.store import Store

    try:
        return Store.default().names()
    except PocketLlavaError:
        return []


loaded: dict[str, Llava] = {}  # by name, for as long as the process lives
_loading = threading.Lock()


def _model(name: str) -> Llava:
    """The model, loaded once: `llm chat` asks the same one again and again."""
    from pocketllava.llava import Llava
    from pocketllava.models.store import Store

    with _loading:
        if name not in loaded:
            model = loaded[name] = Llava.load(name if name == DEMO else Store.default().folder(name))
            atexit.register(model.close)  # before the interpreter takes llama_cpp's modules away
        return loaded[name]


def _messages(prompt: Any) -> list[Message]:
    """The conversation, its history included."""
    return [_message(message.role, message.parts) for message in prompt.messages]


def _message(role: Any, parts: list[Any]) -> Message:
    """One turn. What another model only thought stays out of it."""
    if any(hasattr(part, "tool_call_id") for part in parts):
        raise UnsupportedOption("tools: LLaVA was not trained to call them; begin a new conversation without")
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    images = [_image(part.attachment) for part in parts if isinstance(part, AttachmentPart)]
    return Message(role, "\n".join(texts), images)


def _image(attachment: Any) -> ImageSource:
    """An attachment's bytes or path; its size and kind are checked when it is read."""
    if attachment.content:
        content: bytes = attachment.content
        return content
    if not attachment.path:
        raise UnsupportedOption(
            f"attachment: found {attachment.url!r}, expected a file; nothing is fetched here"
        )
    return str(attachment.path)


def _options(prompt: Any) -> Options:
    """Options that were given; the others are ours."""
    given = {name: value for name, value in prompt.options if value is not None}
    return Options(**given, schema=prompt.schema or None)


def _note(chunk: Chunk, response: Any) -> None:
    """The last chunk's figures, for `llm logs` and `--usage`."""
    if chunk.timings is None:
        return
    t = chunk.timings
    response.set_usage(
        input=t.prompt_tokens,
        output=t.answer_tokens,
        details={"cached": t.cached_tokens, "image": t.image_tokens},
    )
    response.response_json = {"finish_reason": chunk.finish_reason, "timings": asdict(t)}


@contextmanager
def _translated() -> Iterator[None]:
    """Our errors as llm's, which its command line prints in one line."""
    try:
        yield
    except PocketLlavaError as error:
        raise llm.ModelError(str(error)) from error
