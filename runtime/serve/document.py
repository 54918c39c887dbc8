"""The OpenAPI 3.1 document of the server's routes, written by hand: what each takes, and with what it may answer.

Knows shapes and statuses; no request. The tests send every documented status and generated bodies of every shape.
"""

from __future__ import annotations

from functools import cache

from pocketllava.serve.shapes import STRING, Schema, ref, schemas
from pocketllava.version import __version__

JSON, EVENTS, LINES, TEXT, PNG, JPEG, HTML = (
    "application/json", "text/event-stream", "application/x-ndjson", "text/plain", "image/png", "image/jpeg",
    "text/html",
)  # fmt: skip
ERRORS = {
    400: "A field that cannot be used; the message names it.",
    401: "The API key is missing or wrong.",
    403: "A Host or Origin that is not this server's.",
    404: "No such model, or nothing under this id.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    415: "The content type is not JSON.",
    429: "The queue is full; retry-after says when to ask again.",
    503: "The model is loading, or its engine ended.",
}
GUARDED = (401, 403)
READING = (*GUARDED, 400, 408, 413, 415)
ASKING = (*READING, 429, 503)


def _operation(
    summary: str,
    ok: dict[str, str | None],
    errors: tuple[int, ...],
    body: str | None = None,
    *,
    status: int = 200,
    ollama: bool = False,
    ids: bool = False,
) -> Schema:
    """ok: schemas' names by content type, None for what is no JSON. An operation without 401 needs no key."""
    error = {JSON: {"schema": ref("OllamaError" if ollama else "Error")}}
    content = {kind: {"schema": ref(name)} if name else {} for kind, name in ok.items()}
    responses = {str(code): {"description": ERRORS[code], "content": error} for code in sorted(errors)}
    operation: Schema = {
        "summary": summary,
        "responses": {str(status): {"description": summary, "content": content}, **responses},
    }
    if body:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": ref(body)}}}
    if ids:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": STRING}]
    if 401 not in errors:
        operation["security"] = []
    return operation


def _paths() -> dict[str, Schema]:
    health = _operation("Whether the server can answer.", {JSON: "Health"}, (403,))
    health["responses"]["503"] = {"description": ERRORS[503], "content": {JSON: {"schema": ref("Health")}}}
    ready = _operation("The same, for LLM Vision.", {TEXT: None}, (403,))
    ready["responses"]["503"] = {"description": ERRORS[503], "content": {TEXT: {}}}
    twice = {
        "/chat/completions": {
            "post": _operation(
                "An answer, whole or as events.",
                {JSON: "ChatCompletion", EVENTS: None},
                (*ASKING, 404),
                "ChatRequest",
            )
        },
        "/models": {"get": _operation("What is served.", {JSON: "Models"}, GUARDED)},
        "/models/{id}": {"get": _operation("One model.", {JSON: "Model"}, (*GUARDED, 404), ids=True)},
        "/health": {"get": health},
    }

    def ollama(
        summary: str,
        name: str,
        body: str | None = None,
        errors: tuple[int, ...] = GUARDED,
        *,
        lines: bool = True,
    ) -> Schema:
        ok: dict[str, str | None] = {JSON: name, **({LINES: None} if body and lines else {})}
        return {"post" if body else "get": _operation(summary, ok, errors, body, ollama=True)}

    return {
        **{f"{base}{path}": item for path, item in twice.items() for base in ("/v1", "")},
        "/readyz": {"get": ready},
        "/props": {"get": _operation("llama-server's properties.", {JSON: "Props"}, GUARDED)},
        "/metrics": {"get": _operation("Counts in Prometheus' form.", {TEXT: None}, GUARDED)},
        "/openapi.json": {"get": _operation("This document.", {JSON: "Document"}, GUARDED)},
        "/v1/prepare": {
            "post": _operation(
                "Evaluates pictures before their question is known.",
                {JSON: "Prepared"},
                ASKING,
                "PrepareRequest",
                status=202,
            )
        },
        "/v1/prepare/{id}": {
            "get": _operation("How far that is.", {JSON: "Preparation"}, (*GUARDED, 404), ids=True)
        },
        "/v1/view": {
            "post": _operation("The picture as the model sees it.", {PNG: None}, ASKING, "ViewRequest")
        },
        "/v1/album": {
            "get": _operation("The album that is served, if there is one.", {JSON: "Album"}, GUARDED)
        },
        "/v1/album/search": {
            "post": _operation("Pictures of the album.", {JSON: "Hits"}, ASKING, "AlbumSearchRequest")
        },
        "/v1/album/pictures/{id}": {
            "get": _operation("A picture as it is.", {"image/*": None}, (*GUARDED, 404), ids=True)
        },
        "/v1/album/thumbnails/{id}": {
            "get": _operation("A small one.", {JPEG: None}, (*GUARDED, 404), ids=True)
        },
        "/api/version": ollama("The version of Ollama's API.", "OllamaVersion"),
        "/api/tags": ollama("The model under each of its names.", "OllamaModels"),
        "/api/ps": ollama("The model while it is in memory.", "OllamaModels"),
        "/api/show": ollama("The model's facts.", "OllamaShown", "OllamaNamed", (*READING, 404), lines=False),
        "/api/pull": ollama("Nothing is downloaded.", "OllamaStatus", "OllamaNamed", (*READING, 404)),
        "/api/chat": ollama("Ollama's chat.", "OllamaChatReply", "OllamaChatRequest", (*ASKING, 404)),
        "/api/generate": ollama(
            "Ollama's generate.", "OllamaGenerateReply", "OllamaGenerateRequest", (*ASKING, 404)
        ),
        "/": {"get": _operation("The page.", {HTML: None}, (403,))},
    }


@cache
def document() -> Schema:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "pocketllava", "version": __version__},
        "security": [{}, {"key": []}],
        "paths": _paths(),
        "components": {
            "schemas": schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
