"""Parsing and validation of requests for completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mygpt.core.config import SamplingConfig
from mygpt.core.random import check_seed
from mygpt.core.window import OVERFLOW_POLICIES, Overflow
from mygpt.errors import InputError
from mygpt.server.fields import Fields, equal, invalid, shown
from mygpt.server.problems import ApiError
from mygpt.server.settings import ServerSettings
from mygpt.tokenization.unknown import PROMPT_POLICIES

MAX_STOP_CHARACTERS, MAX_LOGPROBS, DEFAULT_MAX_TOKENS = 256, 5, 16
_MOST_CHOICES_WITH_LOGPROBS = 16  # of `max_tokens` tokens each: a response of some ten megabytes
_SMALLEST_NUCLEUS = 1e-9  # used for top_p = 0: only the most probable token remains
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

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
    """A request for completions, with OpenAI's names of fields.

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
        unknown: what to do with text that the tokenizer does not know: "error" or "drop".
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


def parse_completion(body: dict[str, Any], settings: ServerSettings) -> CompletionRequest:
    """Parse the fields of a body.

    Raises:
        ApiError: 400 for a field that is not valid, which it names; 404 for another model.
    """
    fields = Fields(body, FIELDS)
    check_model(fields, settings.name)
    fields.text("user")
    for name, neutral in NEUTRAL.items():
        value = fields.values.get(name)
        if value is not None and not any(equal(value, accepted) for accepted in neutral):
            raise invalid(name, f"{name}={shown(value)} is not supported: leave {name} out")
    stream = fields.flag("stream")
    n = fields.integer("n", 1, 1, settings.max_choices) or 1
    best_of = fields.integer("best_of", n, 1, settings.max_choices)
    if best_of != n:
        raise invalid("best_of", f"best_of={best_of} must be n, which is {n}: all are returned")
    prompts = _prompts(fields.values.get("prompt", ""), settings)
    if n * len(prompts) > settings.max_choices:
        raise invalid(
            "n",
            f"n={n} for {len(prompts)} prompts makes {n * len(prompts)} choices, more than the "
            f"limit of {settings.max_choices}: send fewer prompts, or a smaller n",
        )
    max_tokens, logprobs = _max_tokens(fields, settings.max_tokens), _logprobs(fields)
    tokens, most = n * len(prompts) * max_tokens, _MOST_CHOICES_WITH_LOGPROBS * settings.max_tokens
    if logprobs is not None and tokens > most:
        raise invalid(
            "logprobs",
            f"log-probabilities of {tokens} tokens are more than {most}, the limit for one "
            "response: send fewer prompts at once, or a smaller max_tokens",
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


def check_model(fields: Fields, name: str) -> None:
    """Raise `ApiError` unless the field "model" is this model's id."""
    model = fields.text("model")
    if model is None:
        raise invalid("model", f"the field model is missing: send {name}, this server's model")
    if model != name:
        raise unknown_model(model, name)


def unknown_model(model: str, name: str) -> ApiError:
    """The error for a model that this server does not have."""
    return ApiError(
        404,
        f"this server has no model {model!r:.80}: its model is {name}",
        param="model",
        code="model_not_found",
    )


def too_long(param: str, count: str, most: int) -> ApiError:
    """The error for a text with too many tokens."""
    return invalid(param, f"{param} has {count} tokens, more than the limit of {most}: shorten it")


def check_prompt_ids(value: Any, param: str, most: int) -> tuple[int, ...]:
    """Token ids as integers; whether they are in the vocabulary is checked by the tokenizer."""
    if len(value) > most:
        raise too_long(param, str(len(value)), most)
    if set(map(type, value)) == {int} and 0 <= min(value) <= max(value) < 2**31:
        return tuple(value)
    ids = []
    for place, token in enumerate(value):
        if isinstance(token, float) and token.is_integer():
            token = int(token)
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
            raise invalid(
                param,
                f"{param} has {shown(token)} at index {place}: token ids are integers from 0 on",
            )
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
            f"prompt={shown(value)} must be a string, a list of strings, a list of token ids or "
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
            f"prompt is a list of {len(value)}, more than the limit of {settings.max_choices} "
            "choices: send fewer at once",
        )
    if kinds == {str}:
        return tuple(value)
    return tuple(check_prompt_ids(part, "prompt", most) for part in value)


def _max_tokens(fields: Fields, most: int) -> int:
    found = fields.integer("max_tokens", min(DEFAULT_MAX_TOKENS, most), -1, most) or 0
    return most if found == -1 else found  # -1 as in llama.cpp: until the text ends


def _sampling(fields: Fields) -> SamplingConfig:
    values: dict[str, Any] = {}
    for name in SAMPLING_FIELDS:
        value: Any = fields.values.get(name)
        if value is None:
            continue
        if name == "top_k":
            value = max(0, fields.integer(name, None, -1, 2**31) or 0)  # -1 disables it, too
        elif isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**63 else float("inf")
        if name == "top_p" and equal(value, 0):
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
    if value is None or equal(value, -1):  # -1 as in llama.cpp: a random seed
        return None
    try:
        check_seed(value)
    except InputError:
        raise invalid(
            "seed",
            f"seed={shown(value)} must be an integer from 0 to 2**64 - 1, or -1 for a random one",
        ) from None
    return int(value)


def _logprobs(fields: Fields) -> int | None:
    value = fields.values.get("logprobs")
    if value is False:
        return None
    if value is True:
        raise invalid(
            "logprobs",
            f"logprobs=true must be the number of alternatives, an integer from 0 to "
            f"{MAX_LOGPROBS}",
        )
    return fields.integer("logprobs", None, 0, MAX_LOGPROBS)


def _stop(value: Any, most: int) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(found, list) and len(found) <= most
    for text in found if good else ():
        good = good and isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARACTERS
    if not good:
        raise invalid(
            "stop",
            f"stop={shown(value)} must be a string or up to {most} strings, of 1 to "
            f"{MAX_STOP_CHARACTERS} characters each",
        )
    return tuple(found)


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        raise invalid("stream_options", f"stream_options={shown(value)} must be an object")
    fields = Fields(value, STREAM_OPTIONS)
    wanted = fields.flag("include_usage")
    fields.flag("include_obfuscation")  # accepted and ignored: it would only pad the events
    if fields.flag("continuous_usage_stats"):
        raise invalid(
            "stream_options",
            "continuous_usage_stats=true is not supported: use include_usage, which counts the "
            "tokens at the end",
        )
    if not stream:
        raise invalid("stream_options", 'stream_options need a stream: add "stream": true')
    return wanted


def unknown_policy(fields: Fields) -> str:
    """The value of the field "unknown": "error" or "drop"."""
    value: str = fields.values.get("unknown", PROMPT_POLICIES[0])
    if value not in PROMPT_POLICIES:
        raise invalid(
            "unknown", f"unknown={shown(value)} must be one of {', '.join(PROMPT_POLICIES)}"
        )
    return value


def _overflow(fields: Fields) -> Overflow:
    value = fields.values.get("overflow", OVERFLOW_POLICIES[0])
    for policy in OVERFLOW_POLICIES:
        if value == policy:
            return policy
    raise invalid(
        "overflow", f"overflow={shown(value)} must be one of {', '.join(OVERFLOW_POLICIES)}"
    )
