"""What the server says about itself: health, models, props, metrics. None of it wakes the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pocketllava.serve.faults import UNAVAILABLE
from pocketllava.serve.served import Served
from pocketllava.serve.supervisor import Supervisor
from pocketllava.types import Options, Timings
from pocketllava.version import __version__

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

READY = ("ok", "idle")
SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120)
SHOWN_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty")


def health(supervisor: Supervisor) -> tuple[int, dict[str, Any]]:
    """Status and body of /health; 503 has llama-server's error beside our word for the state."""
    state = supervisor.state
    if state in READY:
        return 200, {"status": state, "queue": supervisor.waiting}
    error = {"code": 503, "message": supervisor.message, "type": UNAVAILABLE}
    return 503, {"status": state, "queue": supervisor.waiting, "error": error}


def n_ctx(served: Served, supervisor: Supervisor) -> int:
    """Tokens of context."""
    return supervisor.n_ctx or served.n_ctx


def model(served: Served, supervisor: Supervisor) -> dict[str, Any]:
    """An entry of /v1/models, with the fields that Frigate reads."""
    context = n_ctx(served, supervisor)
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "pocketllava",
        "aliases": list(served.aliases),
        "max_model_len": context,
        "architecture": {"input_modalities": ["text", "image"], "output_modalities": ["text"]},
        "meta": {"n_ctx": context, **served.facts},
    }


def props(served: Served, supervisor: Supervisor) -> dict[str, Any]:
    """llama-server's /props. The path stays private: its last part is shown."""
    context, options = n_ctx(served, supervisor), Options()
    params = {name: getattr(options, name) for name in SHOWN_OPTIONS}
    return {
        "default_generation_settings": {"n_ctx": context, "params": params},
        "total_slots": 1,
        "model_path": served.bundle.model.name,
        "model_alias": served.name,
        "chat_template": "",
        "chat_template_caps": {"supports_tools": False},
        "modalities": {"vision": True, "audio": False},
        "media_marker": "<__media__>",
        "build_info": f"pocketllava {__version__}",
        "is_sleeping": supervisor.state == "idle",
    }


class Metrics:
    """Counts of what was answered, in Prometheus' form. The client library is imported when it is first needed."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._registry: CollectorRegistry | None = None
        self._counters: dict[str, Any] = {}
        self._histograms: dict[str, Any] = {}
        self._early: list[tuple[Timings, float]] = []

    def note(self, timings: Timings | None, queue_s: float) -> None:
        """Count one answer."""
        if timings is None:
            return
        if self._registry is None:
            self._early = [*self._early[-9999:], (timings, queue_s)]
            return
        counts = {
            "prompt_tokens": timings.prompt_tokens - timings.cached_tokens,
            "generated_tokens": timings.answer_tokens,
            "cached_tokens": timings.cached_tokens,
            "answers_with_new_images": int(timings.encode_s > 0),
            "answers": 1,
        }
        for name, n in counts.items():
            self._counters[name].inc(n)
        seconds = {
            "queue": queue_s,
            "encode": timings.encode_s,
            "first_token": timings.first_token_s + queue_s,
        }
        for name, value in seconds.items():
            self._histograms[name].observe(value)

    def text(self) -> tuple[bytes, str]:
        """(/metrics, its content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        if self._registry is None:
            self._registry = self._made()
            for timings, queue_s in self._early:
                self.note(timings, queue_s)
            self._early = []
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _made(self) -> CollectorRegistry:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        registry = CollectorRegistry()
        counted = {
            "prompt_tokens": "Prompt tokens evaluated",
            "generated_tokens": "Tokens of answers",
            "cached_tokens": "Prompt tokens kept from earlier calls",
            "answers_with_new_images": "Answers for which pictures were encoded",
            "answers": "Answers that were given",
        }
        for name, text in counted.items():
            self._counters[name] = Counter(f"pocketllava_{name}", text, registry=registry)
        for name in ("queue", "encode", "first_token"):
            text = f"Seconds of an answer: {name.replace('_', ' ')}"
            self._histograms[name] = Histogram(
                f"pocketllava_{name}_seconds", text, buckets=SECONDS, registry=registry
            )
        gauges = {
            "requests_processing": lambda: float(self._supervisor.busy),
            "requests_deferred": lambda: float(self._supervisor.waiting),
            "engine_restarts_total": lambda: float(self._supervisor.restarts),
        }
        for name, value in gauges.items():
            Gauge(f"pocketllava_{name}", name.replace("_", " "), registry=registry).set_function(value)
        return registry
