"""The server's responses: OpenAI's completions API, and the playground's routes."""

from __future__ import annotations

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch

import reference
from mygpt import ByteTokenizer, CharTokenizer, Writer
from mygpt.decode.completion import TokenLogprob
from mygpt.decode.numpy_network import Network
from mygpt.decode.packing import arrays_of
from mygpt.server.app import make_app
from mygpt.server.openapi import openapi
from mygpt.server.playground import logits_content
from mygpt.server.prompts import Entry
from mygpt.server.settings import ServerSettings
from mygpt.tokenization import END_OF_TEXT
from servers import CHARS, JSON, GatedWriter, client, running, tiny_writer, wait_until
from shapes import CONFIGS, build

pytestmark = pytest.mark.kernels

WRITER = tiny_writer()


@pytest.fixture(scope="module")
def api():
    with client(WRITER, max_choices=40) as made:
        yield made


def complete(api, prompt, **options):
    answer = api.post("/v1/completions", json={"model": "mygpt", "prompt": prompt, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(api, prompt, **options) -> list[dict]:
    """The chunks of a stream, which ends as OpenAI's do."""
    body = {"model": "mygpt", "prompt": prompt, "stream": True, **options}
    answer = api.post("/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


# --- completions are the Writer's ---------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.4, "top_k": 3},
        {"top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 0},
        {"overflow": "refill"},
        {"overflow": "stop"},
        {"stop": ["ab", "cc"]},
    ],
    ids=str,
)
def test_choices_are_the_texts_of_the_writer(api, options):
    """Each option reaches the sampler; choice i is sample i of the seed."""
    expected = WRITER.complete("ab", 30, 3, seed=7, **options)
    sent = options | ({"stop": options["stop"][0]} if len(options.get("stop", "")) == 1 else {})
    found = complete(api, "ab", max_tokens=30, n=3, seed=7, **sent)
    reasons = {"length": "length", "window": "length", "stop": "stop", "end": "stop"}
    assert [(c["index"], c["text"], c["finish_reason"]) for c in found["choices"]] == [
        (n, e.text, reasons[e.finish_reason]) for n, e in enumerate(expected)
    ]
    drawn = sum(len(e.token_ids) for e in expected)
    assert found["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": drawn,
        "total_tokens": 2 + drawn,
    }
    assert (found["object"], found["model"], found["seed"]) == ("text_completion", "mygpt", 7)


def test_end_of_text_ends_a_choice_and_is_not_shown():
    """It is an entry at the end of the text: lm-evaluation-harness sums over all but the last."""
    tokenizer = CharTokenizer("ab", end_of_text=True)
    writer = tiny_writer(tokenizer)
    expected = writer.complete("a", 6, 8, seed=3)
    assert {"end", "length"} <= {e.finish_reason for e in expected}, "a case that shows nothing"
    with client(writer) as api:
        choices = complete(api, "a", max_tokens=6, n=8, seed=3, logprobs=1, echo=True)["choices"]
    for choice, sample in zip(choices, expected, strict=True):
        ended, entries = sample.finish_reason == "end", choice["logprobs"]
        assert choice["text"] == f"a{sample.text}"
        assert choice["finish_reason"] == ("stop" if ended else "length")
        assert entries["tokens"] == [*choice["text"], *[END_OF_TEXT] * ended]
        assert entries["text_offset"] == list(range(len(entries["tokens"])))
        assert entries["top_logprobs"][-1][entries["tokens"][-1]] == entries["token_logprobs"][-1]


def test_a_seeded_sample_is_the_same_alone_and_among_others():
    """All at once in one batch of few slots, with lengths and settings that differ."""
    app = make_app(WRITER, ServerSettings(slots=5))
    bodies = [
        {"model": "mygpt", "prompt": "abc"[: 1 + n % 3], "seed": n % 7, "max_tokens": 5 + n}
        | ({"temperature": 0.5, "logprobs": 1} if n % 4 == 0 else {"n": 1 + n % 3})
        for n in range(32)
    ]

    async def ask_all():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            answers = [http.post("/v1/completions", json=body) for body in bodies]
            return [answer.json() for answer in await asyncio.gather(*answers)]

    for body, answer in zip(bodies, asyncio.run(ask_all()), strict=True):
        expected = WRITER.complete(
            body["prompt"],
            body["max_tokens"],
            body.get("n", 1),
            seed=body["seed"],
            temperature=body.get("temperature", 1.0),
        )
        assert [c["text"] for c in answer["choices"]] == [e.text for e in expected]
    app.state.scheduler.stop()


def test_a_random_seed_is_returned_and_reproduces_the_response(api):
    first = complete(api, "ab", max_tokens=40)
    again = complete(api, "ab", max_tokens=40, seed=first["seed"])
    assert again["choices"] == first["choices"]
    assert complete(api, "ab", max_tokens=40)["seed"] != first["seed"]


def test_prompts_come_in_four_forms(api):
    """A string, ids, and lists of both; choices of prompt p are p * n and on, of one seed."""
    both = complete(api, ["ab", "c"], max_tokens=9, n=2, seed=3)
    assert complete(api, [[0, 1], [2]], max_tokens=9, n=2, seed=3)["choices"] == both["choices"]
    one = complete(api, [0, 1], max_tokens=9, n=2, seed=3)
    assert one["choices"] == both["choices"][:2]
    assert complete(api, "ab", max_tokens=9, n=2, seed=3)["choices"] == one["choices"]
    assert both["usage"]["prompt_tokens"] == 3
    same = complete(api, ["ab"] * 4, max_tokens=9, seed=3)
    assert same["choices"] == complete(api, "ab", max_tokens=9, n=4, seed=3)["choices"]


def test_a_long_prompt_is_encoded_in_a_thread_with_the_same_result(api):
    text = "abc\n" * 3000
    found = complete(api, text, max_tokens=8, seed=1)
    assert found["choices"][0]["text"] == WRITER.complete(text, 8, seed=1)[0].text
    assert found["usage"]["prompt_tokens"] == 12_000


# --- streams -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"stop": ["ac", "bb"]}, {"echo": True}, {"logprobs": 2}, {"logprobs": 1, "echo": True}],
    ids=str,
)
def test_the_pieces_of_a_stream_add_up_to_the_whole_response(api, options):
    """Texts and log-probabilities joined; one finish reason for each choice, in its last piece."""
    options = options | {"max_tokens": 40, "n": 3, "seed": 5}
    whole = complete(api, "ab", **options)
    accepted = {"include_obfuscation": True, "continuous_usage_stats": False}  # OpenAI's, vLLM's
    chunks = stream(api, "ab", stream_options={"include_usage": True, **accepted}, **options)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    for expected in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(c["text"] for c in mine) == expected["text"]
        reasons = [c["finish_reason"] for c in mine]
        assert reasons == [None] * (len(mine) - 1) + [expected["finish_reason"]]
        if "logprobs" in options:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [value for c in mine for value in c["logprobs"][name]]
                assert joined == expected["logprobs"][name]


def test_a_stream_sends_tokens_as_they_are_sampled():
    """The first piece arrives before the second token is sampled; no usage unless requested."""
    writer = tiny_writer(kind=GatedWriter)
    body = {"model": "mygpt", "prompt": "ab", "max_tokens": 3, "seed": 1, "stream": True}
    with running(writer) as server:
        writer.gate.allow(1)
        with httpx.stream("POST", server.url + "/v1/completions", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = json.loads(next(lines).removeprefix("data: "))
            assert first["choices"][0]["text"] == WRITER.complete("ab", 1, seed=1)[0].text
            assert "usage" not in first
            writer.gate.open()
            assert list(lines)[-1] == "data: [DONE]"


# --- log-probabilities and echo ------------------------------------------------------------


def logprobs_of(writer: Writer, ids: list[int]) -> list[float]:
    """Of each token but the first, by a full pass."""
    with torch.no_grad():
        logits, _ = writer.model(torch.tensor([ids[:-1]]))
    table = logits[0].double().log_softmax(-1)
    return [float(table[n, token]) for n, token in enumerate(ids[1:])]


def test_logprobs_are_the_models_own(api):
    """In nats, before any filter; the sampled token is always listed, as by OpenAI."""
    choice = complete(api, "ab", max_tokens=12, seed=4, temperature=0.5, logprobs=2)["choices"][0]
    entries = choice["logprobs"]
    assert entries["tokens"] == list(choice["text"])
    assert entries["text_offset"] == list(range(12))
    ids = [0, 1, *CHARS.encode_array(choice["text"]).tolist()]
    assert entries["token_logprobs"] == pytest.approx(logprobs_of(WRITER, ids)[1:], abs=1e-4)
    for token, logprob, top in zip(
        entries["tokens"], entries["token_logprobs"], entries["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert len(top) in (2, 3)
        assert list(top.values())[:2] == sorted(top.values(), reverse=True)[:2]


def test_tokens_removed_by_a_stop_string_have_entries(api):
    """One entry per sampled token; those whose text was removed are at its end."""
    stop = WRITER.complete("ab", 40, seed=5)[0].text[20:23]
    found = complete(api, "ab", max_tokens=40, seed=5, stop=stop, logprobs=1)
    (choice,) = found["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"], "a case that shows nothing"
    entries, length = choice["logprobs"], len(choice["text"])
    assert "".join(entries["tokens"]) == choice["text"] + stop
    assert len(entries["tokens"]) == found["usage"]["completion_tokens"]
    assert entries["text_offset"] == [min(n, length) for n in range(length + len(stop))]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"echo": True}, {"echo": True, "stop": ["b"]}, {"n": 3, "stop": ["ab", "a"]}]
)
@pytest.mark.parametrize("prompt", ["", "a", "ab", [2, 0, 2, 1]], ids=str)
def test_every_prompt_token_and_every_new_token_has_an_entry(streamed, options, prompt):
    """Also control tokens, and however a choice ends: evaluation harnesses rely on it."""
    tokenizer = CharTokenizer("ab", end_of_text=True)
    ask = {"max_tokens": 12, "seed": 3, "logprobs": 2, **options}
    with client(tiny_writer(tokenizer)) as api:
        whole = complete(api, prompt, **ask)
        if streamed:
            chunks = stream(api, prompt, stream_options={"include_usage": True}, **ask)
            usage = chunks[-1]["usage"]
            parts = [choice for chunk in chunks for choice in chunk["choices"]]
        else:
            usage, parts = whole["usage"], whole["choices"]
    read = usage["prompt_tokens"] if "echo" in options else 0
    assert read == (max(1, len(prompt)) if "echo" in options else 0)
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        entries = [value for part in parts for value in part["logprobs"][name]]
        assert len(entries) == read + usage["completion_tokens"]
    for expected in whole["choices"]:
        offsets = expected["logprobs"]["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[-1] <= len(expected["text"])


def test_tokens_with_equal_texts_keep_their_log_probabilities():
    """Padding rows all have the text "": the sampled one has its own entry."""
    top, ids = [("", -0.1), ("x", -2.0), ("", -3.0)], [7, 1, 8]
    assert Entry.of(TokenLogprob(8, "", -3.0, top, ids), 0).top == {
        "token_id:7": -0.1, "x": -2.0, "": -3.0
    }  # fmt: skip
    assert Entry.of(TokenLogprob(7, "", -0.1, top, ids), 0).top == {
        "": -0.1, "x": -2.0, "token_id:8": -3.0
    }  # fmt: skip
    other = Entry.of(TokenLogprob(9, "", -5.0, top, ids), 0).top
    assert other == {"token_id:7": -0.1, "x": -2.0, "token_id:8": -3.0, "": -5.0}


def test_a_prompt_is_scored_as_evaluation_harnesses_request(api):
    """echo with logprobs and no new token, or one: the prompt's own, by a full pass."""
    texts = ["abcab\nca", "cc"]
    ids = [CHARS.encode_array(text).tolist() for text in texts]
    for prompt in (texts, ids):
        for new in (0, 1):
            options = {"echo": True, "logprobs": 1, "temperature": 0, "max_tokens": new}
            for choice, text, row in zip(
                complete(api, prompt, **options)["choices"], texts, ids, strict=True
            ):
                entries = choice["logprobs"]
                assert choice["text"][: len(text)] == text
                assert entries["tokens"] == list(choice["text"])
                assert entries["text_offset"] == list(range(len(text) + new))
                assert entries["token_logprobs"][0] is entries["top_logprobs"][0] is None
                expected = logprobs_of(WRITER, row)
                assert entries["token_logprobs"][1 : len(row)] == pytest.approx(expected, abs=1e-5)
                assert choice["finish_reason"] == "length"


def test_a_prompt_past_the_window_is_scored_only_with_refill(api):
    """Each token given the tokens in the window; one more token than the window is allowed."""
    text = "abcc\nbacbcabacbb\ncabcabcaabbccb"
    row = CHARS.encode_array(text).tolist()
    options = {"echo": True, "logprobs": 0, "max_tokens": 0}
    fits = complete(api, row[:17], **options)["choices"][0]["logprobs"]["token_logprobs"]
    assert fits[1:] == pytest.approx(logprobs_of(WRITER, row[:17]), abs=1e-5)
    answer = api.post("/v1/completions", json={"model": "mygpt", "prompt": row[:18], **options})
    assert answer.status_code == 400
    assert "window of 16" in answer.json()["error"]["message"]
    found = complete(api, row, overflow="refill", **options)["choices"][0]["logprobs"]
    starts = {n: 0 if n <= 16 else 9 if n <= 25 else 18 for n in range(1, len(row))}
    expected = [logprobs_of(WRITER, row[starts[n] : n + 1])[-1] for n in range(1, len(row))]
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)


def test_offsets_of_bytes_are_in_characters():
    """The length of the text before the token, not the number of tokens before it.

    A character of several bytes: its tokens all begin where it does.
    """
    tokenizer = ByteTokenizer()
    writer = tiny_writer(tokenizer, max_seq_len=32)
    sample = writer.complete("aé€", 40, seed=1)[0]
    decoder, expected, length = tokenizer.decoder(continued=True), [], 3
    for token in sample.token_ids:
        expected.append(length)
        length += len(decoder.push(token))
    assert len(set(expected)) < len(expected), "a case that shows nothing"
    with client(writer) as api:
        choice = complete(api, "aé€", echo=True, logprobs=0, max_tokens=40, seed=1)["choices"][0]
    assert choice["text"] == "aé€" + sample.text
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, *expected]


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": None}, 400, "model", "model is missing"),
        ({"model": "gpt-4"}, 404, "model", "its model is mygpt"),
        ({"prompt": 5}, 400, "prompt", "expected string | list"),
        ({"prompt": ["a"] * 41}, 400, "prompt", "41 choices, more than the limit of 40"),
        ({"prompt": [0] * 16385}, 400, "prompt", "16385 tokens, more than the limit of 16384"),
        ({"prompt": []}, 400, "prompt", "must be a string"),
        ({"prompt": [[]]}, 400, "prompt", "at [0]: expected list of length >= 1"),
        ({"prompt": ["a", 1]}, 400, "prompt", "must be a string"),
        ({"prompt": [0, True]}, 400, "prompt", "at [1]: expected integer"),
        ({"prompt": [0, 4]}, 400, "prompt", "id 4"),
        ({"prompt": [0, -1]}, 400, "prompt", "at [1]: expected integer >= 0"),
        ({"prompt": "abX"}, 400, "prompt", "'X'"),
        ({"prompt": "\ud800"}, 400, "prompt", "surrogate"),
        (
            {"prompt": "a" * 60_000},
            400,
            "prompt",
            "at least 32768 tokens, more than the limit of 16384",
        ),
        ({"n": 0}, 400, "n", "expected integer >= 1"),
        ({"n": 41}, 400, "n", "41 choices, more than the limit of 40"),
        ({"n": 21, "prompt": ["a", "b"]}, 400, "n", "42 choices, more than the limit of 40"),
        ({"best_of": 2}, 400, "best_of", "must be n"),
        ({"max_tokens": 4097}, 400, "max_tokens", "more than 4096, the limit"),
        ({"max_tokens": 1.5}, 400, "max_tokens", "expected integer, got number"),
        ({"temperature": -1}, 400, "temperature", "expected number >= 0"),
        ({"temperature": "hot"}, 400, "temperature", "expected number"),
        ({"temperature": 10**400}, 400, "temperature", "out of range"),
        ({"temperature": 1e400}, 400, "temperature", "finite"),
        ({"top_p": -0.1}, 400, "top_p", "expected number >= 0"),
        ({"top_p": False}, 400, "top_p", "expected number"),
        ({"top_k": -2}, 400, "top_k", "expected integer >= -1"),
        ({"min_p": 2}, 400, "min_p", "expected number <= 1"),
        ({"seed": -2}, 400, "seed", "2**64"),
        ({"seed": 2**64}, 400, "seed", "2**64"),
        ({"stop": ["a"] * 65}, 400, "stop", "65 strings, more than the limit of 64"),
        ({"stop": ""}, 400, "stop", "expected string of length >= 1"),
        ({"stop": "a" * 257}, 400, "stop", "expected string of length <= 256"),
        ({"logprobs": 6}, 400, "logprobs", "expected integer <= 5"),
        ({"logprobs": True}, 400, "logprobs", "the number of alternatives"),
        (
            {"logprobs": 0, "n": 17, "max_tokens": 4096},
            400,
            "logprobs",
            "69632 tokens are more than 65536",
        ),
        ({"stream": True, "stream_options": {"x": 1}}, 400, "x", "unknown field 'x'"),
        ({"ignore_eos": True}, 400, "ignore_eos", "is not supported: leave"),
        ({"min_tokens": False}, 400, "min_tokens", "is not supported: leave"),
        ({"echo": 1}, 400, "echo", "expected true or false"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", 'add "stream": true'),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "is not supported: leave"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "is not supported: leave"),
        ({"prompt": "a🙂b"}, 400, "prompt", 'send "unknown": "drop" to drop them'),
        ({"unknown": "keep"}, 400, "unknown", "expected error or drop"),
        ({"unknown": {}}, 400, "unknown", "expected error or drop"),
        ({"overflow": "wrap"}, 400, "overflow", "expected crop or refill or stop"),
        ({"overflow": "stop", "prompt": "a" * 17}, 400, None, "the window 16"),
        ({"user": 5}, 400, "user", "expected string"),
        ({"tools": []}, 400, "tools", "unknown field 'tools'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_fields_are_refused_by_name(api, change, status, param, message):
    body = {"model": "mygpt", "prompt": "ab", **change}
    content = json.dumps(body).replace("Infinity", "1e400")
    answer = api.post("/v1/completions", content=content, headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"top_k": -1}, {}),
        ({"top_p": 0}, {"temperature": 0}),
        ({"top_p": 0.0}, {"top_k": 1}),
        ({"logprobs": False}, {}),
        ({"stop": ["never"] * 63 + ["ab"]}, {"stop": "ab"}),
        ({"prompt": None}, {"prompt": ""}),
        ({"skip_special_tokens": True, "repeat_penalty": 1.0, "cache_prompt": False}, {}),
        ({"suffix": None, "logit_bias": {}, "user": "someone", "stop": None}, {}),
        ({"presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 2.0}, {}),
    ],
    ids=str,
)
def test_values_of_other_servers_have_their_meaning(api, theirs, ours):
    """Values of OpenAI, vLLM and llama.cpp for settings that have other values in mygpt."""
    options = {"prompt": "ab", "max_tokens": 30, "seed": 3, "n": 2}
    found, expected = (complete(api, **(options | more)) for more in (theirs, ours))
    assert found["choices"] == expected["choices"]


def test_a_seed_of_minus_one_is_random(api):
    seeds = {complete(api, "ab", seed=-1)["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert min(seeds) >= 0


def test_one_request_may_have_many_prompts(api):
    """A harness sends as many as its batch has."""
    with client(WRITER) as wide:
        found = complete(wide, ["ab", "c"] * 50, max_tokens=3, temperature=0)["choices"]
    assert len(found) == 100
    assert len({choice["text"] for choice in found}) <= 2


def test_max_tokens_of_minus_one_is_the_maximum():
    """As clients of llama.cpp request a text of any length."""
    with client(WRITER, max_tokens=23) as small:
        found = complete(small, "ab", max_tokens=-1, seed=1)
        assert found["usage"] == complete(small, "ab", max_tokens=23, seed=1)["usage"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"{", JSON, 400, "not JSON"),
        (b"[]", JSON, 400, "JSON object"),
        (b'{"temperature": NaN}', JSON, 400, "NaN"),
        (b'"\xff"', JSON, 400, "not JSON"),
        (b"[" * 100_000, JSON, 400, "not JSON"),
        (b'{"seed": ' + b"1" * 5000 + b"}", JSON, 400, "5000 digits"),
        (b'{"model": "mygpt", "model": "x"}', JSON, 400, "two values for the key 'model'"),
        (b"{}", {"content-type": "text/plain"}, 415, "Content-Type: application/json"),
        (b"{}", {}, 415, "Content-Type: application/json"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_body_that_is_not_json_is_an_error(api, content, headers, status, message):
    answer = api.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2", 404, "no resource at '/v2'"),
        ("GET", "/v1/models/", 404, "this server has no model"),
        ("GET", "/v1/completions", 405, "does not support 'GET'"),
        ("POST", "/v1/chat/completions", 404, "use POST /v1/completions"),
        ("GET", "/static/../app.py", 404, ""),
        ("GET", "/static/..%2f__init__.py", 404, ""),
        ("GET", "/static/%2e%2e%2f%2e%2e%2fserver%2fapp.py", 404, ""),
    ],
)
def test_errors_of_routes_are_json(api, method, path, status, message):
    answer = api.request(method, path)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    if status == 405:
        assert answer.headers["allow"] == "POST"


def test_settings_that_overflow_fail_alone(api):
    """The error is the request's; other rows of the batch are not affected."""
    bad = {"temperature": 2e-30, "repetition_penalty": 1e-30}
    body = {"model": "mygpt", "prompt": "ab", **bad}
    answer = api.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "overflows float32" in answer.json()["error"]["message"]
    answer = api.post("/v1/completions", json=body | {"stream": True})
    assert answer.status_code == 400, "no stream begins where its first token fails"
    assert complete(api, "ab", seed=1, max_tokens=5)["choices"][0]["text"]


def test_a_broken_model_is_the_servers_fault():
    writer = tiny_writer()
    with torch.no_grad():
        writer.model.final_norm.weight.fill_(math.nan)
    with client(writer) as api:
        answer = api.post("/v1/completions", json={"model": "mygpt", "prompt": "ab"})
        assert answer.status_code == 500
        assert "weights are broken" in answer.json()["error"]["message"]
        assert api.get("/health").status_code == 200


# --- the playground's own ------------------------------------------------------------------


def test_next_returns_the_models_logits(api):
    """For a text or ids, also past the window; they are those of a full forward pass."""
    for text in ("ab", "abc\n" * 6, ""):
        ids = WRITER.prompt_ids(text)
        with torch.no_grad():
            expected = WRITER.model(torch.tensor([ids[-16:]]))[0][0, -1]
        found = api.post("/api/next", json={"text": text}).json()
        assert found["logits"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert found["ids"] == ids
        assert found["window_start"] == max(0, len(ids) - 16)
        assert "".join(token["text"] for token in found["tokens"]) == (text or "\n")
        assert api.post("/api/next", json={"ids": ids}).json() == found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, 'exactly one of "text" and "ids"'),
        ({"text": "a", "ids": [0]}, 'exactly one of "text" and "ids"'),
        ({"ids": []}, "expected list of length >= 1"),
        ({"ids": "a"}, "expected list"),
        ({"text": 5}, "expected string"),
        ({"text": "X"}, "'X'"),
        ({"text": "a", "prompt": "a"}, "unknown field"),
    ],
)
def test_wrong_requests_of_the_playground_are_refused(api, body, message):
    for path in ("/api/next", "/api/attention"):
        answer = api.post(path, json=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_the_largest_logits_of_a_large_vocabulary_are_returned():
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    logits[[7, 4000]] = 9.0
    found = logits_content(logits, str)
    assert [(i, text) for i, _, text in found["top"][:2]] == [(7, "7"), (4000, "4000")]
    assert len(found["top"]) == 1024
    total = np.exp([logit for _, logit, _ in found["top"]]).sum() + math.exp(found["rest"])
    assert total == pytest.approx(np.exp(logits.astype(np.float64)).sum())
    assert set(logits_content(logits[:4096], str)) == {"logits"}


@pytest.mark.parametrize("kind", ["tutorial", "modern", "gpt2", "llama", "rotary_layer_norm"])
def test_attention_weights_are_those_of_a_reference_implementation(kind):
    """Also with rotary, grouped and normalised heads, from each layer's input."""
    config = CONFIGS[kind]
    model = build(config)
    ids = torch.arange(8)[None] % config.vocab_size
    inputs = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        model(ids)
    found = Network(config, arrays_of(model)).read_all(ids[0].tolist()).weights
    assert found.shape == (config.num_layers, config.num_heads, 8, 8)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for layer, x in enumerate(inputs):
        at = f"blocks.{layer}.attention."
        for head, rows in enumerate(reference.attention_weights(config, state, at, x.double())):
            for t, row in enumerate(rows):
                expected = row + [0.0] * (7 - t)
                np.testing.assert_allclose(found[layer, head, t], expected, atol=1e-4)


def test_attention_weights_are_returned_for_the_last_positions(api):
    ids = [0, 1, 2, 3] * 5
    found = api.post("/api/attention", json={"ids": ids}).json()
    assert (found["layers"], found["heads"], found["start"]) == (2, 2, 4)
    weights = np.array(found["weights"])
    assert weights.shape == (2, 2, 16, 16)
    expected = WRITER.read(ids[4:]).weights
    np.testing.assert_allclose(weights, expected, atol=5.1e-5)


def test_the_model_is_described(api):
    found = api.get("/api/model").json()
    assert found["name"] == "mygpt"
    assert found["parameters"] == WRITER.config.num_parameters()
    assert found["shape"]["embed_dim"] == 8
    assert (found["vocab_size"], found["tokenizer"], found["window"]) == (4, "char", 16)
    assert found["tokens"] == ["a", "b", "c", "\n"]


def test_files_are_served_with_their_types_and_a_strict_policy(tmp_path, monkeypatch):
    """Only files of the folder itself, of known types; nothing may frame or feed the page."""
    (tmp_path / "playground.html").write_text("<!doctype html>")
    (tmp_path / "bars.js").write_text("export {}")
    (tmp_path / "style.css").write_text("body {}")
    (tmp_path / "secret.py").write_text("no")
    monkeypatch.setattr("mygpt.server.playground.STATIC", tmp_path)
    with client() as api:
        kinds = {"/": "html", "/static/bars.js": "javascript", "/static/style.css": "css"}
        for path, kind in kinds.items():
            answer = api.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == f"text/{kind}; charset=utf-8"
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
        assert api.get("/static/secret.py").status_code == 404


def test_the_openapi_document_has_the_limits_of_the_server():
    document = openapi(WRITER.tokenizer, ServerSettings(max_tokens=77, api_key="k"))
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 77
    assert fields["ignore_eos"]["enum"] == [False, None]
    assert document["security"] == [{"key": []}]


def test_health_returns_the_numbers_of_running_and_waiting_requests():
    """One row decodes, and another request waits for its slot."""
    writer = tiny_writer(kind=GatedWriter)
    body = {"model": "mygpt", "prompt": "ab", "max_tokens": 2}
    with running(writer, slots=1) as server, ThreadPoolExecutor(2) as clients:
        idle = {"healthy": True, "running": 0, "waiting": 0, "restarts": 0}
        assert server.get("/health").json() == idle
        answers = [clients.submit(server.post, body) for _ in range(2)]
        wanted = idle | {"running": 1, "waiting": 1}
        wait_until(lambda: server.get("/health").json() == wanted)
        writer.gate.open()
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_unknown_characters_can_be_dropped(api):
    """One unknown character made a request fail; the response lists what was dropped."""
    options = {"max_tokens": 4, "seed": 3, "echo": True}
    dropped = complete(api, ["a🙂b", "§ab"], unknown="drop", **options)
    assert dropped["left_out"] == ["🙂", "§"]
    plain = complete(api, ["ab", "ab"], unknown="drop", **options)
    assert dropped["choices"] == plain["choices"]
    assert "left_out" not in plain
    assert all(chunk["left_out"] == ["🙂"] for chunk in stream(api, "a🙂b", unknown="drop"))
    found = api.post("/api/next", json={"text": "a🙂b", "unknown": "drop"}).json()
    assert (found["text"], found["left_out"]) == ("ab", ["🙂"])
    assert api.post("/api/next", json={"text": "ab"}).json().items() <= found.items()
    for path in ("/api/next", "/api/attention"):
        refused = api.post(path, json={"text": "a🙂b"}).json()["error"]
        assert (refused["code"], refused["param"]) == ("unknown_characters", "text")
    with client(WRITER, max_prompt_tokens=8) as small:  # it is not gone through to find that out
        long = small.post("/api/next", json={"text": "🙂" * 129, "unknown": "drop"})
        assert (long.status_code, "shorten it" in long.text) == (400, True)
