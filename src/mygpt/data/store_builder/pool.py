"""Worker processes that encode jobs; the results are returned in the order of the jobs.

They are processes and not threads, since most of the time of mygpt's BPE is spent in Python.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mygpt.data.store_builder.worker import NUMBER, Encoder, read_answer, write_request
from mygpt.errors import InputError, MygptError, OutOfMemoryError
from mygpt.processes import start
from mygpt.tokenization import Tokenizer

_AHEAD = 6  # jobs per worker that are submitted before the first result is needed
_KILLED = -9  # the exit code after SIGKILL, which the kernel sends when memory runs out


@dataclass(frozen=True)
class Job:
    """Chunks of documents that are encoded together.

    Attributes:
        texts: the UTF-8 of each chunk.
        begins: whether each chunk is the first of its document.
        states: for each source number the position after this job: rows, characters of the next
            row, and whether the source is done.
        read: number of bytes read of the last source.
        place: the name of the source, for error messages.
        characters: in all chunks.
    """

    texts: Sequence[bytes]
    begins: Sequence[bool]
    states: dict[int, tuple[int, int, bool]]
    read: int
    place: str
    characters: int = 0


# The number of ids of each chunk, and the bytes of all ids.
Answer = tuple[NDArray[np.int64], bytes]


class Workers:
    """A pool of encoding processes, as a context manager.

    Args:
        tokenizer: encodes.
        number: of processes; with 0, this process encodes.
    """

    def __init__(self, tokenizer: Tokenizer, number: int) -> None:
        self._tokenizer = tokenizer
        self._number = number
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._number and sys.executable:
            state = json.dumps(self._tokenizer.to_state()).encode()
            self._threads = ThreadPoolExecutor(self._number)
            for _ in range(self._number):
                self._start(state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        if self._threads is not None:
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
        if self._threads is None:
            encoder = Encoder(self._tokenizer)
            for job in jobs:
                texts = [text.decode("utf-8") for text in job.texts]
                with _naming_source(job):
                    counts, ids = encoder.encode(texts, job.begins)
                yield job, (np.array(counts, np.int64), bytes(ids))
            return
        begun: deque[tuple[Job, Future[Answer]]] = deque()
        for job in jobs:
            begun.append((job, self._threads.submit(self._ask, job)))
            if len(begun) >= _AHEAD * self._number:
                yield _done(*begun.popleft())
        while begun:
            yield _done(*begun.popleft())

    def _start(self, state: bytes) -> None:
        process = start("mygpt.data.store_builder.worker", env={"TOKENIZERS_PARALLELISM": "false"})
        self._processes.append(process)
        assert process.stdin is not None
        process.stdin.write(NUMBER.pack(len(state)) + state)
        process.stdin.flush()
        self._idle.put(process)

    def _ask(self, job: Job) -> Answer:
        """Have an idle process encode a job and wait for the result; runs in a thread."""
        process = self._idle.get()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            write_request(process.stdin, job.texts, job.begins)
            return read_answer(process.stdout, len(job.texts))
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


def _done(job: Job, future: Future[Answer]) -> tuple[Job, Answer]:
    with _naming_source(job):
        return job, future.result()


@contextlib.contextmanager
def _naming_source(job: Job) -> Iterator[None]:
    """Prefix an `InputError` of the tokenizer with the job's source."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{job.place}: {error}") from None
