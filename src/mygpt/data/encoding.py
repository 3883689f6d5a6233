"""Encode a text chunk by chunk, in several processes, to the ids of all of the text.

With characters and bytes as tokens, a text can be split anywhere. With byte-level BPE it can be
split where a word begins regardless of context. For the rules for words known here that is before
a space that follows a letter, and after a line end between two ordinary characters; for mygpt's own
rule (`tokenization/words.py`) also before a space that follows any ordinary character, and between
a line end and an ordinary character. Any other tokenizer needs complete documents.

Processes and not threads encode, since most of the time of mygpt's BPE is spent in Python. The
processes of `concurrent.futures` would import the caller's script again and would remain if the
caller is killed; these end when their standard input ends. Values are sent by `marshal`. This
module does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import queue
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from mygpt.data.tokens import dtype_of
from mygpt.errors import InputError, MygptError, OutOfMemoryError
from mygpt.processes import start
from mygpt.tokenization import Tokenizer, from_state
from mygpt.tokenization.words import REACH, WordSplitter

# Ordinary characters, which are not white space in any version of Unicode: ASCII, Latin, Cyrillic,
# Chinese, Japanese, Korean.
_ORDINARY = "!-~\u00c0-\u024f\u0400-\u04ff\u3001-\u30fa\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff5e"
_OURS = re.compile(rf"[{_ORDINARY}](?= )|\n(?=[{_ORDINARY}])")
_SPACES = re.compile(r"[^\W\d_](?= )")
_SPACES_AND_LINES = re.compile(rf"[^\W\d_](?= )|[{_ORDINARY}]\n(?=[{_ORDINARY}])")
_SLACK = 2**16  # characters in which a split point is searched for, before words are counted
_LONGEST = 2**28  # characters of a document that cannot be split
_AHEAD = 6  # jobs per worker that are submitted before the first result is needed
_KILLED = -9  # the exit code after SIGKILL, which the kernel sends when memory runs out


class Chunker:
    """Finds the ends of chunks.

    A chunk's end depends only on the text from the chunk's beginning on, not on how much of it is
    read at a time.

    Args:
        tokenizer: will encode the chunks.
        length: minimum number of characters of a chunk, except for a document's last one.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.length = length
        self._anywhere = tokenizer.kind in ("char", "byte")
        self._pattern, self._own_rule = _rule(tokenizer)
        self._words = WordSplitter()

    def find(self, text: str, begin: int, seen: int) -> int | None:
        """The end of the chunk that begins at `begin`; None if more text is needed.

        Args:
            text: the part of the document that has been read.
            begin: the index of the chunk's first character in `text`.
            seen: the length of `text` at the previous call, which returned None; else 0.

        Raises:
            InputError: if the tokenizer needs complete documents and this one is too long.
        """
        least = begin + self.length
        if len(text) <= least:
            return None
        if self._anywhere:
            return least
        if self._pattern is None:
            self._check_whole(len(text) - begin)
            return None
        last = least + _SLACK if self._own_rule else len(text)
        found = self._pattern.search(text, max(least, seen - 2), last)
        if found is not None:
            return found.end()
        if not self._own_rule:
            self._check_whole(len(text) - begin)
            return None
        return self._before_a_word(text, begin, last) if len(text) > last else None

    def _before_a_word(self, text: str, begin: int, last: int) -> int:
        """The last position up to which the words do not depend on the text that follows."""
        words = self._words.split(text[begin:last])
        end = last
        while words and last - end < REACH:
            end -= len(words.pop())
        return end

    def _check_whole(self, length: int) -> None:
        if length > _LONGEST:
            raise InputError(
                f"a document has more than {_LONGEST:,} characters, the limit for a tokenizer that "
                "needs complete documents: split it into several, for instance lines of a *.jsonl"
            )


def _rule(tokenizer: Tokenizer) -> tuple[re.Pattern[str] | None, bool]:
    """The pattern before which a text can be split, and whether `words.py`'s rule applies."""
    if tokenizer.encoder is None:
        return None, False
    rules = tokenizer.encoder.rules
    if rules.own_rule:
        return _OURS, True
    if not rules.splits_at_spaces:
        return None, False
    return (_SPACES_AND_LINES if rules.splits_at_lines else _SPACES), False


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


class Encoder:
    """Encodes chunks of documents to the same ids as `encode_documents`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype_of(tokenizer)).newbyteorder("<")
        ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        self._before = np.array([*ends, *tokenizer.beginning], np.int32).tobytes()

    def encode(self, texts: Sequence[bytes], begins: Sequence[bool]) -> Answer | str:
        """The ids of chunks in UTF-8, or the tokenizer's error message.

        Args:
            texts: the chunks.
            begins: whether each begins a document, and so gets the tokens before a document.
        """
        try:
            rows = [
                self._before * begin + self._tokenizer.encode_part(text.decode("utf-8"))
                for text, begin in zip(texts, begins, strict=True)
            ]
        except InputError as error:
            return str(error)
        ids = np.frombuffer(b"".join(rows), np.int32)
        return [len(row) // ids.itemsize for row in rows], ids.astype(self._dtype).tobytes()


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

    def __exit__(self, *_: object) -> None:
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
            answer = self._encoder.encode(job.texts, job.begins)
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
            _send(answers, encoder.encode(texts, begins))
    except (EOFError, BrokenPipeError):
        os._exit(0)
