"""Processes that encode jobs; the results are returned in the order of the jobs.

They are processes and not threads, since most of the time of mygpt's BPE is spent in Python. The
processes of `concurrent.futures` would import the caller's script again and would remain if the
caller is killed; these end when their standard input ends. Values are sent by `marshal`.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any

from mygpt.data.encoder import Encoder
from mygpt.errors import InputError, MygptError, OutOfMemoryError
from mygpt.processes import start
from mygpt.tokenization import Tokenizer, from_state

_AHEAD = 6  # jobs per worker that are submitted before the first result is needed
_KILLED = -9  # the exit code after SIGKILL, which the kernel sends when memory runs out


@dataclass
class Job:
    """Chunks of documents that are encoded together.

    Attributes:
        place: the name of the first chunk's source, for error messages.
        texts: the UTF-8 of each chunk.
        begins: whether each chunk is the first of its document.
        states: for each source number the position after this job: rows, characters of the next
            row, and whether the source is done.
        read: number of bytes read of the last source.
        characters: in all chunks.
    """

    place: str = ""
    texts: list[bytes] = field(default_factory=list)
    begins: list[bool] = field(default_factory=list)
    states: dict[int, tuple[int, int, bool]] = field(default_factory=dict)
    read: int = 0
    characters: int = 0


# The number of ids of each chunk, and the bytes of all ids.
Answer = tuple[list[int], bytes]


class Workers:
    """A pool of encoding processes, as a context manager.

    Args:
        tokenizer: encodes.
        number: of processes; with 0, this process encodes.
    """

    def __init__(self, tokenizer: Tokenizer, number: int) -> None:
        self._tokenizer = tokenizer
        self._number = number if sys.executable else 0
        self._encoder = None if self._number else Encoder(tokenizer)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max(1, self._number))  # each waits for one process

    def __enter__(self) -> Workers:
        state = json.dumps(self._tokenizer.to_state())
        for _ in range(self._number):
            process = start(__name__, env={"TOKENIZERS_PARALLELISM": "false"})
            self._processes.append(process)
            _send(process.stdin, state)
            self._idle.put(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            process.wait()

    def encoded(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answer]]:
        """Encode jobs; yields each job and its result, in order.

        Raises:
            InputError: as the tokenizer does.
            OutOfMemoryError: if the system killed a worker.
            MygptError: if a worker ended otherwise.
        """
        begun: deque[tuple[Job, Future[Answer]]] = deque()
        for job in jobs:
            begun.append((job, self._threads.submit(self._encode, job)))
            if len(begun) >= _AHEAD * self._number:
                first, future = begun.popleft()
                yield first, future.result()
        for last, future in begun:
            yield last, future.result()

    def _encode(self, job: Job) -> Answer:
        """Encode a job, in an idle process if there are any."""
        if self._encoder is not None:
            answer = _answer(self._encoder, job.texts, job.begins)
        else:
            answer = self._ask(job)
        if isinstance(answer, str):
            raise InputError(f"{job.place}: {answer}")
        return answer

    def _ask(self, job: Job) -> Answer | str:
        process = self._idle.get()
        try:
            _send(process.stdin, (job.texts, job.begins))
            answer: Answer | str = _receive(process.stdout)
            return answer
        except (EOFError, BrokenPipeError):
            code = process.wait()
            what = f"an encoding process ended with code {code}"
            if code == _KILLED:
                raise OutOfMemoryError(
                    f"{what}, probably for lack of memory: repeat the command with fewer --workers"
                ) from None
            raise MygptError(
                f"{what}: repeat the command to continue from the last shard"
            ) from None
        finally:
            self._idle.put(process)


def _answer(encoder: Encoder, texts: Sequence[bytes], begins: Sequence[bool]) -> Answer | str:
    """The ids of chunks, or an error message."""
    try:
        counts, ids = encoder.encode([text.decode("utf-8") for text in texts], begins)
    except InputError as error:
        return str(error)
    return counts, ids


def _send(file: IO[bytes] | None, value: Any) -> None:
    assert file is not None
    data = marshal.dumps(value)
    file.write(len(data).to_bytes(8, "little"))
    file.write(data)
    file.flush()


def _receive(file: IO[bytes] | None) -> Any:
    """The value that the other process sent; `EOFError` if it has ended."""
    assert file is not None
    length = int.from_bytes(file.read(8), "little")
    data = file.read(length)
    if not length or len(data) < length:
        raise EOFError
    return marshal.loads(data)


def main() -> None:
    """An encoding process: receives a tokenizer and then jobs, until its standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output that a library prints must not mix with the answers
    try:
        encoder = Encoder(from_state(json.loads(_receive(sys.stdin.buffer))))
        while True:
            texts, begins = _receive(sys.stdin.buffer)
            _send(answers, _answer(encoder, texts, begins))
    except (EOFError, BrokenPipeError):
        os._exit(0)
