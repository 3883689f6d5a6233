"""An encoding process: chunks of text on its standard input, their ids on its standard output.

`pool.py` starts it, and it ends when its input ends. It does not import torch. The protocol, with
numbers as little-endian 64-bit integers:

    first request   length, the tokenizer's state as JSON; no answer
    request         number of chunks, their lengths in bytes, for each a byte that is 1 if it
                    begins a document, their UTF-8
    answer          0, number of bytes of ids, number of ids of each chunk, the ids
    or              1, length, an error message
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
from mygpt.tokenization.library import refusals
from mygpt.tokenization.tokenizer_json import build, check

NUMBER = struct.Struct("<q")
_LENGTH = 2000  # characters per text of the library's batch; shorter and longer ones are slower
_SPACE = re.compile(r"[^\W\d_](?= )")


class Encoder:
    """Encodes chunks of documents to the same ids as `encode_documents`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype(dtype_of(tokenizer)).newbyteorder("<")
        ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        self._before = np.array([*ends, *tokenizer.beginning], self.dtype).tobytes()
        self._words = words_of(tokenizer, self.dtype)
        self._library = None if self._words is not None else _library_of(tokenizer)

    def encode(self, texts: Sequence[str], begins: Sequence[bool]) -> tuple[list[int], bytearray]:
        """Encode chunks.

        Args:
            texts: the chunks.
            begins: whether each begins a document, and so gets the tokens before a document.

        Returns:
            The number of ids of each chunk, and the bytes of all ids.

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
    """The library's batch encoder, if it can encode a text in chunks; else None."""
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
    """Read `length` bytes; `EOFError` if the other process has ended."""
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data


def write_request(file: IO[bytes], texts: Sequence[bytes], begins: Sequence[bool]) -> None:
    """Write a request to encode chunks."""
    lengths = np.array([len(text) for text in texts], "<i8")
    file.write(NUMBER.pack(len(texts)) + lengths.tobytes() + bytes(begins))
    file.writelines(texts)
    file.flush()


def read_answer(file: IO[bytes], chunks: int) -> tuple[NDArray[np.int64], bytes]:
    """Read the number of ids of each chunk, and the bytes of all ids.

    Raises:
        InputError: if the worker could not encode the text.
    """
    wrong, length = NUMBER.unpack(read_exactly(file, 8))[0], 0
    length = NUMBER.unpack(read_exactly(file, 8))[0]
    if wrong:
        raise InputError(read_exactly(file, length).decode("utf-8", "replace"))
    counts = np.frombuffer(read_exactly(file, 8 * chunks), "<i8")
    return counts, read_exactly(file, length)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    length = NUMBER.unpack(read_exactly(requests, 8))[0]
    encoder = Encoder(from_state(json.loads(read_exactly(requests, length))))
    while True:
        chunks = NUMBER.unpack(read_exactly(requests, 8))[0]
        lengths = np.frombuffer(read_exactly(requests, 8 * chunks), "<i8").tolist()
        begins = [bool(flag) for flag in read_exactly(requests, chunks)]
        texts = [read_exactly(requests, length).decode("utf-8") for length in lengths]
        try:
            counts, ids = encoder.encode(texts, begins)
        except InputError as error:
            message = str(error).encode("utf-8", "replace")
            answers.write(NUMBER.pack(1) + NUMBER.pack(len(message)) + message)
        else:
            answers.write(NUMBER.pack(0) + NUMBER.pack(len(ids)))
            answers.write(np.array(counts, "<i8").tobytes())
            answers.write(ids)
        answers.flush()


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output that a library prints must not mix with the answers
    try:
        _serve(sys.stdin.buffer, answers)
    except (EOFError, BrokenPipeError):
        os._exit(0)
