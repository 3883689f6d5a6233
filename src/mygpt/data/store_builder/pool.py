"""Workers that encode parts of texts: processes, whose answers come in the order of the jobs.

They are processes, since most of our BPE's time is Python's.
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
from mygpt.errors import MygptError, OutOfMemoryError
from mygpt.processes import start
from mygpt.tokenization import Tokenizer

_AHEAD = 6  # jobs a worker that are begun before the first of them is asked for
_KILLED = -9


@dataclass(frozen=True)
class Job:
    """Parts of documents that are encoded together.

    Attributes:
        texts: of each part, its UTF-8.
        begins: whether it is its document's first.
        states: by the number of a source: rows, characters of the next, and whether all is done,
            once this job is.
        read: bytes of the last source that had been read.
        place: what an error calls the place of these texts.
        characters: of all texts.
    """

    texts: Sequence[bytes]
    begins: Sequence[bool]
    states: dict[int, tuple[int, int, bool]]
    read: int
    place: str
    characters: int = 0


Answer = tuple[NDArray[np.int64], bytes]


class Workers:
    """Encoding processes; with none of them, this process encodes.

    Args:
        tokenizer: theirs.
        number: how many.
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
        """The jobs in order, each with the number of ids of each part, and the ids' bytes.

        Raises:
            InputError: as the tokenizer does.
            OutOfMemoryError: for a worker that the system has killed.
        """
        if self._threads is None:
            encoder = Encoder(self._tokenizer)
            for job in jobs:
                texts = [text.decode("utf-8") for text in job.texts]
                with _placed(job):
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
        """Have an idle process encode a job; runs in a thread."""
        process = self._idle.get()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            write_request(process.stdin, job.texts, job.begins)
            return read_answer(process.stdout, len(job.texts))
        except (EOFError, BrokenPipeError):
            code = process.wait()
            told = f"a process that encodes ended with {code}"
            if code == _KILLED:
                raise OutOfMemoryError(
                    f"{told}: memory may be short; give fewer --workers and the same command again"
                ) from None
            raise MygptError(f"{told}: the same command goes on from the last shard") from None
        finally:
            self._idle.put(process)


def _done(job: Job, future: Future[Answer]) -> tuple[Job, Answer]:
    with _placed(job):
        return job, future.result()


@contextlib.contextmanager
def _placed(job: Job) -> Iterator[None]:
    """Say where the text is that a tokenizer refuses."""
    from mygpt.errors import InputError

    try:
        yield
    except InputError as error:
        raise InputError(f"{job.place}: {error}") from None
