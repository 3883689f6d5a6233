"""`mygpt serve` under clients that misbehave, with eight streaming clients at the same time.

The streams must continue, /health must answer, and the slots and memory of an odd client must be
free soon after it has gone: see `odd_clients` for what each does.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from paths import ROOT, SOURCES, TESTS
from torture import Tally
from torture.odd_clients import CLIENTS, MODEL, completion

STREAMS, GAP_S, HEALTH_S, FREED_WITHIN_S = 8, 0.5, 0.1, 5.0
SPARE_BYTES = 96 * 2**20  # of memory, which the allocator may keep
SECONDS = 10.0  # under each odd client
FILES = 256  # that the server may open


@dataclass
class Measured:
    """Measurements under one odd client.

    Attributes:
        gaps_s: between two pieces of a stream.
        waits_s: from a stream's request to its first piece.
        health_s: how long /health took.
        freed_s: until slots and memory were free again; None where they were not.
        grown: bytes of the server's memory then, above those before.
    """

    gaps_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    freed_s: float | None = None
    grown: int = 0

    @property
    def good(self) -> bool:
        """Whether all limits were kept."""
        enough = len(self.gaps_s) > 100 and len(self.health_s) > 10
        kept = p99(self.gaps_s) <= GAP_S and p99(self.health_s) <= HEALTH_S
        return enough and kept and self.freed_s is not None

    def __str__(self) -> str:
        freed = f"free after {self.freed_s:.1f} s" if self.freed_s is not None else "not free"
        return (
            f"gaps {1000 * p99(self.gaps_s):.0f} ms (largest {1000 * max(self.gaps_s):.0f}), "
            f"first pieces after {1000 * p99(self.waits_s):.0f} ms, "
            f"/health {1000 * p99(self.health_s):.0f} ms (largest "
            f"{1000 * max(self.health_s):.0f}), {freed}, memory +{self.grown / 2**20:.0f} MiB"
        )


def p99(values: list[float]) -> float:
    """The 99th percentile; infinity of no values."""
    ranked = sorted(values)
    return ranked[int(0.99 * (len(ranked) - 1))] if ranked else float("inf")


def odd_clients(count: int, folder: Path) -> Tally:
    """Each odd client for some seconds, `count` times; one server for each."""
    tally = Tally("odd clients: the server's streams, /health, slots and memory meanwhile")
    if not count:
        tally.note = "not run: tests/server/test_server_*.py have a short form of each"
        return tally
    model = make_model(folder)
    for name in [*CLIENTS, "unread log"] * count:
        with serving(model, unread=name == "unread log") as server:
            seen = watch(server, name)
        print(f"  {name}: {seen}", flush=True)
        tally.count(seen.good, f"{name}: {seen}")
    return tally


def make_model(folder: Path) -> Path:
    """A small model with a tokenizer of the `tokenizers` library, which encodes a text at once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from mygpt import GPT, GPTConfig, save_checkpoint
    from mygpt.tokenization.foreign import ForeignTokenizer

    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    text = (ROOT / "README.md").read_text()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    library.train_from_iterator([text], trainer)
    tokenizer = ForeignTokenizer(json.loads(library.to_str()))
    config = GPTConfig(
        tokenizer.vocab_size, embed_dim=64, num_heads=4, num_layers=4, max_seq_len=256
    )
    path = folder / f"{MODEL}.safetensors"
    save_checkpoint(path, GPT.from_config(config), tokenizer)
    return path


@dataclass
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int

    def memory(self) -> int:
        """Its resident memory in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def health(self) -> dict[str, int]:
        """The answer of /health, on a new connection."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=30) as answer:
            found: dict[str, int] = json.load(answer)
            return found


@contextmanager
def serving(model: Path, *, unread: bool) -> Iterator[Served]:
    """`mygpt serve`; with `unread`, nobody reads its standard error after the start."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))

    command = [sys.executable, "-m", "mygpt", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        preexec_fn=limit,
    )
    assert process.stderr is not None
    try:
        line = b""
        while b"serving" not in line:
            line = process.stderr.readline()
            assert line, "the server did not start"
        if not unread:
            threading.Thread(target=process.stderr.read, daemon=True).start()
        port = int(line.split(b":")[2].split()[0])
        yield Served(process, port)
        process.send_signal(signal.SIGTERM)
        process.wait(40)
    finally:
        process.kill()
        process.wait()


def watch(server: Served, name: str) -> Measured:
    """Measure streams and /health under an odd client, and how soon its resources are free."""
    seen, over = Measured(), threading.Event()
    for _ in range(3):
        stream(server.port, 2.0, Measured())  # warm
    before = server.memory()
    command = [sys.executable, "-m", "torture.odd_clients", name, str(server.port)]
    if name == "unread log":
        command[3] = "predictions"
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    odd = subprocess.Popen(command, env=environment)

    def ask() -> None:
        while not over.wait(0.05):
            began = time.perf_counter()
            server.health()
            seen.health_s.append(time.perf_counter() - began)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        stream(server.port, SECONDS, seen)
    finally:
        over.set()
        odd.kill()
        odd.wait()
    asking.join()
    began = time.monotonic()
    while time.monotonic() - began < FREED_WITHIN_S:
        health, seen.grown = server.health(), server.memory() - before
        if not health["running"] and not health["waiting"] and seen.grown < SPARE_BYTES:
            seen.freed_s = time.monotonic() - began
            break
        time.sleep(0.05)
    return seen


def stream(port: int, seconds: float, seen: Measured) -> None:
    """Eight clients that stream one completion after another."""
    chooser = selectors.DefaultSelector()

    def begin() -> None:
        sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        sock.sendall(completion(max_tokens=400, stream=True))
        chooser.register(sock, selectors.EVENT_READ, [time.perf_counter(), b""])

    for _ in range(STREAMS):
        begin()
    ends = time.perf_counter() + seconds
    while (now := time.perf_counter()) < ends:
        for key, _ in chooser.select(timeout=0.1):
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(65536)
            now = time.perf_counter()
            (seen.gaps_s if key.data[1] else seen.waits_s).append(now - key.data[0])
            key.data[0], key.data[1] = now, (key.data[1] + data)[-20:]
            if not data or b"[DONE]" in key.data[1]:
                chooser.unregister(key.fileobj)
                key.fileobj.close()
                begin()
    for key in list(chooser.get_map().values()):
        if key.data[1]:
            seen.gaps_s.append(time.perf_counter() - key.data[0])
        with contextlib.suppress(OSError):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
