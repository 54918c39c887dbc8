"""The JSON schemas of what the server takes and answers, for its OpenAPI document. Knows shapes; no routes."""

from __future__ import annotations

from typing import Any

from pocketllava.album.gallery import MAX_HITS
from pocketllava.serve.album import MAX_NUMBER
from pocketllava.serve.openai import IMAGES, MAX_STOPS, ROLES, SAMPLED, TEXTS
from pocketllava.settings import settings
from pocketllava.types import MAX_INT, MAX_TOP_LOGPROBS, Options

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}
STRING: Schema = {"type": "string"}
FLAG: Schema = {"type": ["boolean", "null"]}
WHOLE: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
OBJECT: Schema = {"type": "object"}


def ref(name: str) -> Schema:
    """One of the schemas below."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: str = "", /, **properties: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties}


def _list(items: Schema, low: int = 0, high: int | None = None) -> Schema:
    most = {} if high is None else {"maxItems": high}
    return {"type": "array", "items": items, "minItems": low, **most}


def _one(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _given(schema: Schema) -> Schema:
    """A field that may also be null."""
    return _one(schema, NULL)


def _sampling() -> dict[str, Schema]:
    """The fields of Options that both APIs name alike."""
    known = settings(Options)
    kinds = {"whole": "integer", "number": "number"}
    fields: dict[str, Schema] = {}
    for name in SAMPLED:
        setting = known[name]
        low = {"exclusiveMinimum" if setting.above_low else "minimum": setting.low}
        fields[name] = {
            "type": [kinds[setting.kind], "null"],
            **low,
            "maximum": setting.high,
            "description": setting.help,
        }
    del fields["seed"]["minimum"]  # below 0 asks for a new one
    return fields


def schemas() -> dict[str, Schema]:
    """Every shape, by name."""
    tokens: Schema = {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_INT}
    number: Schema = {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_NUMBER}
    ollama = {
        "model": STRING,
        "stream": FLAG,
        "format": _one({"enum": ["json", "", None]}, ref("JsonSchema")),
        "options": _given(ref("OllamaOptions")),
        "keep_alive": {"type": ["string", "number", "null"]},
        "think": {"enum": [False, None]},
    }
    reply = {
        "model": STRING,
        "created_at": STRING,
        "done": {"type": "boolean"},
        "done_reason": {"enum": ["stop", "length", "load", "unload"]},
        **{f"{name}_duration": WHOLE for name in ("total", "load", "prompt_eval", "eval")},
        "prompt_eval_count": WHOLE,
        "eval_count": WHOLE,
    }
    return {
        "JsonSchema": {"type": "object", "description": "A JSON schema; an unsupported keyword gets 400."},
        "DataUri": {
            "type": "string",
            "pattern": "^data:",
            "description": "data:image/jpeg;base64,...; no URL is opened.",
        },
        "Base64": {"type": "string", "contentEncoding": "base64"},
        "Part": _one(
            _object("type text", type={"enum": list(TEXTS)}, text=STRING),
            _object(
                "type image_url",
                type={"enum": list(IMAGES)},
                image_url=_one(ref("DataUri"), _object("url", url=ref("DataUri"), detail=STRING)),
            ),
            STRING,
        ),
        "Message": _object(
            "role content", role={"enum": list(ROLES)}, content=_one(STRING, _list(ref("Part"), 1))
        ),
        "Named": _object(name=STRING, schema=_given(ref("JsonSchema")), parameters=_given(ref("JsonSchema"))),
        "Tool": _object("type function", type={"const": "function"}, function=ref("Named")),
        "Format": _one(
            _object("type", type={"enum": ["text", "json_object"]}, schema=_given(ref("JsonSchema"))),
            _object(
                "type json_schema",
                type={"const": "json_schema"},
                json_schema=_object("schema", name=STRING, schema=ref("JsonSchema")),
            ),
        ),
        "ChatRequest": _object(
            "messages",
            messages=_list(ref("Message"), 1),
            model={
                "type": ["string", "null"],
                "description": "A name that is served; none means the one there is.",
            },
            stream=FLAG,
            stream_options=_given(_object(include_usage=FLAG)),
            max_tokens=tokens,
            max_completion_tokens=tokens,
            **_sampling(),
            stop=_one(STRING, _list(STRING, 0, MAX_STOPS), NULL),
            n={"enum": [1, None]},
            logprobs=FLAG,
            top_logprobs={"type": ["integer", "null"], "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
            response_format=_given(ref("Format")),
            tools=_given(_list(ref("Tool"))),
            tool_choice=_one({"enum": ["none", "required", None]}, ref("Tool")),
            return_progress=FLAG,
        ),
        "PrepareRequest": _object("messages", messages=_list(ref("Message"), 1)),
        "ViewRequest": _object("image_url", image_url=ref("DataUri")),
        "AlbumSearchRequest": _object(
            words=TEXT_OR_NULL,
            like=number,
            image_url=_given(ref("DataUri")),
            column=number,
            limit={"type": "integer", "minimum": 1, "maximum": MAX_HITS},
        ),
        "Album": _object(
            "object name pictures columns",
            object={"const": "album"},
            name=TEXT_OR_NULL,
            pictures=WHOLE,
            columns=_list(_object("id question model", id=WHOLE, question=STRING, model=STRING)),
        ),
        "Hits": _object(
            "object data",
            object={"const": "list"},
            data=_list(
                _object(
                    "id path caption question mark likeness",
                    id=WHOLE,
                    path=STRING,
                    caption=STRING,
                    question=STRING,
                    mark=TEXT_OR_NULL,
                    likeness={"type": ["number", "null"]},
                ),
                0,
                MAX_HITS,
            ),
        ),
        "OllamaOptions": _object(
            num_predict={"type": ["integer", "null"]}, num_ctx=WHOLE, stop=_list(STRING), **_sampling()
        ),
        "OllamaMessage": _object(
            "role content",
            role={"enum": ["system", "user", "assistant"]},
            content=STRING,
            images=_given(_list(ref("Base64"))),
        ),
        "OllamaChatRequest": _object(
            "model", **ollama, messages=_given(_list(ref("OllamaMessage"))), tools=_given(_list({}, 0, 0))
        ),
        "OllamaGenerateRequest": _object(
            "model",
            **ollama,
            prompt=TEXT_OR_NULL,
            system=TEXT_OR_NULL,
            images=_given(_list(ref("Base64"))),
            suffix={"enum": ["", None]},
            template={"enum": ["", None]},
            raw={"enum": [False, None]},
            context=_given(_list(WHOLE, 0, 0)),
        ),
        "OllamaNamed": _object(model=STRING, name=STRING, stream=FLAG),
        "Usage": _object(
            "prompt_tokens completion_tokens total_tokens",
            prompt_tokens=WHOLE,
            completion_tokens=WHOLE,
            total_tokens=WHOLE,
            prompt_tokens_details=_object(
                "cached_tokens image_tokens", cached_tokens=WHOLE, image_tokens=WHOLE
            ),
        ),
        "Timings": {"type": "object", "additionalProperties": _one(NUMBER, STRING)},
        "ChatCompletion": _object(
            "id object created model choices usage timings",
            id=STRING,
            object={"const": "chat.completion"},
            created=WHOLE,
            model=STRING,
            choices=_list(
                _object(
                    "index message finish_reason",
                    index=WHOLE,
                    finish_reason={"enum": ["stop", "length"]},
                    logprobs={"type": ["object", "null"]},
                    message=_object(
                        "role content",
                        role={"const": "assistant"},
                        content=TEXT_OR_NULL,
                        tool_calls=_list(OBJECT),
                    ),
                ),
                1,
                1,
            ),
            usage=ref("Usage"),
            timings=ref("Timings"),
            system_fingerprint=STRING,
        ),
        "Model": _object(
            "id object created owned_by aliases max_model_len",
            id=STRING,
            object={"const": "model"},
            created=WHOLE,
            owned_by=STRING,
            aliases=_list(STRING),
            max_model_len=WHOLE,
            architecture=OBJECT,
            meta=OBJECT,
        ),
        "Models": _object("object data", object={"const": "list"}, data=_list(ref("Model"), 1)),
        "Health": _object("status queue", status=STRING, queue=WHOLE, error=OBJECT),
        "Props": _object(
            "default_generation_settings total_slots modalities",
            default_generation_settings=OBJECT,
            total_slots=WHOLE,
            modalities=OBJECT,
        ),
        "Preparation": _object(
            "id object status stage done total",
            id=STRING,
            object={"const": "prepare"},
            stage=STRING,
            done=WHOLE,
            total=WHOLE,
            status={"enum": ["queued", "running", "done", "failed", "cancelled"]},
            error=TEXT_OR_NULL,
        ),
        "Prepared": _object("id object", id=STRING, object={"const": "prepare"}),
        "OllamaVersion": _object("version", version=STRING),
        "OllamaModels": _object(
            "models",
            models=_list(
                _object("name model", name=STRING, model=STRING, size=WHOLE, digest=STRING, details=OBJECT)
            ),
        ),
        "OllamaShown": _object(
            "details model_info capabilities", details=OBJECT, model_info=OBJECT, capabilities=_list(STRING)
        ),
        "OllamaStatus": _object("status", status={"const": "success"}),
        "OllamaChatReply": _object(
            "model created_at message done",
            **reply,
            message=_object("role content", role={"const": "assistant"}, content=STRING),
        ),
        "OllamaGenerateReply": _object("model created_at response done", **reply, response=STRING),
        "Error": _object(
            "error",
            error=_object(
                "message type param code",
                message=STRING,
                type=STRING,
                param=TEXT_OR_NULL,
                code={"type": ["string", "integer", "null"]},
            ),
        ),
        "OllamaError": _object("error", error=STRING),
        "Document": _object("openapi info paths", openapi=STRING, info=OBJECT, paths=OBJECT),
    }
