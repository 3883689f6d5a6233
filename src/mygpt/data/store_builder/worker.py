"""A process that encodes: parts of texts on its standard input, their ids on its standard output.

It is started by `pool.py`, ends when its input does, and never imports torch. A request
is the number of parts, their lengths in bytes, which of them begin a document, and their UTF-8;
an answer is 0, the number of bytes, the number of ids of each part, and all ids; or 1 and what is
wrong. The first request's text is the tokenizer's state instead, and has no answer.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mygpt.data.store_builder.chunking import library_json
from mygpt.data.store_builder.words import words_of
from mygpt.data.tokens import dtype_of
from mygpt.errors import InputError
from mygpt.tokenization import Tokenizer, from_state
from mygpt.tokenization.tokenizer_json import build, check, refusals

NUMBER = struct.Struct("<q")
_LENGTH = 2000  # characters that the library gets at a time: less and more are slower
_SPACE = re.compile(r"[^\W\d_](?= )")


class Encoder:
    """Encodes parts of documents, as `encode_documents` encodes those."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype(dtype_of(tokenizer)).newbyteorder("<")
        ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        self._before = np.array([*ends, *tokenizer.beginning], self.dtype).tobytes()
        self._words = words_of(tokenizer, self.dtype)
        self._library = None if self._words is not None else _library_of(tokenizer)

    def encode(self, texts: Sequence[str], begins: Sequence[bool]) -> tuple[list[int], bytearray]:
        """Of each part, how many ids; and the ids' bytes.

        Raises:
            InputError: as the tokenizer does.
        """
        counts: list[int] = []
        ids = bytearray()
        for text, begin in zip(texts, begins, strict=True):
            length = len(ids)
            if begin:
                ids += self._before
            if self._words is not None:
                ids += b"".join(map(self._words.__getitem__, self._words.split(text)))
            else:
                for row in self._rows(text):
                    ids += row.astype(self.dtype).tobytes()
            counts.append((len(ids) - length) // self.dtype.itemsize)
        return counts, ids

    def _rows(self, text: str) -> Any:
        if self._library is None:
            return self.tokenizer.encode_pieces([text])
        with refusals("the tokenizers library could not encode this text"):
            found = self._library(_in_chunks(text), add_special_tokens=False)
        return [np.array(each.ids, np.int64) for each in found]


def _library_of(tokenizer: Tokenizer) -> Any:
    """The library's batch, where it encodes and a text may be cut before it."""
    description = library_json(tokenizer)
    if description is None:
        return None
    contents = check(description)
    if not contents.splits_at_spaces:
        return None
    library = build(description)
    return getattr(library, "encode_batch_fast", library.encode_batch)


def _in_chunks(text: str) -> list[str]:
    chunks = []
    begin = 0
    while found := _SPACE.search(text, begin + _LENGTH):
        chunks.append(text[begin : found.end()])
        begin = found.end()
    return [*chunks, text[begin:]]


def read_exactly(file: IO[bytes], length: int) -> bytes:
    """That many bytes; `EOFError` where the other side has ended."""
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data


def write_request(file: IO[bytes], texts: Sequence[bytes], begins: Sequence[bool]) -> None:
    """Ask for the ids of parts."""
    lengths = np.array([len(text) for text in texts], "<i8")
    file.write(NUMBER.pack(len(texts)) + lengths.tobytes() + bytes(begins))
    file.writelines(texts)
    file.flush()


def read_answer(file: IO[bytes], parts: int) -> tuple[NDArray[np.int64], bytes]:
    """How many ids each part has, and the ids' bytes; `InputError` for what cannot be encoded."""
    wrong, length = NUMBER.unpack(read_exactly(file, 8))[0], 0
    length = NUMBER.unpack(read_exactly(file, 8))[0]
    if wrong:
        raise InputError(read_exactly(file, length).decode("utf-8", "replace"))
    counts = np.frombuffer(read_exactly(file, 8 * parts), "<i8")
    return counts, read_exactly(file, length)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    length = NUMBER.unpack(read_exactly(requests, 8))[0]
    encoder = Encoder(from_state(json.loads(read_exactly(requests, length))))
    while True:
        parts = NUMBER.unpack(read_exactly(requests, 8))[0]
        lengths = np.frombuffer(read_exactly(requests, 8 * parts), "<i8").tolist()
        begins = [bool(flag) for flag in read_exactly(requests, parts)]
        texts = [read_exactly(requests, length).decode("utf-8") for length in lengths]
        try:
            counts, ids = encoder.encode(texts, begins)
        except InputError as error:
            told = str(error).encode("utf-8", "replace")
            answers.write(NUMBER.pack(1) + NUMBER.pack(len(told)) + told)
        else:
            answers.write(NUMBER.pack(0) + NUMBER.pack(len(ids)))
            answers.write(np.array(counts, "<i8").tobytes())
            answers.write(ids)
        answers.flush()


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other side's affair
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    try:
        _serve(sys.stdin.buffer, answers)
    except (EOFError, BrokenPipeError):
        os._exit(0)
