"""The OpenAPI 3.1 document of the API, from the types of requests and responses."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from mygpt import __version__
from mygpt.server.requests import NEUTRAL, CompletionRequest, Ids, InsideRequest, Text
from mygpt.server.settings import ServerSettings
from mygpt.tokenization import CharTokenizer, Tokenizer

Schema = dict[str, Any]

_ERRORS = {
    "400": "A field is not valid, or the body is not JSON.",
    "401": "The API key is missing or wrong.",
    "403": "The request is from another site's page, or names a host that is not this server's.",
    "404": "The model is not this server's, or the path does not exist.",
    "413": "The body is too large.",
    "415": "The Content-Type is not application/json.",
    "429": "Too many requests wait; Retry-After gives the seconds until the next try.",
    "500": "An internal error of the server.",
    "503": "The server accepts no requests.",
}

# Path, operation, summary, the type of the response if it has one, and those of the request.
_OPERATIONS: list[tuple[str, ...]] = [
    ("/v1/completions", "complete", "Continue prompts.", "Completion", "CompletionRequest"),
    ("/v1/models", "list_models", "List the models.", "Models"),
    ("/v1/models/{model}", "get_model", "The model by its id.", "Model"),
    ("/health", "health", "Whether the server accepts requests.", "Health"),
    ("/openapi.json", "openapi", "This document.", ""),
    ("/api/model", "about", "Describe the model.", ""),
    ("/api/next", "next", "Predict the next token after a text.", "Next", "Text", "Ids"),
    ("/api/attention", "attention", "Attention weights of a text.", "Attention", "Text", "Ids"),
    ("/api/inside", "inside", "What the model computes for a text.", "Inside", "InsideRequest"),
]


class Logprobs(TypedDict):
    """Log-probabilities in nats, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(TypedDict):
    """One continuation."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Usage(TypedDict):
    """The numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(TypedDict):
    """The choices; a stream has events of this form. Its seed reproduces the choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    seed: int
    choices: list[Choice]
    usage: Usage
    left_out: NotRequired[list[str]]  # parts of prompts dropped by "unknown": "drop"


class Model(TypedDict):
    """The model's id and date."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(TypedDict):
    """A list with the one model."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """`restarts` is how often decoding failed for all running requests and restarted."""

    healthy: bool
    running: int
    waiting: int
    restarts: int


class Token(TypedDict):
    """A token's id and text."""

    id: int
    text: str


class Next(TypedDict):
    """Tokens, and all logits, or the `top` ones as (id, logit, text) and the rest's log-sum-exp."""

    ids: list[int]
    tokens: list[Token]
    window_start: int
    logits: NotRequired[list[float]]
    top: NotRequired[list[tuple[int, float, str]]]
    rest: NotRequired[float]
    text: NotRequired[str]  # what remains of a text if parts were dropped
    left_out: NotRequired[list[str]]


class Attention(TypedDict):
    """The weights in each layer and head between the last positions, from `start` on."""

    layers: int
    heads: int
    start: int
    weights: list[list[list[list[float]]]]


class LensRow(TypedDict):
    """The prediction at one depth: tokens as (id, text, probability), and one token's rank."""

    name: str  # "embedding", "block1"
    top: list[tuple[int, str, float]]
    probability: float
    rank: int


class Change(TypedDict):
    """A changed model: tokens as (id, text, probability before, and after), and the others."""

    parts: list[str]
    next: list[tuple[int, str, float, float]]
    others: tuple[int, float, float]
    loss: float | None
    continuation: NotRequired[list[Token]]  # not of a patch


class Inside(TypedDict):
    """One prediction of the changed model; `loss` and `continuation` are of the unchanged one."""

    start: int  # tokens that are not read
    position: int
    token: Token  # whose logit it is
    names: list[list[tuple[str, float]]] | None  # a head's kind, and its relative score
    lens: list[LensRow]
    contributions: list[tuple[str, float]] | None  # null for a patch of a block
    logit: float
    total: float | None
    attention: list[list[list[list[float]]]]  # between the last positions
    loss: float | None  # nats per token; null for one token
    continuation: list[Token]
    ablation: NotRequired[Change]
    patch: NotRequired[Change]


class ErrorDetail(TypedDict):
    """The problem, and the field that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """An error response."""

    error: ErrorDetail


def openapi(tokenizer: Tokenizer, settings: ServerSettings) -> Schema:
    """The OpenAPI document for one model and the server's limits."""
    components: Schema = {"schemas": _schemas(tokenizer, settings)}
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
        "components": components,
    }
    if settings.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _schemas(tokenizer: Tokenizer, settings: ServerSettings) -> Schema:
    """The types' schemas, and for prompts what only this tokenizer and these limits accept."""
    types: list[Any] = [CompletionRequest, Text, Ids, InsideRequest]
    types += [Completion, Models, Health, Next, Attention, Inside, Error]
    template = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components(types, ref_template=template)
    most = settings.max_prompt_tokens
    text: Schema = {"type": "string", "maxLength": most}
    if isinstance(tokenizer, CharTokenizer):
        known = "".join(f"\\u{ord(c):04x}" for c in tokenizer.chars if ord(c) < 2**16)
        beyond = "".join(c for c in tokenizer.chars if ord(c) >= 2**16)
        text["pattern"] = f"^[{known}{beyond}]*$"
    token = {"type": "integer", "minimum": 0, "maximum": tokenizer.vocab_size - 1}
    ids = {"type": "array", "items": token, "minItems": 1, "maxItems": most}
    many = {"type": "array", "minItems": 1, "maxItems": settings.max_choices}
    schemas["Text"]["properties"]["text"] = text
    schemas["Ids"]["properties"]["ids"] = schemas["InsideRequest"]["properties"]["ids"] = ids
    schemas["InsideRequest"]["properties"]["token"] = token
    fields = schemas["CompletionRequest"]["properties"]
    fields["prompt"] = {
        "description": "Without a prompt, a new text is generated from its beginning.",
        "anyOf": [text, many | {"items": text}, ids, many | {"items": ids}],
    }
    fields["n"]["maximum"] = settings.max_choices
    fields["max_tokens"]["maximum"] = settings.max_tokens
    fields["stop"]["anyOf"][1]["maxItems"] = settings.max_stops
    for kind in ("CompletionRequest", "Text", "Ids", "InsideRequest"):
        optional = set(schemas[kind]["properties"]) - set(schemas[kind]["required"])
        for name in optional:
            schema = schemas[kind]["properties"][name]
            schemas[kind]["properties"][name] = {"anyOf": [schema, {"type": "null"}]}
    fields["model"]["const"] = settings.name
    fields |= {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    return schemas


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema, description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _paths(settings: ServerSettings) -> Schema:
    paths: Schema = {}
    for path, name, summary, answer, *bodies in _OPERATIONS:
        errors = {"401", "403", "500", "503"}
        errors |= {"400", "413", "415", "429"} if bodies else set()
        errors |= {"404"} if path in ("/v1/completions", "/v1/models/{model}") else set()
        schema = _ref(answer) if answer else {"type": "object"}
        operation: Schema = {
            "operationId": name,
            "summary": summary,
            "responses": {
                "200": _json(schema, "The result."),
                **{status: _json(_ref("Error"), _ERRORS[status]) for status in sorted(errors)},
            },
        }
        if bodies:
            body = {"anyOf": [_ref(body) for body in bodies]}
            operation["requestBody"] = _json(body, "The request.") | {"required": True}
        paths[path] = {"post" if bodies else "get": operation}
    completion = paths["/v1/completions"]["post"]["responses"]["200"]
    completion["content"]["text/event-stream"] = {}  # OpenAPI 3.1 cannot describe events
    named = {"type": "string", "const": settings.name}
    parameter = {"name": "model", "in": "path", "required": True, "schema": named}
    paths["/v1/models/{model}"]["parameters"] = [parameter]
    unhealthy = {"allOf": [_ref("Error"), _ref("Health")]}
    paths["/health"]["get"]["responses"]["503"] = _json(unhealthy, _ERRORS["503"])
    return paths
