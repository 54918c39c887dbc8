"""What the server serves: the bundle's facts, its names, and the limits of a request. Knows no routes, no engine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pocketllava.serve.faults import Fault

if TYPE_CHECKING:
    from pocketllava.models import Bundle

DEFAULT_ALIASES = ("llava", "llava:latest")
LATEST = ":latest"
DEFAULT_CTX = 2048


@dataclass(frozen=True)
class Limits:
    """What a request may hold. Pixels are Llava's to check, before it decodes."""

    body_bytes: int = 64 << 20
    images: int = 32
    messages: int = 1000
    body_s: float = 30.0  # until a request has arrived whole
    send_s: float = 30.0  # until a client takes a piece of its answer


@dataclass(frozen=True)
class Served:
    """The bundle under its names. n_ctx: as it was asked for; the engine knows better once it has loaded."""

    name: str
    bundle: Bundle
    aliases: tuple[str, ...] = DEFAULT_ALIASES
    n_ctx: int = DEFAULT_CTX
    limits: Limits = Limits()
    created: int = field(default_factory=lambda: int(time.time()))

    def check(self, model: str | None) -> None:
        """Raises Fault for a name that is not served. No name at all means the one there is."""
        if model and not self.knows(model):
            aliases = f" (aliases: {', '.join(self.aliases)})" if self.aliases else ""
            message = f"model {model!r} is not served here; available: {self.name}{aliases}"
            raise Fault(404, message, param="model", code="model_not_found")

    def knows(self, model: str) -> bool:
        """Whether a client's name for the model is one of its names, with ":latest" or without."""
        names = (self.name, *self.aliases)
        return model in names or model.removesuffix(LATEST) in names

    @cached_property
    def sha256(self) -> str:
        """Of the text model's file, as bundle.json records it; of its header where nobody has read it whole."""
        return self.bundle.manifest.files["model.gguf"].digest

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The model's sizes, from its header: milliseconds, no tensor is read."""
        tensors = self.bundle.model_header.tensors.values()
        text = self.bundle.text_info
        paths = (self.bundle.model, self.bundle.mmproj)
        return {
            "n_ctx_train": text.n_ctx_train,
            "n_params": sum(math.prod(tensor.shape) for tensor in tensors),
            "size": sum(path.stat().st_size for path in paths),
            "n_vocab": text.n_vocab,
            "n_embd": text.n_embd,
            "ftype": self.bundle.manifest.types.model,
        }
