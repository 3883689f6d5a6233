"""The OpenAPI 3.1 document of the API, as precise as JSON Schema allows."""

from __future__ import annotations

from typing import Any

from mygpt import __version__
from mygpt.core.window import OVERFLOW_POLICIES
from mygpt.decode.writer import Writer
from mygpt.server.requests import (
    DEFAULT_MAX_TOKENS,
    MAX_LOGPROBS,
    MAX_STOP_CHARACTERS,
    NEUTRAL,
    STREAM_OPTIONS,
)
from mygpt.server.settings import ServerSettings
from mygpt.tokenization import CharTokenizer
from mygpt.tokenization.unknown import PROMPT_POLICIES

Schema = dict[str, Any]

_STRING, _INTEGER, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_ERRORS = {
    "400": "A field is not valid, or the body is not JSON.",
    "401": "The API key is missing or wrong.",
    "403": "The request is from another site's page, or names a host that is not this server's.",
    "404": "The model is not this server's, or the path does not exist.",
    "405": "The path does not support this method.",
    "413": "The body is too large.",
    "415": "The Content-Type is not application/json.",
    "429": "Too many requests wait; Retry-After gives the seconds until the next try.",
    "500": "An internal error of the server.",
    "503": "The server is shutting down.",
}


def openapi(writer: Writer, settings: ServerSettings) -> Schema:
    """The OpenAPI document for one model and the server's limits."""
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "mygpt",
            "version": __version__,
            "description": (
                "OpenAI's completions API for one small GPT. Unknown fields are an error; null is "
                "the same as omitting a field."
            ),
        },
        "paths": _paths(settings),
        "components": {"schemas": _schemas(writer, settings)},
    }
    if settings.api_key is not None:
        scheme = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"key": scheme}
        document["security"] = [{"key": []}]
    return document


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema, description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _operation(
    name: str, summary: str, answer: Schema, body: str | None = None, errors: str = ""
) -> Schema:
    statuses = f"401 403 500 503 {errors} {'400 413 415 429' if body else ''}".split()
    operation: Schema = {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": answer,
            **{status: _json(_ref("Error"), _ERRORS[status]) for status in sorted(statuses)},
        },
    }
    if body:
        content = {"application/json": {"schema": _ref(body)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _paths(settings: ServerSettings) -> Schema:
    completion = _json(
        _ref("Completion"), "The choices; with stream=true, server-sent events of this form."
    )
    completion["content"]["text/event-stream"] = {}  # OpenAPI 3.1 cannot describe events
    found = _json(_ref("Model"), "The model's id and date.")
    model = _operation("get_model", "Get the model by its id.", found, errors="404")
    named = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "const": settings.name},
    }
    accepted = _json(_ref("Health"), "The server accepts requests.")
    health = _operation("health", "Whether the server accepts requests.", accepted)
    health["responses"]["503"] = _json(
        {"allOf": [_ref("Error"), _ref("Health")]},
        "The server accepts no requests, and the reason.",
    )
    logits = "Predict the next token after a text: the logits of all tokens, or the largest ones."
    weights = "The attention weights of the last positions, in each layer and head."
    models = _json(_ref("Models"), "A list with the one model.")
    document = _json({"type": "object"}, "An OpenAPI 3.1 document.")
    shape = _json({"type": "object"}, "Name, parameters, shape, tokenizer, and vocabulary.")
    return {
        "/v1/completions": {
            "post": _operation(
                "complete", "Continue one or more prompts.", completion, "CompletionRequest", "404"
            )
        },
        "/v1/models": {"get": _operation("list_models", "List the models.", models)},
        "/v1/models/{model}": {"get": model, "parameters": [named]},
        "/health": {"get": health},
        "/openapi.json": {"get": _operation("openapi", "This document.", document)},
        "/api/model": {"get": _operation("about", "Describe the model.", shape)},
        "/api/next": {
            "post": _operation("next", logits, _json(_ref("Next"), "Tokens and logits."), "Text")
        },
        "/api/attention": {
            "post": _operation(
                "attention", weights, _json(_ref("Attention"), "Attention weights."), "Text"
            )
        },
    }


def _object(required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties}


def _closed(required: str, **properties: Schema) -> Schema:
    return _object(required, **properties) | {"additionalProperties": False}


def _or_null(kind: str, **limits: Any) -> Schema:
    return {"type": [kind, "null"], **limits}


def _list(items: Schema, **limits: Any) -> Schema:
    return {"type": "array", "items": items, **limits}


def text_schema(writer: Writer, settings: ServerSettings) -> Schema:
    """The schema of a text; with a character tokenizer it has only the vocabulary's characters."""
    schema: Schema = {"type": "string", "maxLength": settings.max_prompt_tokens}
    if isinstance(writer.tokenizer, CharTokenizer):
        known = "".join(f"\\u{ord(c):04x}" for c in writer.tokenizer.chars if ord(c) < 2**16)
        beyond = "".join(c for c in writer.tokenizer.chars if ord(c) >= 2**16)
        schema["pattern"] = f"^[{known}{beyond}]*$"
    return schema


def _schemas(writer: Writer, settings: ServerSettings) -> Schema:
    token = {"type": "integer", "minimum": 0, "maximum": writer.tokenizer.vocab_size - 1}
    ids = _list(token, minItems=1, maxItems=settings.max_prompt_tokens)
    text = text_schema(writer, settings)
    return {
        "CompletionRequest": _completion_request(settings, text, ids),
        "Text": {
            "anyOf": [
                _closed("text", text=text, unknown=_UNKNOWN),
                _closed("ids", ids=ids, unknown=_UNKNOWN),
            ]
        },
        "Completion": _completion(),
        "Model": _object(
            "id object created owned_by",
            id=_STRING,
            object={"const": "model"},
            created=_INTEGER,
            owned_by=_STRING,
        ),
        "Models": _object("object data", object={"const": "list"}, data=_list(_ref("Model"))),
        "Health": _object(
            "healthy running waiting restarts",
            healthy={"type": "boolean"},
            running=_INTEGER,
            waiting=_INTEGER,
            restarts={
                "type": "integer",
                "description": "How often decoding failed for all running requests and restarted.",
            },
        ),
        "Next": _object(
            "ids tokens window_start",
            ids=_list(_INTEGER),
            tokens=_list(_object("id text", id=_INTEGER, text=_STRING)),
            window_start=_INTEGER,
            logits=_list(_NUMBER),
            top=_list(_list({"type": ["number", "string"]})),  # id, logit, text
            rest=_NUMBER,
            text={"type": "string", "description": "The text that remains if parts were dropped."},
            left_out=_list(_STRING),
        ),
        "Attention": _object(
            "layers heads start weights",
            layers=_INTEGER,
            heads=_INTEGER,
            start=_INTEGER,
            weights=_list(_list(_list(_list(_NUMBER)))),
        ),
        "Error": _object(
            "error",
            error=_object(
                "message type param code",
                message=_STRING,
                type=_STRING,
                param=_or_null("string"),
                code=_or_null("string"),
            ),
        ),
    }


_UNKNOWN: Schema = {
    "enum": [*PROMPT_POLICIES, None],
    "description": "What to do with characters that the tokenizer does not know.",
}


def _completion_request(settings: ServerSettings, text: Schema, ids: Schema) -> Schema:
    most = settings.max_choices
    count = {"minimum": 1, "maximum": most}
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
    many = {"minItems": 1, "maxItems": most}
    default = min(DEFAULT_MAX_TOKENS, settings.max_tokens)
    options = {name: _or_null("boolean") for name in sorted(STREAM_OPTIONS)}
    options["continuous_usage_stats"] = {"enum": [False, None]}
    fields: Schema = {
        "model": {"type": "string", "const": settings.name},
        "prompt": {
            "description": "Without a prompt, a new text is generated from its beginning.",
            "anyOf": [text, _list(text, **many), ids, _list(ids, **many), {"type": "null"}],
        },
        "n": _or_null("integer", default=1, **count),
        "best_of": _or_null("integer", description="Must be equal to n.", **count),
        "max_tokens": _or_null(
            "integer",
            default=default,
            minimum=-1,
            maximum=settings.max_tokens,
            description="-1 is the maximum.",
        ),
        "temperature": _or_null("number", default=1, minimum=0, description="0 is greedy."),
        "top_p": _or_null("number", minimum=0, maximum=1, description="0 is greedy."),
        "top_k": _or_null("integer", minimum=-1, maximum=2**31, description="0 and -1 disable it."),
        "min_p": _or_null("number", minimum=0, maximum=1),
        "repetition_penalty": _or_null("number", exclusiveMinimum=0),
        "seed": _or_null("integer", minimum=-1, maximum=2**64 - 1, description="-1 is random."),
        "stop": {"anyOf": [stop, _list(stop, maxItems=settings.max_stops), {"type": "null"}]},
        "logprobs": {
            "description": "The number of alternatives; null and false for no log-probabilities.",
            "anyOf": [_or_null("integer", minimum=0, maximum=MAX_LOGPROBS), {"const": False}],
        },
        "echo": _or_null("boolean", default=False),
        "stream": _or_null("boolean", default=False),
        "stream_options": {
            "description": "Only with stream=true.",
            "anyOf": [_closed("", **options), {"type": "null"}],
        },
        "overflow": {
            "enum": [*OVERFLOW_POLICIES, None],
            "description": "What to do past the window.",
        },
        "unknown": _UNKNOWN,
        "user": _or_null("string"),
        **{name: {"enum": [*values, None]} for name, values in NEUTRAL.items()},
    }
    return _closed("model", **fields)


def _completion() -> Schema:
    maybe = {"type": ["number", "null"]}
    likeliest = {"type": ["object", "null"], "additionalProperties": _NUMBER}
    logprobs = _object(
        "tokens token_logprobs top_logprobs text_offset",
        tokens=_list(_STRING),
        token_logprobs=_list(maybe),
        top_logprobs=_list(likeliest),
        text_offset=_list(_INTEGER),
    )
    choice = _object(
        "index text logprobs finish_reason",
        index=_INTEGER,
        text=_STRING,
        logprobs={"anyOf": [logprobs, {"type": "null"}]},
        finish_reason={"enum": ["stop", "length"]},
    )
    usage = _object(
        "prompt_tokens completion_tokens total_tokens",
        prompt_tokens=_INTEGER,
        completion_tokens=_INTEGER,
        total_tokens=_INTEGER,
    )
    return _object(
        "id object created model seed choices usage",
        id=_STRING,
        object={"const": "text_completion"},
        created=_INTEGER,
        model=_STRING,
        seed={"type": "integer", "description": "A request with this seed gives the same choices."},
        choices=_list(choice),
        usage=usage,
        left_out=_list(_STRING, description='Parts of prompts dropped by "unknown": "drop".'),
    )
