"""The server as a process: shutdown, signals, its port, its log, and its open files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from mygpt import save_checkpoint
from mygpt.cli.serve import serve
from mygpt.errors import InputError
from mygpt.server.serving import connections_within, listen
from paths import SOURCES
from servers import (
    BODY,
    CHARS,
    GatedWriter,
    client,
    connect,
    request_bytes,
    running,
    tiny_writer,
    wait_until,
)

pytestmark = pytest.mark.processes


def test_a_shutdown_finishes_running_streams():
    """Running requests are finished; waiting and new ones get an error."""
    writer = tiny_writer(kind=GatedWriter)
    with running(writer, slots=2) as server, ThreadPoolExecutor(2) as clients:
        body = BODY | {"n": 3, "stream": True}  # one choice of it still waits for its slot
        streaming = clients.submit(server.post, body)
        wait_until(lambda: server.scheduler.running == 2)
        waiting = clients.submit(server.post, BODY)
        wait_until(lambda: server.scheduler.waiting == 2)
        server.server.should_exit = True
        assert waiting.result().status_code == 503
        assert waiting.result().json()["error"]["code"] == "shutting_down"
        with pytest.raises(httpx.ConnectError):
            server.get("/health")
        writer.gate.open()
        events = streaming.result().text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert sum('"finish_reason":"length"' in event for event in events) == 3
        server.thread.join(5)
        assert not server.thread.is_alive()


def test_a_shutdown_does_not_wait_for_ever():
    """Shortly before the time limit, running requests get an error."""
    with running(shutdown_limit_s=2.0, max_tokens=10**9) as server, connect(server.port) as one:
        one.sendall(request_bytes(BODY | {"max_tokens": 10**9, "stream": True}))
        last = b""
        assert one.recv(1000)
        began = time.monotonic()
        server.server.should_exit = True
        while data := one.recv(65536):
            last = (last + data)[-1000:]
        assert b"shutting_down" in last
        assert b"[DONE]" in last
        server.thread.join(10)
        assert time.monotonic() - began < 4.0


def test_requests_are_logged_in_one_line_without_their_text():
    lines: list[str] = []
    with client(log=lines.append) as api:
        api.post("/v1/completions", json=BODY | {"prompt": "cab\ncab"})
        api.get("/no%1B%5B31mthing")
    assert len(lines) == 2
    assert lines[0].startswith("POST /v1/completions 200 ")
    assert lines[1].startswith("GET /no%1B%5B31mthing 404 ")


def test_a_port_in_use_is_an_error_with_the_remedy():
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use.*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match=r"host 'no\.such\.host\.invalid' cannot be resolved"):
        listen("no.such.host.invalid", 0)


def test_without_the_extra_the_error_names_how_to_install_it(monkeypatch):
    """Before the checkpoint is searched for, and in one line."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"pip install 'mygpt-train\[serve\]'"):
        serve(Path("no such run"))


@contextlib.contextmanager
def served(folder: Path, *options: str, **popen) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The command in a process of its own that serves a run called "poems"; and its URL."""
    run = folder / "poems"
    run.mkdir()
    save_checkpoint(run / "best.safetensors", tiny_writer().model, CHARS)
    code = "import sys; from mygpt.cli import main; main(['serve', *sys.argv[1:]])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run), "--port", "0", "--slots", "2", *options],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(SOURCES)} | popen.pop("env", {}),
        bufsize=0,  # so that what is read stops at the end of a line
        **popen,
    )
    try:
        line = b""
        while not line.startswith(b"serving poems at http://127.0.0.1:"):
            line = process.stderr.readline()
            assert line
        yield process, line.split()[3].decode()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_a_run_and_ends_by_signal(tmp_path, number):
    """It reports its address; the model's id is the run folder's name; the key is in a variable."""
    with served(tmp_path, env={"MYGPT_API_KEY": "k"}) as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        answer = httpx.post(
            f"{url}/v1/completions",
            json=BODY | {"model": "poems"},
            headers={"authorization": "Bearer k"},
            timeout=30,
        )
        expected = tiny_writer().complete("ab", 6, seed=1)[0].text
        assert answer.json()["choices"][0]["text"] == expected
        process.send_signal(number)
        rest = process.communicate(timeout=20)[1]
    assert b"POST /v1/completions 200" in rest
    assert b"Traceback" not in rest
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_and_quietly(tmp_path, number):
    """It printed the tracebacks of all running requests."""
    with served(tmp_path, "--max-tokens", "1000000000") as (process, url):
        with connect(int(url.rpartition(":")[2])) as connection:
            body = BODY | {"model": "poems", "max_tokens": 10**9, "stream": True}
            connection.sendall(request_bytes(body))
            assert connection.recv(100)
            process.send_signal(number)
            assert b"30 s" in process.stderr.readline()
            time.sleep(0.3)
            assert process.poll() is None, "what streams is to be finished"
            process.send_signal(number)
            began = time.monotonic()
            assert process.wait(5) == 128 + number
            assert time.monotonic() - began < 1.0
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.skipif(sys.platform != "linux", reason="it sets limits of Linux's")
def test_a_log_that_is_not_read_blocks_nothing(tmp_path):
    """A pipe of 64 KiB was full after 2,719 requests; then no request was answered any more."""
    with served(tmp_path) as (process, url):
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        with httpx.Client(base_url=url, timeout=5) as http:
            for _ in range(300):
                assert http.get("/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="it sets limits of Linux's")
def test_connections_are_limited_by_the_limit_of_open_files(tmp_path):
    """With more of them no connection could be accepted, and the log filled with tracebacks."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))

    with served(tmp_path, "--quiet", preexec_fn=limit) as (process, url):
        with contextlib.ExitStack() as idle:
            for _ in range(150):
                idle.enter_context(connect(int(url.rpartition(":")[2])))
            for _ in range(5):
                began = time.monotonic()
                assert httpx.get(f"{url}/health", timeout=5).status_code == 200
                assert time.monotonic() - began < 1.0
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=10)[1]
    assert b"Traceback" not in rest
    assert len(rest) < 1000


def test_the_limit_of_open_files_is_raised_as_far_as_permitted():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        assert connections_within(300) == min(300, before[1] - 200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
        assert connections_within(10) == 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
