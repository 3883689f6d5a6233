"""Request bodies: their types, which validate them and describe them in the OpenAPI document."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from mygpt.core.config import SamplingConfig
from mygpt.core.random import check_seed
from mygpt.core.window import Overflow
from mygpt.errors import InputError
from mygpt.json_objects import without_duplicates
from mygpt.server.problems import ApiError
from mygpt.server.settings import ServerSettings

MAX_STOP_CHARACTERS, MAX_LOGPROBS, DEFAULT_MAX_TOKENS = 256, 5, 16
_MOST_CHOICES_WITH_LOGPROBS = 16  # of `max_tokens` tokens each: a response of some ten megabytes
_SMALLEST_NUCLEUS = 1e-9  # used for top_p = 0: only the most probable token remains

# Fields that mygpt does not support, with the values that have no effect and are accepted: fields
# of OpenAI, then those that clients of vLLM and llama.cpp send with their servers' defaults.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "repeat_penalty": (1,),
    "typical_p": (1,),
    "mirostat": (0,),
    "n_probs": (0,),
    "cache_prompt": (True, False),  # has no effect on the response
}

Prompt = str | list[int]
UnknownPolicy = Literal["error", "drop"]
_Id = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # the tokenizer checks it against the vocabulary
_Ids = Annotated[list[_Id], Meta(min_length=1)]
_Fraction = Annotated[float, Meta(ge=0, le=1)]
_Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_CHOICES = {"overflow": get_args(Overflow), "unknown": get_args(UnknownPolicy)}
_WORDS = {"str": "string", "int": "integer", "float": "number", "bool": "true or false"}
_WORDS |= {"array": "list", "Expected": "expected"}
_False = Annotated[bool, Meta(extra_json_schema={"const": False})]


@dataclass(frozen=True)
class CompletionRequest:
    """A valid request for completions, with OpenAI's names of fields.

    Attributes:
        prompts: texts, or token ids, to continue.
        n: choices for each prompt.
        max_tokens: the maximal number of new tokens of a choice.
        sampling: how tokens are sampled.
        seed: of the random numbers; choice i uses the stream (seed, i). None is a random seed.
        stop: strings that end a text and are not part of it.
        logprobs: how many alternatives to return for each token, or None.
        echo: whether the choice's text begins with the prompt.
        stream: whether pieces of text are sent as they are generated.
        include_usage: whether a stream ends with the numbers of tokens.
        overflow: what to do past the window.
        unknown: what to do with text that the tokenizer does not know.
    """

    prompts: list[Prompt]
    n: int
    max_tokens: int
    sampling: SamplingConfig
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    overflow: Overflow
    unknown: UnknownPolicy


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Only with stream=true."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted and ignored: it would only pad the events
    continuous_usage_stats: _False | None = None


class Text(msgspec.Struct, forbid_unknown_fields=True):
    """A text for the page's routes."""

    text: str
    unknown: UnknownPolicy | None = "error"


class Ids(msgspec.Struct, forbid_unknown_fields=True):
    """Token ids for the page's routes."""

    ids: _Ids
    unknown: UnknownPolicy | None = "error"


def completion_type(settings: ServerSettings) -> type[msgspec.Struct]:
    """The type of the body of POST /v1/completions, with the limits of one server."""

    def integer(least: int, most: int, description: str | None = None) -> Any:
        return Annotated[int, Meta(ge=least, le=most, description=description)]

    most = settings.max_choices
    stops: Any = Annotated[list[_Stop], Meta(max_length=settings.max_stops)]
    seeds = {"minimum": -1, "maximum": 2**64 - 1}  # too large for `Meta(le=...)`
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = [
        ("model", Annotated[str, Meta(extra_json_schema={"const": settings.name})]),
        ("prompt", str | list[str | _Id | _Ids] | None, ""),
        ("n", integer(1, most) | None, 1),
        ("best_of", integer(1, most, "Must be equal to n.") | None, None),
        (
            "max_tokens",
            integer(-1, settings.max_tokens, "-1 is the maximum.") | None,
            min(DEFAULT_MAX_TOKENS, settings.max_tokens),
        ),
        ("temperature", Annotated[float, Meta(ge=0, description="0 is greedy.")] | None, 1.0),
        ("top_p", _Fraction | None, None),
        ("top_k", integer(-1, 2**31, "0 and -1 disable it.") | None, None),
        ("min_p", _Fraction | None, None),
        ("repetition_penalty", Annotated[float, Meta(gt=0)] | None, None),
        ("seed", Annotated[int, Meta(extra_json_schema=seeds)] | None, None),
        ("stop", _Stop | stops | None, None),
        ("logprobs", integer(0, MAX_LOGPROBS, "Alternatives per token.") | _False | None, None),
        ("echo", bool | None, False),
        ("stream", bool | None, False),
        ("stream_options", StreamOptions | None, None),
        ("overflow", Overflow | None, "crop"),
        ("unknown", UnknownPolicy | None, "error"),
        ("user", str | None, None),
        *((name, Any, None) for name in NEUTRAL),
    ]
    return msgspec.defstruct("CompletionRequest", fields, forbid_unknown_fields=True)


def invalid(param: str | None, message: str) -> ApiError:
    """The error for a field, or for the whole body if `param` is None."""
    return ApiError(400, message, param=param, code="invalid_value")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: if it is not JSON, or not an object.
    """
    try:
        found = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_number,
            object_pairs_hook=without_duplicates,
        )
    except (ValueError, RecursionError) as error:
        why = str(error).partition("; use sys")[0]  # Python's advice about very long numbers
        raise invalid(None, f"the body is not JSON: {why}") from None
    if not isinstance(found, dict):
        raise invalid(None, "the body must be a JSON object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _number(text: str) -> float:
    """A number of a body; in JSON 1.0 is the integer 1."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**63 else value


def convert(found: dict[str, Any], kind: type[Any]) -> Any:
    """A body's object as a value of `kind`; a field that is null has its default.

    Raises:
        ApiError: for a field that is not valid, which it names.
    """
    known = kind.__struct_fields__
    values = {name: v for name, v in found.items() if v is not None or name not in known}
    try:
        return msgspec.convert(values, kind)
    except UnicodeError:
        raise invalid(None, "the body has a lone surrogate, which is not valid Unicode") from None
    except msgspec.ValidationError as error:
        raise _problem(str(error), values) from None


def _problem(text: str, values: dict[str, Any]) -> ApiError:
    """The API's error for one of msgspec, such as "Expected `int` <= 40 - at `$.n`"."""
    missing = re.fullmatch(r"Object missing required field `(\w+)`", text)
    if missing:
        return invalid(missing[1], f"the field {missing[1]} is missing: it is required")
    unknown = re.match(r"Object contains unknown field `(.*?)`( - at|$)", text, re.DOTALL)
    if unknown:
        message = f"unknown field {unknown[1]!r:.80}: GET /openapi.json lists the fields"
        param = ascii(unknown[1])[1:81].rstrip("'")
        return ApiError(400, message, param=param, code="unknown_field")
    problem, _, path = text.replace("`", "").replace(" | null", "").rpartition(" - at $.")
    param = path.partition(".")[0].partition("[")[0]
    place = path.removeprefix(param)
    if param in _CHOICES:
        problem = f"expected {' or '.join(_CHOICES[param])}"
    else:  # with the words of JSON instead of those of Python
        problem = re.sub(r"\w+", lambda word: _WORDS.get(word[0], word[0]), problem)
    where = f" at {place}" if place else ""
    return invalid(param, f"{param}={shown(values[param])} is not valid{where}: {problem}")


def shown(value: Any) -> str:
    """A value as JSON, shortened to one line for messages."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 60 else text[:60] + " ..."


def parse_completion(
    found: dict[str, Any], kind: type[Any], settings: ServerSettings
) -> CompletionRequest:
    """Validate the body of POST /v1/completions.

    Args:
        found: the body.
        kind: its type, from `completion_type(settings)`.
        settings: the server's limits.

    Raises:
        ApiError: 400 for a field that is not valid, which it names; 404 for another model.
    """
    body = convert(found, kind)
    if body.model != settings.name:
        raise unknown_model(body.model, settings.name)
    for name, neutral in NEUTRAL.items():
        value = getattr(body, name)
        if value is not None and not any(_equal(value, accepted) for accepted in neutral):
            raise invalid(name, f"{name}={shown(value)} is not supported: leave {name} out")
    if body.best_of not in (None, body.n):
        raise invalid("best_of", f"best_of={body.best_of} must be n={body.n}: all are returned")
    prompts = _prompts(body.prompt, settings)
    choices, most = body.n * len(prompts), settings.max_choices
    if choices > most:
        raise invalid(
            "n",
            f"n={body.n} for {len(prompts)} prompts makes {choices} choices, more than the limit "
            f"of {most}: send fewer prompts, or a smaller n",
        )
    # -1 as in llama.cpp: until the text ends.
    max_tokens = settings.max_tokens if body.max_tokens == -1 else body.max_tokens
    if body.logprobs is True:
        raise invalid("logprobs", "logprobs=true must be the number of alternatives, from 0 to 5")
    logprobs = None if body.logprobs is False else body.logprobs
    tokens, most = choices * max_tokens, _MOST_CHOICES_WITH_LOGPROBS * settings.max_tokens
    if logprobs is not None and tokens > most:
        raise invalid(
            "logprobs",
            f"log-probabilities of {tokens} tokens are more than {most}, the limit for one "
            "response: send fewer prompts at once, or a smaller max_tokens",
        )
    return CompletionRequest(
        prompts=prompts,
        n=body.n,
        max_tokens=max_tokens,
        sampling=_sampling(body),
        seed=_seed(body.seed),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        logprobs=logprobs,
        echo=body.echo,
        stream=body.stream,
        include_usage=_include_usage(body.stream_options, body.stream),
        overflow=body.overflow,
        unknown=body.unknown,
    )


def _equal(value: Any, accepted: Any) -> bool:
    """Whether two values are equal in JSON, where 0 does not equal false."""
    return isinstance(value, bool) == isinstance(accepted, bool) and bool(value == accepted)


def unknown_model(model: str, name: str) -> ApiError:
    """The error for a model that this server does not have."""
    return ApiError(
        404,
        f"this server has no model {model!r:.80}: its model is {name}",
        param="model",
        code="model_not_found",
    )


def _prompts(value: str | list[Any], settings: ServerSettings) -> list[Prompt]:
    if isinstance(value, str):
        return [value]
    kinds = set(map(type, value))
    if len(kinds) != 1:
        raise invalid(
            "prompt",
            f"prompt={shown(value)} must be a string, a list of strings, a list of token ids or "
            "a list of such lists, and not empty",
        )
    if kinds == {int}:
        return [value]
    if len(value) > settings.max_choices:
        raise invalid(
            "prompt",
            f"prompt is a list of {len(value)}, more than the limit of {settings.max_choices} "
            "choices: send fewer at once",
        )
    return value


def _sampling(body: Any) -> SamplingConfig:
    return SamplingConfig(
        temperature=body.temperature,
        top_k=None if body.top_k is None else max(0, body.top_k),  # -1 disables it, too
        top_p=_SMALLEST_NUCLEUS if body.top_p == 0 else body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
    )


def _seed(seed: int | None) -> int | None:
    if seed is None or seed == -1:  # -1 as in llama.cpp: a random seed
        return None
    try:
        return check_seed(seed)
    except InputError as error:
        raise invalid("seed", f"{error}, or -1 for a random one") from None


def _include_usage(options: StreamOptions | None, stream: bool) -> bool:
    if options is None:
        return False
    if options.continuous_usage_stats:
        raise invalid(
            "stream_options",
            "continuous_usage_stats=true is not supported: use include_usage, which counts the "
            "tokens at the end",
        )
    if not stream:
        raise invalid("stream_options", 'stream_options need a stream: add "stream": true')
    return bool(options.include_usage)
