"""Decoding in NumPy, one row at a time: the readable engine, which needs no compiling.

Every row has its own cache and is computed separately, so its tokens depend bit for bit on its
request alone.
Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mygpt.core.config import GPTConfig
from mygpt.core.window import Window
from mygpt.decode.numpy_network import Arrays, Cache, Floats, Network
from mygpt.decode.numpy_sampling import next_id
from mygpt.engine import Request, SeparateBatch

_RESERVED_TOKENS = 2**12  # new tokens for which a cache has capacity from the start


class Row:
    """A request that is being decoded.

    Attributes:
        text: the prompt and the drawn tokens.
        ended: whether it gets no more tokens.
        logits: (V,), the prediction after the text that was read last.
    """

    logits: Floats

    def __init__(self, network: Network, request: Request) -> None:
        self.network = network
        self.request, self.ends = request, request.ends
        self.text: list[int] = request.prompt.tolist()
        self.full = len(self.text) + request.most_tokens(network.config.max_seq_len)
        self.ended = len(self.text) >= self.full
        self.window = Window(network.config.max_seq_len, request.overflow)
        self.cache = Cache(network.config, min(self.full, len(self.text) + _RESERVED_TOKENS))
        self.start = self.window.start(len(self.text))

    def read(self) -> None:
        """Read tokens that were not read yet, or all of the window if it has moved."""
        start = self.window.start(len(self.text))
        if start != self.start:
            self.start = start
            self.cache.length = 0
        unread = self.text[start + self.cache.length :]
        if unread:
            self.logits = self.network.read(unread, self.cache)

    def advance(self, most: int) -> list[int]:
        """Draw up to `most` tokens; the new ids."""
        before, request = len(self.text), self.request
        while len(self.text) < before + most and not self.ended:
            self.read()
            step = len(self.text) - len(request.prompt)
            token = next_id(self.logits, request.sampling, self.text, request.stream, step)
            self.text.append(token)
            self.ended = token in self.ends or len(self.text) == self.full
        return self.text[before:]


class NumpyDecoding:
    """Rows that are being decoded, one per request; see `mygpt.engine.Decoding`."""

    draws_in_blocks = False

    def __init__(self, network: Network, requests: Sequence[Request]) -> None:
        self.rows = [Row(network, request) for request in requests]
        self.prompts_read = False

    def advance(self, most: int, least: int | None = None) -> list[list[int]]:
        """Draw tokens for every row; see `Decoding`."""
        count = most if least is None else least
        # The draw raises an error for logits that are not finite; NumPy's warnings are not needed.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if not self.prompts_read:
                self._read_prompts()
            return [row.advance(count) for row in self.rows]

    def _read_prompts(self) -> None:
        """Read each prompt once, however many rows continue it."""
        self.prompts_read = True
        readers: dict[tuple[int, ...], Row] = {}
        for row in self.rows:
            if row.ended:
                continue
            reader = readers.setdefault(tuple(row.text[row.start :]), row)
            if reader is row:
                row.read()
            else:
                row.cache.copy_from(reader.cache)
                row.logits = reader.logits

    def end(self, row: int) -> None:
        """End this row: it gets no further tokens."""
        self.rows[row].ended = True

    def logits(self, row: int) -> Floats:
        """(V,), the logits of the row's last drawn token, before penalty and filters."""
        return self.rows[row].logits.copy()

    def passes(self, row: int) -> None:
        """Each token is drawn in a pass of its own; see `Decoding`."""


class NumpyEngine:
    """A GPT's arrays, ready to decode.

    Args:
        config: the shape.
        arrays: float32 parameters by the names of `mygpt.core.model.GPT`'s state_dict; weights
            (out, in).
    """

    name = "numpy"

    def __init__(self, config: GPTConfig, arrays: Arrays) -> None:
        self.network = Network(config, arrays)

    def start(self, requests: Sequence[Request]) -> NumpyDecoding:
        """Begin to decode; nothing is computed yet."""
        return NumpyDecoding(self.network, requests)

    def open(self, size: int) -> SeparateBatch:
        """A batch of separate rows; see `mygpt.engine.Engine`."""
        config = self.network.config
        return SeparateBatch(
            self, size, vocab_size=config.vocab_size, max_seq_len=config.max_seq_len
        )
