"""The routes of the pages / and /write: their files, the next token's logits, attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
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
from mygpt.server.problems import ApiError, json_answer, to_json
from mygpt.server.prompts import EncodedPrompt, encode
from mygpt.server.requests import Ids, Text, convert, invalid, parse_object
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings
from mygpt.server.threads import Threads, while_connected
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


class NextToken:
    """A row that ends with the logits of the next token, without sampling text."""

    wants_logits = True

    def __init__(self, request: Request) -> None:
        self.request = request
        self.logits: NDArray[np.float32] | None = None

    @property
    def ended(self) -> bool:
        """Whether the logits have been computed."""
        return self.logits is not None

    def take(self, token_id: int, logits: NDArray[np.float32] | None) -> None:
        """Keep the logits."""
        assert logits is not None
        self.logits = logits.copy()  # (V,)

    def finish(self) -> None:
        """Do nothing: `take` was called."""

    def update(self) -> NDArray[np.float32] | None:
        """The logits (V,)."""
        return self.logits


@dataclass
class Playground:
    """The routes of the page."""

    writer: Writer
    settings: ServerSettings
    scheduler: Scheduler
    threads: Threads

    async def page(self, request: HttpRequest) -> Response:
        """GET /."""
        return _file("playground.html")

    async def writing(self, request: HttpRequest) -> Response:
        """GET /write."""
        return _file("write.html")

    async def file(self, request: HttpRequest) -> Response:
        """GET /static/NAME."""
        return _file(request.path_params["name"])

    async def model(self, request: HttpRequest) -> Response:
        """GET /api/model."""
        return json_answer(self._model)

    @cached_property
    def _model(self) -> bytes:
        config, tokenizer = self.writer.config, self.writer.tokenizer
        content = {
            "name": self.settings.name,
            "checkpoint": self.settings.checkpoint or self.settings.name,
            "parameters": config.num_parameters(),
            "shape": asdict(config),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.kind,
            "window": config.max_seq_len,
            "trained_length": self.writer.trained_length,
            "tour": self.settings.tour,
            "end_of_text": tokenizer.end_of_text,
            "ends": list(ends_of(tokenizer)),
        }
        if tokenizer.vocab_size <= SMALL_VOCABULARY:
            content["tokens"] = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)]
        return to_json(content)

    async def next(self, request: HttpRequest) -> Response:
        """POST /api/next: the next token's logits after a text or ids."""
        prompt = await self.threads.parse(request, self._prompt)
        row = NextToken(Request(prompt.ids, 1, SamplingConfig(temperature=0.0), Stream(0)))
        client = request.client.host if request.client else ""
        ticket = self.scheduler.submit([row], urgent=True, client=client)

        async def result() -> NDArray[np.float32]:
            (found,) = [update async for updates in ticket.updates() for update in updates]
            return found

        try:
            logits = await while_connected(request.receive, result())
        finally:
            self.scheduler.cancel(ticket)

        def content() -> dict[str, Any]:
            ids, text = prompt.ids.tolist(), self.writer.tokenizer.token_text
            left = {"text": prompt.text, "left_out": prompt.dropped} if prompt.dropped else {}
            return {
                **left,
                "ids": ids,
                "tokens": [{"id": i, "text": text(i)} for i in ids],
                "window_start": max(0, len(ids) - self.writer.config.max_seq_len),
                **logits_content(logits, text),
            }

        if len(prompt.ids) + len(logits) > _LARGE:
            return await self.threads.answer(request, content)
        return json_answer(content())

    async def attention(self, request: HttpRequest) -> Response:
        """POST /api/attention: the attention weights of the last positions.

        Row t of a head has the weights of positions 0 to t, which sum to 1.
        """
        config = self.writer.config
        ids = (await self.threads.parse(request, self._prompt)).ids.tolist()
        start = max(0, len(ids) - min(MOST_POSITIONS, config.max_seq_len))
        work = self.threads.forward.run(self.writer.read, ids[start:])
        weights = (await while_connected(request.receive, work)).weights  # (N, H, T, T)
        content = {"layers": config.num_layers, "heads": config.num_heads, "start": start}
        return await self.threads.answer(request, lambda: content | {"weights": weights})

    def _prompt(self, body: bytes) -> EncodedPrompt:
        """Encode a body's "text" or "ids"; an empty text gives the tokens that texts start from."""
        found = parse_object(body)
        kinds: dict[str, type[Text | Ids]] = {"text": Text, "ids": Ids}
        given = [name for name in kinds if found.get(name) is not None]
        if len(given) != 1:
            raise invalid(None, 'the body needs exactly one of "text" and "ids"')
        (name,) = given
        wanted = convert(found, kinds[name])
        most = self.settings.max_prompt_tokens
        return encode(self.writer, getattr(wanted, name), most, name, wanted.unknown)


def _file(name: str) -> Response:
    """A file of the folder, looked up in its listing: a path cannot lead to another folder."""
    files = {path.name: path for path in STATIC.glob("*") if path.suffix in TYPES}
    if name not in files:
        raise ApiError(404, f"there is no file /static/{name[:80]}", code="not_found")
    headers = {"Cache-Control": "no-cache", "Content-Type": TYPES[files[name].suffix]}
    return Response(files[name].read_bytes(), headers=headers)


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
