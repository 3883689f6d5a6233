"""What a request for completions wants, read from JSON field by field."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest

from mygpt.core.config import SamplingConfig
from mygpt.core.random import check_seed
from mygpt.core.window import OVERFLOW_POLICIES, Overflow
from mygpt.errors import InputError
from mygpt.server.problems import ApiError
from mygpt.server.settings import ServerSettings
from mygpt.tokenization.unknown import PROMPT_POLICIES

MAX_STOP_CHARACTERS, MAX_LOGPROBS, DEFAULT_MAX_TOKENS = 256, 5, 16
_MOST_CHOICES_WITH_LOGPROBS = 16  # of as many tokens as may be: an answer of some ten megabytes
_SMALLEST_NUCLEUS = 1e-9  # of top_p = 0: the likeliest token alone
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

# Fields that these models do not have, with the values that ask for nothing: OpenAI's, then those
# that clients of vLLM and of llama.cpp send with the values that those servers have anyway.
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
    "cache_prompt": (True, False),  # what was read before is never read again, nor seen
}
FIELDS = frozenset(
    {
        *("model", "prompt", "n", "best_of", "max_tokens", "seed", "stop", "logprobs", "echo"),
        *("stream", "stream_options", "user", "overflow", "unknown"),
        *SAMPLING_FIELDS,
        *NEUTRAL,
    }
)

STREAM_OPTIONS = frozenset({"include_usage", "include_obfuscation", "continuous_usage_stats"})

Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class CompletionRequest:
    """A request for completions; fields as OpenAI's where they have one.

    Attributes:
        prompts: texts, or token ids, to continue.
        n: choices for each prompt.
        max_tokens: the most new tokens of a choice.
        sampling: how tokens are drawn.
        seed: of all random numbers; choice i takes the stream (seed, i). None draws one.
        stop: strings that end a text and are no part of it.
        logprobs: how many alternatives to tell for each token, or None.
        echo: whether the prompt comes before the text.
        stream: whether pieces are sent as they come.
        include_usage: whether a stream ends with the numbers of tokens.
        overflow: what happens past the window.
        unknown: what becomes of what the tokenizer does not know of a prompt: error or drop.
    """

    prompts: tuple[Prompt, ...]
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
    unknown: str = "error"


def invalid(param: str | None, message: str) -> ApiError:
    """What is answered where a field is wrong."""
    return ApiError(400, message, param=param, code="invalid_value")


async def read_body(request: HttpRequest) -> bytes:
    """A request's body; `ApiError` where it does not say that it is JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
    return await request.body()


def parse_json(body_bytes: bytes) -> dict[str, Any]:
    """The JSON object of a body; `ApiError` for anything else."""
    try:
        text = body_bytes.decode("utf-8")
        body = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        why = str(error).partition("; use sys")[0]  # of a number with thousands of digits
        raise invalid(None, f"the body is not JSON: {why}") from None
    if not isinstance(body, dict):
        raise invalid(None, "the body must be a JSON object")
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r:.80} is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


class Fields:
    """A JSON object's fields by kind; null is the same as missing."""

    def __init__(self, body: dict[str, Any], known: frozenset[str]) -> None:
        unknown = min(set(body) - known, default=None)
        if unknown is not None:
            raise ApiError(
                400,
                f"unknown field {unknown!r:.80}: fields are {', '.join(sorted(known))}",
                param=ascii(unknown)[1:81].rstrip("'"),
                code="unknown_field",
            )
        self.values = {name: value for name, value in body.items() if value is not None}

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """A whole number in a range."""
        value = self.values.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # in JSON 1.0 is 1
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise invalid(
                name, f"{name}={_shown(value)} must be a whole number from {least} to {most}"
            )
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise invalid(name, f"{name}={_shown(value)} must be true or false")
        return value

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise invalid(name, f"{name}={_shown(value)} must be a string")
        return value


def _shown(value: Any) -> str:
    """A value as people know it, in one short line."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # a number with thousands of digits, say
        text = type(value).__name__
    return text if len(text) <= 60 else text[:60] + " ..."


def parse_completion(body: dict[str, Any], settings: ServerSettings) -> CompletionRequest:
    """What the fields of a body ask for.

    Raises:
        ApiError: 400 for a wrong field, which it names; 404 for another model.
    """
    fields = Fields(body, FIELDS)
    check_model(fields, settings.name)
    fields.text("user")
    for name, neutral in NEUTRAL.items():
        value = fields.values.get(name)
        if value is not None and not any(_same(value, accepted) for accepted in neutral):
            raise invalid(
                name, f"{name}={_shown(value)} is nothing that these models have: leave it out"
            )
    stream = fields.flag("stream")
    n = fields.whole("n", 1, 1, settings.max_choices) or 1
    best_of = fields.whole("best_of", n, 1, settings.max_choices)
    if best_of != n:
        raise invalid("best_of", f"best_of={best_of} must be n, which is {n}: all are returned")
    prompts = _prompts(fields.values.get("prompt", ""), settings)
    if n * len(prompts) > settings.max_choices:
        raise invalid(
            "n",
            f"n={n} for {len(prompts)} prompts is more than {settings.max_choices} choices: "
            "send fewer at once",
        )
    max_tokens, logprobs = _max_tokens(fields, settings.max_tokens), _logprobs(fields)
    tokens, most = n * len(prompts) * max_tokens, _MOST_CHOICES_WITH_LOGPROBS * settings.max_tokens
    if logprobs is not None and tokens > most:
        raise invalid(
            "logprobs",
            f"log-probabilities of {tokens} tokens are more than {most} in one answer: send fewer "
            "prompts at once, or a smaller max_tokens",
        )
    return CompletionRequest(
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        sampling=_sampling(fields),
        seed=_seed(fields),
        stop=_stop(fields.values.get("stop"), settings.max_stops),
        logprobs=logprobs,
        echo=fields.flag("echo"),
        stream=stream,
        include_usage=_include_usage(fields.values.get("stream_options"), stream),
        overflow=_overflow(fields),
        unknown=unknown_policy(fields),
    )


def _same(value: Any, accepted: Any) -> bool:
    """Whether two values are the same in JSON, where 1 is 1.0 and not true."""
    return isinstance(value, bool) == isinstance(accepted, bool) and bool(value == accepted)


def check_model(fields: Fields, name: str) -> None:
    """Raise `ApiError` unless the field "model" is this model's id."""
    model = fields.text("model")
    if model is None:
        raise invalid("model", f"model is missing: this server's is {name}")
    if model != name:
        raise unknown_model(model, name)


def unknown_model(model: str, name: str) -> ApiError:
    """What is answered where another model is asked for."""
    return ApiError(
        404,
        f"model {model!r:.80} is not here: this server's is {name}",
        param="model",
        code="model_not_found",
    )


def too_long(param: str, count: str, most: int) -> ApiError:
    """What is answered where a text has too many tokens."""
    return invalid(param, f"{param} has {count} tokens, more than {most}: shorten it")


def check_prompt_ids(value: Any, param: str, most: int) -> tuple[int, ...]:
    """Token ids as whole numbers; whether the model has them is for its tokenizer to say."""
    if len(value) > most:
        raise too_long(param, str(len(value)), most)
    if set(map(type, value)) == {int} and 0 <= min(value) <= max(value) < 2**31:
        return tuple(value)
    ids = []
    for place, token in enumerate(value):
        if isinstance(token, float) and token.is_integer():
            token = int(token)
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
            raise invalid(param, f"{param} holds {_shown(token)} at {place}: not a token id")
        ids.append(token)
    if not ids:
        raise invalid(param, f"{param} has no token ids: give at least one")
    return tuple(ids)


def _prompts(value: Any, settings: ServerSettings) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise invalid(
            "prompt",
            f"prompt={_shown(value)} must be a string, a list of strings, a list of token ids or "
            "a list of such lists",
        )
    kinds, most = set(map(type, value)), settings.max_prompt_tokens
    if not kinds & {str, list}:
        return (check_prompt_ids(value, "prompt", most),)
    if len(kinds) > 1:
        raise invalid("prompt", "prompt mixes strings, numbers and lists: send one kind")
    if len(value) > settings.max_choices:
        raise invalid(
            "prompt",
            f"prompt is a list of {len(value)}, more than {settings.max_choices} choices: send "
            "fewer at once",
        )
    if kinds == {str}:
        return tuple(value)
    return tuple(check_prompt_ids(part, "prompt", most) for part in value)


def _max_tokens(fields: Fields, most: int) -> int:
    found = fields.whole("max_tokens", min(DEFAULT_MAX_TOKENS, most), -1, most) or 0
    return most if found == -1 else found  # as llama.cpp's: until the text ends


def _sampling(fields: Fields) -> SamplingConfig:
    values: dict[str, Any] = {}
    for name in SAMPLING_FIELDS:
        value: Any = fields.values.get(name)
        if value is None:
            continue
        if name == "top_k":
            value = max(0, fields.whole(name, None, -1, 2**31) or 0)  # -1 is off too
        elif isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**63 else float("inf")
        if name == "top_p" and _same(value, 0):
            value = _SMALLEST_NUCLEUS
        try:
            SamplingConfig(**{name: value})
        except InputError as error:
            raise invalid(name, str(error)) from None
        values[name] = value
    return SamplingConfig(**values)


def _seed(fields: Fields) -> int | None:
    value = fields.values.get("seed")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or _same(value, -1):  # llama.cpp's word for none
        return None
    try:
        check_seed(value)
    except InputError:
        raise invalid(
            "seed",
            f"seed={_shown(value)} must be a whole number from 0 to 2**64 - 1, or -1 for a fresh "
            "one",
        ) from None
    return int(value)


def _logprobs(fields: Fields) -> int | None:
    value = fields.values.get("logprobs")
    if value is False:
        return None
    if value is True:
        raise invalid(
            "logprobs",
            f"logprobs=true must be a number of alternatives, from 0 to {MAX_LOGPROBS}",
        )
    return fields.whole("logprobs", None, 0, MAX_LOGPROBS)


def _stop(value: Any, most: int) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(found, list) and len(found) <= most
    for text in found if good else ():
        good = good and isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARACTERS
    if not good:
        raise invalid(
            "stop",
            f"stop={_shown(value)} must be a string or up to {most} strings, of 1 to "
            f"{MAX_STOP_CHARACTERS} characters each",
        )
    return tuple(found)


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        raise invalid("stream_options", f"stream_options={_shown(value)} must be an object")
    fields = Fields(value, STREAM_OPTIONS)
    wanted = fields.flag("include_usage")
    fields.flag("include_obfuscation")  # it would make the events larger, and says nothing
    if fields.flag("continuous_usage_stats"):
        raise invalid(
            "stream_options",
            "continuous_usage_stats=true is not known here: include_usage counts at the end",
        )
    if not stream:
        raise invalid("stream_options", "stream_options are for streams: add stream=true")
    return wanted


def unknown_policy(fields: Fields) -> str:
    """What the field "unknown" says: "error", or "drop"."""
    value: str = fields.values.get("unknown", PROMPT_POLICIES[0])
    if value not in PROMPT_POLICIES:
        raise invalid(
            "unknown", f"unknown={_shown(value)} must be one of {', '.join(PROMPT_POLICIES)}"
        )
    return value


def _overflow(fields: Fields) -> Overflow:
    value = fields.values.get("overflow", OVERFLOW_POLICIES[0])
    for policy in OVERFLOW_POLICIES:
        if value == policy:
            return policy
    raise invalid(
        "overflow", f"overflow={_shown(value)} must be one of {', '.join(OVERFLOW_POLICIES)}"
    )
