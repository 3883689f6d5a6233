"""The routes of the page at /: its files, the next token's logits, attention weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.decode.writer import Writer
from mygpt.engine import Request
from mygpt.server.bodies import Bodies, Parts, grouped, json_pieces
from mygpt.server.completions import EncodedPrompt, encode
from mygpt.server.fields import Fields, invalid, parse_json, shown
from mygpt.server.problems import ApiError, json_answer, to_json
from mygpt.server.reading import Reader
from mygpt.server.requests import Prompt, check_prompt_ids, unknown_policy
from mygpt.server.samples import NextToken
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings
from mygpt.server.streaming import while_connected
from mygpt.tokenization import ends_of

STATIC = Path(__file__).resolve().parent.parent / "views" / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
SMALL_VOCABULARY = 4096  # tokens; all logits are sent up to this size, or else the largest:
LIKELIEST = 1024
MOST_POSITIONS = 128  # of attention weights
_LARGE = 2048  # tokens and logits of a response that is built in a thread


class Playground:
    """The routes of the page.

    Args:
        writer: the model and its tokenizer.
        settings: the server's limits.
        scheduler: computes the next token's logits.
        reader: computes attention weights.
        bodies: parses large bodies and builds large responses.
        static: the folder of the page's files.
    """

    def __init__(
        self,
        writer: Writer,
        settings: ServerSettings,
        scheduler: Scheduler,
        reader: Reader,
        bodies: Bodies,
        static: Path = STATIC,
    ) -> None:
        self.writer, self.settings, self.static = writer, settings, static
        self.scheduler, self.reader, self.bodies = scheduler, reader, bodies

    async def page(self, request: HttpRequest) -> Response:
        """GET /."""
        return self._file("playground.html")

    async def file(self, request: HttpRequest) -> Response:
        """GET /static/NAME."""
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        """A file of the folder, looked up in its listing: a path cannot lead to another folder."""
        files = {path.name: path for path in self.static.glob("*") if path.suffix in TYPES}
        if name not in files:
            raise ApiError(404, f"there is no file /static/{name[:80]}", code="not_found")
        path = files[name]
        headers = {"Cache-Control": "no-cache", "Content-Type": TYPES[path.suffix]}
        return Response(path.read_bytes(), headers=headers)

    async def model(self, request: HttpRequest) -> Response:
        """GET /api/model."""
        return json_answer(self._model)

    @cached_property
    def _model(self) -> bytes:
        config, tokenizer = self.writer.config, self.writer.tokenizer
        small = tokenizer.vocab_size <= SMALL_VOCABULARY
        content = {
            "name": self.settings.name,
            "checkpoint": self.settings.checkpoint or self.settings.name,
            "parameters": config.num_parameters(),
            "shape": asdict(config),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.kind,
            "window": config.max_seq_len,
            "end_of_text": tokenizer.end_of_text,
            "ends": list(ends_of(tokenizer)),
        }
        if small:
            content["tokens"] = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)]
        return to_json(content)

    async def next(self, request: HttpRequest) -> Response:
        """POST /api/next: the next token's logits after a text or ids."""
        prompt = await self.bodies.read(request, self._prompt)
        ids = prompt.ids
        row = NextToken(Request(ids, 1, SamplingConfig(temperature=0.0), Stream(0)))
        client = request.client.host if request.client else ""
        ticket = self.scheduler.submit([row], urgent=True, client=client)

        async def result() -> NDArray[np.float32]:
            async for found in ticket.updates():
                logits: NDArray[np.float32] = found[0]
                return logits
            raise AssertionError("the row ended without logits")

        try:
            logits = await while_connected(request.receive, result())
        finally:
            self.scheduler.cancel(ticket)

        def content() -> dict[str, Any]:
            text = self.writer.tokenizer.token_text
            left = {"text": prompt.text, "left_out": prompt.dropped} if prompt.dropped else {}
            return {
                **left,
                "ids": ids.tolist(),
                "tokens": [{"id": i, "text": text(i)} for i in ids.tolist()],
                "window_start": max(0, len(ids) - self.writer.config.max_seq_len),
                **logits_content(logits, text),
            }

        if len(ids) + len(logits) > _LARGE:
            return await self.bodies.answer(request, lambda: json_pieces(content()))
        return json_answer(content())

    async def attention(self, request: HttpRequest) -> Response:
        """POST /api/attention: the attention weights of the last positions."""
        ids = (await self.bodies.read(request, self._prompt)).ids
        parts = self.reader.run(self._attention, ids.tolist())
        return Parts(await while_connected(request.receive, parts))

    def _attention(self, ids: Sequence[int]) -> list[bytes]:
        """The JSON in parts: building it takes long, and other threads run in between."""
        config = self.writer.config
        start = max(0, len(ids) - min(MOST_POSITIONS, config.max_seq_len))
        weights = self.reader.attention(ids[start:])  # (N, H, T, T)
        content = {"layers": config.num_layers, "heads": config.num_heads, "start": start}
        before = [to_json(content)[:-1], b',"weights":']
        layers = _listed(_listed(_rows(head) for head in layer) for layer in weights)
        return list(grouped(chain(before, layers, [b"}"])))

    def _prompt(self, body: bytes) -> EncodedPrompt:
        """Encode a body's "text" or "ids"; an empty text gives the tokens that texts start from."""
        fields = Fields(parse_json(body), frozenset({"text", "ids", "unknown"}))
        text, given = fields.text("text"), fields.values.get("ids")
        if (text is None) == (given is None):
            raise invalid(None, 'the body needs exactly one of "text" and "ids"')
        prompt: Prompt
        if text is not None:
            prompt, name = text, "text"
        elif isinstance(given, list):
            prompt, name = check_prompt_ids(given, "ids", self.settings.max_prompt_tokens), "ids"
        else:
            raise invalid("ids", f"ids={shown(given)} must be a list of token ids")
        return encode(self.writer, prompt, self.settings, name, unknown_policy(fields))


def _rows(head: NDArray[np.float32]) -> Iterator[bytes]:
    rows = np.round(head.astype(np.float64), 4).tolist()  # (T, T)
    return json_pieces(rows)


def _listed(items: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """A JSON list, in pieces, of items that are given in pieces of JSON."""
    yield b"["
    for number, pieces in enumerate(items):
        if number:
            yield b","
        yield from pieces
    yield b"]"


def logits_content(logits: NDArray[np.float32], text: Callable[[int], str]) -> dict[str, Any]:
    """The response's fields for logits (V,): all, or the largest and the log-sum-exp of the rest.

    Args:
        logits: of the next token.
        text: gives a token's text by its id.
    """
    if len(logits) <= SMALL_VOCABULARY:
        return {"logits": logits.tolist()}
    order = np.argsort(-logits, kind="stable")
    best, others = order[:LIKELIEST], logits[order[LIKELIEST:]].astype(np.float64)
    largest = others.max()
    return {
        "top": [[int(i), float(logits[i]), text(int(i))] for i in best],
        "rest": float(largest + np.log(np.exp(others - largest).sum())),
    }
