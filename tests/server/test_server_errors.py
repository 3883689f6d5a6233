"""Errors while serving: each ends its own request alone, and the log does not block."""

from __future__ import annotations

import itertools
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import typer

from mygpt.cli.serve import serve
from mygpt.engine import Request
from mygpt.server.completions import Sample
from mygpt.server.log import NonBlockingStream, RateLimit
from mygpt.server.serving import ServerDied
from servers import (
    BODY,
    GatedWriter,
    running,
    tiny_writer,
    wait_until,
)

pytestmark = pytest.mark.processes


def lines_in(found: bytes) -> int:
    """The number of complete lines, with those that notes call dropped in their place."""
    lines = found.decode().split("\n")[:-1]
    notes = [line for line in lines if "dropped" in line]
    dropped = sum(int(note.split()[0][1:].replace(",", "")) for note in notes)
    return len(lines) - len(notes) + dropped


def test_log_lines_that_are_not_read_are_dropped_and_counted():
    """A full pipe behind standard error stopped every request, and SIGTERM too."""
    reading, writing = os.pipe()
    stream = NonBlockingStream(writing, "ascii")
    began = time.monotonic()
    for number in range(50_000):
        print(f"line {number} of a log, with an é", file=stream, flush=True)
    assert time.monotonic() - began < 5.0
    found = b""
    with open(reading, "rb", buffering=0) as pipe:
        # Some may be dropped before the writing thread has begun, so there can be two notes.
        while lines_in(found) < 50_000:
            found += pipe.read(2**20)
        assert lines_in(found) == 50_000
        assert found.startswith(b"line 0 of a log, with an \\xe9\n")
        assert b"dropped" in found
        print("again", file=stream)
        assert pipe.read(100) == b"again\n"
        stream.end()
        os.close(writing)


def test_an_error_that_repeats_is_logged_a_few_times(caplog):
    """44 megabytes of tracebacks came from one limit that was reached."""
    logger = logging.getLogger("mygpt.server.repeats")
    logger.addFilter(RateLimit())
    for _ in range(100):
        logger.error("too many")
    assert len(caplog.records) == 5


class Panic(BaseException):
    """Like a panic of a Rust library: not an Exception."""


def test_if_the_batch_fails_its_requests_end_and_the_next_ones_are_answered():
    """The decoding thread died with the first error, and every request after it got a 500."""
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=1) as server, ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.post, BODY)
        wait_until(lambda: server.scheduler.running == 1)
        second = clients.submit(server.post, BODY)
        wait_until(lambda: server.scheduler.waiting == 1)
        writer.gate.error = Panic("made up")
        writer.gate.open()
        assert first.result().status_code == 500
        assert first.result().json()["error"]["code"] == "worker_died"
        assert "made up" not in first.result().text
        assert second.result().status_code == server.post(BODY).status_code == 200
        health = server.get("/health")
        assert (health.status_code, health.json()["restarts"]) == (200, 1)


def test_if_no_batch_can_be_opened_all_requests_get_an_error_and_the_server_ends(monkeypatch):
    """Running, waiting and later requests get a 500, /health a 503, and the server ends."""
    monkeypatch.setattr("mygpt.server.scheduler._PAUSES_S", (0.01, 0.01))
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=1) as server, ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(server.post, BODY) for _ in range(2)]
        wait_until(lambda: server.scheduler.waiting == 1)
        writer.gate.error, writer.gate.lasting = MemoryError("made up"), True
        writer.gate.open()
        found = [answer.result() for answer in answers] + [server.post(BODY)]
        for answer in found:
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "worker_died"
            assert "made up" not in answer.text
        health = server.get("/health")
        assert (health.status_code, health.json()["healthy"]) == (503, False)
        assert "could not be restarted" in health.json()["error"]["message"]
        server.thread.join(5)
        assert not server.thread.is_alive(), "a supervisor sees that it has ended"


def test_a_server_that_cannot_decode_ends_with_an_exit_code(monkeypatch):
    """1, and one line; not 0 as after Ctrl-C's clean end."""

    def died(*_, **__):
        raise ServerDied("made up")

    monkeypatch.setattr("mygpt.server.serving.serve", died)
    monkeypatch.setattr("mygpt.decode.writer.load", lambda *_, **__: tiny_writer())
    monkeypatch.setattr(
        "mygpt.checkpoint.model_file.resolve", lambda path: Path("a/best.safetensors")
    )
    with pytest.raises(typer.Exit) as ended:
        serve(None)
    assert ended.value.exit_code == 1


def test_any_exception_of_one_row_ends_only_its_request(monkeypatch):
    """A library's panic in the decoding thread ended the server for all requests."""
    writer = tiny_writer()
    kind = type(writer.open_batch(1))
    places = [(kind, "join"), (kind, "logits")]
    places += [(Sample, name) for name in ("take", "update", "finish")]
    odd = {  # by seed
        100 + number: (owner, name, error)
        for number, ((owner, name), error) in enumerate(
            itertools.product(places, (Panic, MemoryError, ValueError, SystemExit))
        )
    }

    def seed_of(subject, *args):
        if isinstance(subject, Sample):
            return subject.request.stream.seed
        request = args[0] if isinstance(args[0], Request) else subject._requests[args[0]]
        return request.stream.seed

    def watched(owner, name):
        inner = getattr(owner, name)

        def call(*args):
            planned = odd.get(seed_of(*args))
            if planned is not None and planned[:2] == (owner, name):
                raise planned[2]("made up")
            return inner(*args)

        return call

    for owner, name in places:
        monkeypatch.setattr(owner, name, watched(owner, name))
    with running(writer) as server, ThreadPoolExecutor(3) as clients:
        good = [clients.submit(server.post, BODY | {"max_tokens": 4000}) for _ in range(3)]
        for seed, (_, name, error) in odd.items():
            answer = server.post(BODY | {"seed": seed, "logprobs": 0, "n": 2})
            assert answer.status_code == 500, (name, error)
            code = "out_of_memory" if error is MemoryError else "bug"
            assert answer.json()["error"]["code"] == code
        assert {answer.result().status_code for answer in good} == {200}
        assert server.get("/health").json()["restarts"] == 0
        wait_until(lambda: server.scheduler._batch.active == 0)


def test_a_panic_on_the_event_loop_is_a_500(monkeypatch):
    """For example while a prompt is encoded: the error has the API's form, and others succeed."""

    def panics(*_):
        raise Panic("made up")

    monkeypatch.setattr("mygpt.server.completions.encode", panics)
    with running() as server:
        for size in (1, 5000):
            answer = server.post(BODY | {"prompt": "a" * size})
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "bug"
        assert server.get("/health").status_code == 200


def test_a_bug_is_a_500_without_its_traceback(monkeypatch, caplog):
    monkeypatch.setattr("mygpt.server.app.json_answer", lambda *_: 1 / 0)
    with running() as server:
        answer = server.get("/v1/models")
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "division" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "ZeroDivisionError" in caplog.text, "the log says more"
