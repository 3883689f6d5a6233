"""Request bodies: their types, which validate them and describe them in the OpenAPI document."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import msgspec
from msgspec import Meta

from mygpt.core.config import SamplingConfig
from mygpt.core.window import Overflow
from mygpt.errors import InputError
from mygpt.json_objects import without_duplicates
from mygpt.server.problems import ApiError
from mygpt.server.settings import ServerSettings

MAX_STOP_CHARACTERS, MAX_LOGPROBS, DEFAULT_MAX_TOKENS = 256, 5, 16
MAX_PARTS = 512  # more than the heads and blocks of most models
MAX_OTHER_CHARACTERS = 2**16
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

Body = TypeVar("Body", bound=msgspec.Struct)
Prompt = str | list[int]
UnknownPolicy = Literal["error", "drop"]
_Id = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # the tokenizer checks it against the vocabulary
_Ids = Annotated[list[_Id], Meta(min_length=1)]
_Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Fraction = Annotated[float, Meta(ge=0, le=1)]
_Seed = Annotated[int, Meta(extra_json_schema={"minimum": -1, "maximum": 2**64 - 1})]
_False = Annotated[bool, Meta(extra_json_schema={"const": False})]
_PART = r"^(\d{1,9}\.\d{1,9}|(attention|mlp|block)\d{1,9})$"  # documented; the model checks it
_Part = Annotated[str, Meta(extra_json_schema={"pattern": _PART})]
_Parts = Annotated[list[_Part], Meta(max_length=MAX_PARTS)]
_CHOICES = {"overflow": get_args(Overflow), "unknown": get_args(UnknownPolicy)}
_WORDS = {"str": "string", "int": "integer", "float": "number", "bool": "true or false"}
_WORDS |= {"array": "list", "Expected": "expected"}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Only with stream=true; `include_obfuscation` would only pad the events, and is ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: _False | None = None


class CompletionRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A request for completions, with OpenAI's fields and those of mygpt."""

    model: str
    prompt: str | list[str | _Id | _Ids] = ""
    n: Annotated[int, Meta(ge=1)] = 1
    best_of: Annotated[int, Meta(description="Must be equal to n.")] | None = None
    max_tokens: Annotated[int, Meta(ge=-1, description="-1 is the maximum.")] = DEFAULT_MAX_TOKENS
    temperature: Annotated[float, Meta(ge=0, description="0 is greedy.")] = 1.0
    top_p: _Fraction | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31, description="0 and -1 disable it.")] | None = None
    min_p: _Fraction | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    seed: _Seed | None = None
    stop: _Stop | list[_Stop] = []
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | _False | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    overflow: Overflow = "crop"
    unknown: UnknownPolicy = "error"
    user: str = ""

    @property
    def prompts(self) -> list[Prompt]:
        """Texts, or token ids, to continue."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return cast("list[Prompt]", self.prompt if several else [self.prompt])

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a text and are not part of it."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are sampled."""
        return SamplingConfig(
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(0, self.top_k),
            top_p=_SMALLEST_NUCLEUS if self.top_p == 0 else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Text(msgspec.Struct, forbid_unknown_fields=True):
    """A text for the page's routes."""

    text: str
    unknown: UnknownPolicy = "error"


class Ids(msgspec.Struct, forbid_unknown_fields=True):
    """Token ids for the page's routes."""

    ids: _Ids
    unknown: UnknownPolicy = "error"


class InsideRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Token ids, which prediction is shown, and which parts are off or those of `other`."""

    ids: _Ids
    position: Annotated[int, Meta(ge=0, description="Default: the last one.")] | None = None
    token: _Id | None = None
    ablate: _Parts = []
    patch: _Parts = []
    other: Annotated[str, Meta(max_length=MAX_OTHER_CHARACTERS)] = ""
    patch_position: Annotated[int, Meta(ge=0, description="Default: all.")] | None = None


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


def convert(found: dict[str, Any], kind: type[Body]) -> Body:
    """A body's object as a value of `kind`; a field that is null has its default.

    Raises:
        ApiError: for a field that is not valid, which it names.
    """
    known: tuple[str, ...] = kind.__struct_fields__
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


def parse_completion(found: dict[str, Any], settings: ServerSettings) -> CompletionRequest:
    """Validate the body of POST /v1/completions.

    In the result, `seed` is None and not -1 if it is to be random, `max_tokens` is not -1, and
    `logprobs` is None and not False if there are none.

    Raises:
        ApiError: 400 for a field that is not valid, which it names; 404 for another model.
    """
    for name, neutral in NEUTRAL.items():
        value = found.pop(name, None)
        if value is not None and not any(_equal(value, accepted) for accepted in neutral):
            raise invalid(name, f"{name}={shown(value)} is not supported: leave {name} out")
    limit = settings.max_tokens
    if found.get("max_tokens") is None:
        found["max_tokens"] = min(DEFAULT_MAX_TOKENS, limit)
    body = convert(found, CompletionRequest)
    if body.model != settings.name:
        raise unknown_model(body.model, settings.name)
    if body.max_tokens > limit:
        problem = f"max_tokens={body.max_tokens} is more than {limit}, the limit: send less"
        raise invalid("max_tokens", problem)
    if body.max_tokens == -1:  # as in llama.cpp: until the text ends
        body.max_tokens = limit
    if body.seed == -1:  # as in llama.cpp
        body.seed = None
    if body.seed is not None and not 0 <= body.seed < 2**64:
        problem = f"seed={body.seed} must be an integer from 0 to 2**64 - 1, or -1 for a random one"
        raise invalid("seed", problem)
    if len(body.stops) > settings.max_stops:
        problem = f"stop has {len(body.stops)} strings, more than the limit of {settings.max_stops}"
        raise invalid("stop", f"{problem}: send fewer")
    try:
        _ = body.sampling
    except InputError as error:  # an infinite number: its message begins with the field's name
        raise invalid(str(error).partition("=")[0], str(error)) from None
    _check_choices(body, settings)
    _check_stream_options(body)
    return body


def _check_choices(body: CompletionRequest, settings: ServerSettings) -> None:
    """Check the numbers of prompts, choices and log-probabilities."""
    if body.best_of not in (None, body.n):
        raise invalid("best_of", f"best_of={body.best_of} must be n={body.n}: all are returned")
    if isinstance(body.prompt, list) and len(set(map(type, body.prompt))) != 1:
        raise invalid(
            "prompt",
            f"prompt={shown(body.prompt)} must be a string, a list of strings, a list of token "
            "ids or a list of such lists, and not empty",
        )
    choices, most = body.n * len(body.prompts), settings.max_choices
    if choices > most:
        raise invalid(
            "n" if body.n > 1 else "prompt",
            f"n={body.n} for {len(body.prompts)} prompts makes {choices} choices, more than the "
            f"limit of {most}: send fewer prompts, or a smaller n",
        )
    if body.logprobs is False:
        body.logprobs = None
    if body.logprobs is True:
        raise invalid("logprobs", "logprobs=true must be the number of alternatives, from 0 to 5")
    tokens, most = choices * body.max_tokens, _MOST_CHOICES_WITH_LOGPROBS * settings.max_tokens
    if body.logprobs is not None and tokens > most:
        raise invalid(
            "logprobs",
            f"log-probabilities of {tokens} tokens are more than {most}, the limit for one "
            "response: send fewer prompts at once, or a smaller max_tokens",
        )


def _check_stream_options(body: CompletionRequest) -> None:
    if body.stream_options is None:
        return
    problem = ""
    if body.stream_options.continuous_usage_stats:
        problem = "continuous_usage_stats=true is not supported: use include_usage"
    elif not body.stream:
        problem = 'stream_options need a stream: add "stream": true'
    if problem:
        raise invalid("stream_options", problem)


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
