"""Large requests and responses: off the event loop, in bounded memory that is freed."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from mygpt import BPETokenizer, CharTokenizer, Writer
from mygpt.server.problems import ApiError, to_json
from mygpt.server.prompts import encode
from mygpt.server.serving import serve as serve_writer
from mygpt.server.settings import ServerSettings
from mygpt.server.threads import free_memory, json_pieces
from servers import (
    BODY,
    CHARS,
    client,
    connect,
    request_bytes,
    running,
    tiny_writer,
    wait_until,
)

pytestmark = pytest.mark.processes


LARGE = {
    "a long prompt": ("completions.encode", "/v1/completions", BODY | {"prompt": "ab" * 4000}),
    "many ids": ("completions.encode", "/v1/completions", BODY | {"prompt": [0, 1] * 4000}),
    "a long text": ("playground.encode", "/api/next", {"text": "ab" * 4000}),
    "many ids to read": ("playground.encode", "/api/attention", {"ids": [0] * 4000}),
    "many tokens": (
        "completions.choice_of",
        "/v1/completions",
        BODY | {"n": 16, "max_tokens": 200, "logprobs": 1},
    ),
    "a scored prompt": (
        "completions.choice_of",
        "/v1/completions",
        BODY | {"prompt": "ab", "echo": True, "logprobs": 1},
    ),
    "logits": ("playground.logits_content", "/api/next", {"ids": [0] * 3000}),
    "attention": ("threads.json_pieces", "/api/attention", {"ids": [0] * 16}),
}


@pytest.mark.parametrize(("place", "path", "body"), LARGE.values(), ids=LARGE)
def test_large_bodies_are_parsed_and_large_responses_built_in_a_thread(
    place, path, body, monkeypatch
):
    """A text of a megabyte blocked all streams while it was encoded."""
    held = threading.Event()
    module, _, name = f"mygpt.server.{place}".rpartition(".")
    inner = getattr(sys.modules[module], name)

    def slow(*args):
        assert held.wait(10)
        return inner(*args)

    monkeypatch.setattr(f"{module}.{name}", slow)
    with running() as server, ThreadPoolExecutor(2) as clients:
        large = [clients.submit(server.post, body, path) for _ in range(2)]
        with pytest.raises(TimeoutError):
            large[0].result(0.2)
        assert server.get("/health").status_code == 200
        held.set()
        for answer in (one.result() for one in large):
            assert answer.status_code == 200
            assert answer.headers["content-length"] == str(len(answer.content))
            assert answer.json()


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"a": [], "b": {}, "c": None},
        {"a": list(range(1000)), "b": [{"c": [0.5] * 600}, {"d": "e\u00e9"}], "f": [[1, [2]], 3]},
        [{"g": n} for n in range(700)],
        "text",
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_in_pieces_equals_the_json_in_one(content):
    assert b"".join(json_pieces(content)) == to_json(content)


def test_no_piece_of_json_takes_long():
    entries = [{f"token {k}": -0.5 for k in range(5)} for _ in range(4096)]
    content = {"choices": [{"text": "a", "logprobs": {"top": entries}} for _ in range(4)]}
    assert max(map(len, json_pieces(content))) < 40_000


def test_a_text_that_is_too_long_is_not_encoded_to_its_end(monkeypatch):
    """Characters are counted, BPE stops at the limit, and imported tokenizers limit characters."""
    seen = []

    def counted(self, pieces):
        for piece in pieces:
            seen.append(len(piece))
            yield np.zeros(len(piece) // 4, np.int64)

    bpe = BPETokenizer.train(["abc ab " * 50], 270)
    monkeypatch.setattr(BPETokenizer, "encode_pieces", counted)
    monkeypatch.setattr(CharTokenizer, "encode_pieces", counted)
    monkeypatch.setattr("mygpt.server.prompts._CHARACTERS_PER_TOKEN", 10**6)
    for tokenizer in (CHARS, bpe):
        with pytest.raises(ApiError, match="more than the limit of 100: shorten it"):
            encode(tiny_writer(tokenizer), "ab" * 10**6, 100, "prompt")
    assert seen == [2**14] * 2
    monkeypatch.undo()
    with pytest.raises(ApiError, match="2000 characters, more than the 1600 that 100 tokens"):
        encode(tiny_writer(bpe), "ab" * 1000, 100, "prompt")
    found = encode(tiny_writer(bpe), "abc ab " * 20, 100, "prompt")
    assert found.ids.tolist() == bpe.encode_array("abc ab " * 20).tolist()


def test_the_memory_of_large_bodies_is_freed(monkeypatch):
    """Once for many of them, and soon: the C library kept 150 MB after a text of one megabyte."""
    given = []
    monkeypatch.setattr("mygpt.server.threads.free_memory", lambda: given.append(1))
    monkeypatch.setattr("mygpt.server.threads._FREE_AFTER_S", 0.5)
    with running() as server:
        for _ in range(3):
            assert server.post(BODY | {"prompt": "a" * 2**18}).status_code == 400
        wait_until(lambda: given)
    assert len(given) < 3
    monkeypatch.undo()
    free_memory()


@pytest.mark.parametrize("gone", [False, True])
def test_the_memory_of_large_responses_is_freed(gone, monkeypatch):
    """Also of those that a client did not wait for: the server kept a hundred megabytes."""
    given = []
    monkeypatch.setattr("mygpt.server.threads.free_memory", lambda: given.append(1))
    monkeypatch.setattr("mygpt.server.threads._FREE_AFTER_S", 0.05)
    body = {"model": "mygpt", "prompt": "ab", "n": 9, "max_tokens": 300, "logprobs": 2}
    with running() as server, httpx.Client(base_url=server.url) as http:
        with contextlib.suppress(httpx.TimeoutException):
            http.post("/v1/completions", json=body, timeout=0.02 if gone else 60)
        wait_until(lambda: given)


def test_a_full_collection_of_garbage_is_rare_while_serving(monkeypatch):
    """It blocked /health for 0.2 s after large responses had created a million objects."""
    seen = []
    monkeypatch.setattr("asyncio.run", lambda work: (work.close(), seen.append(gc.get_threshold())))
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    serve_writer(tiny_writer(), ServerSettings(), port=0, notify=str)
    assert seen[0][:2] == before[:2]
    assert seen[0][2] > 100
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen), "as it was"


def test_one_request_does_not_block_all_others():
    """The page's predictions have a reserved slot; waiting requests share the others."""
    with running(slots=4, max_tokens=10**9) as server, ThreadPoolExecutor(1) as clients:
        long = BODY | {"max_tokens": 10**9, "n": 4, "stream": True}
        with connect(server.port) as first:
            first.sendall(request_bytes(long))
            wait_until(lambda: server.scheduler.running == 4)
            assert server.post({"text": "ab"}, "/api/next").status_code == 200
        wait_until(lambda: server.scheduler.running == 0)
        with connect(server.port) as first, connect(server.port) as second:
            first.sendall(request_bytes(long | {"n": 3}))
            wait_until(lambda: server.scheduler.running == 3)
            second.sendall(request_bytes(long))
            wait_until(lambda: server.scheduler.running == 4)
            third = clients.submit(server.post, BODY)
            wait_until(lambda: server.scheduler.waiting == 2)
            first.close()
            assert third.result().status_code == 200, "the second has three waiting, and its share"


@pytest.mark.parametrize("path", ["/v1/completions", "/api/attention"])
def test_a_forward_pass_of_a_disconnected_client_ends(path, monkeypatch):
    """The thread of forward passes was blocked for a client that had disconnected."""
    held, read = threading.Event(), Writer.read

    def slow(self, ids, shown=None):
        held.wait(5)
        return read(self, ids, shown)

    with running(max_prompt_tokens=10**5) as server:
        monkeypatch.setattr(Writer, "read", slow)
        body = BODY | {"prompt": "ab" * 500, "echo": True, "logprobs": 0, "overflow": "refill"}
        body = body if path.startswith("/v1") else {"ids": [0, 1]}
        with connect(server.port) as connection:
            connection.sendall(request_bytes(body, path))
            wait_until(lambda: server.server.server_state.connections)
            time.sleep(0.1)
        wait_until(lambda: not server.server.server_state.connections)
        monkeypatch.setattr(Writer, "read", read)
        held.set()
        began = time.monotonic()
        assert server.post({"ids": [0, 1]}, "/api/attention").status_code == 200
        assert time.monotonic() - began < 5


def test_logprobs_of_many_prompts_at_once_are_refused():
    with client(max_prompt_tokens=20) as api:
        body = BODY | {"prompt": ["ababab"] * 4, "echo": True, "logprobs": 1, "max_tokens": 0}
        answer = api.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert "24 prompt tokens are more than 20" in answer.json()["error"]["message"]


def test_echoes_of_a_long_prompt_have_a_limit_together():
    """A body of a megabyte with 128 choices led to a response of 128 megabytes."""
    with client(max_body_bytes=1000) as api:
        body = BODY | {"prompt": "ab" * 300, "echo": True, "max_tokens": 0}
        assert api.post("/v1/completions", json=body | {"n": 26}).status_code == 200
        answer = api.post("/v1/completions", json=body | {"n": 27})
        assert answer.status_code == 400
        assert "16200 echoed characters of prompts are more than 16000" in answer.text
