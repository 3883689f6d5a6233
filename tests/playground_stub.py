"""A small stub of the server's API for the playground's tests, with made-up models.

A model's logits depend only on the last two ids, so a test can compute every bar.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from mygpt.server.playground import SMALL_VOCABULARY, STATIC, TYPES, logits_content
from mygpt.server.problems import SAFE_HEADERS
from reference import INF

WINDOW = 8


class UnknownError(ValueError):
    """A text has characters that are not in the vocabulary."""


class MadeUp:
    """A model of a few tokens: its logits are `fixed`, or random functions of the last two ids."""

    def __init__(
        self,
        texts: list[str],
        name: str = "stub",
        fixed: list | None = None,
        *,
        tour: bool = False,
        trained: int | None = None,
    ) -> None:
        self.texts, self.name, self.window, self.fixed = texts, name, WINDOW, fixed
        self.ends: list[int] = []  # ids after which a text ends
        self.tour, self.trained = tour, trained

    def encode(self, text: str) -> list[int]:
        ids = {text: n for n, text in enumerate(self.texts)}
        unknown = sorted(set(text) - set(ids))
        if unknown:
            words = f"unknown character {unknown[0]!r}: the model never saw it"
            raise UnknownError(f'{words}; send "unknown": "drop" to drop them')
        return [ids[char] for char in text] or [0]

    def logits(self, ids: list[int]) -> list[float]:
        if self.fixed is not None:
            return self.fixed
        rng = np.random.default_rng([*ids[-2:], len(self.texts)])
        return np.round(rng.normal(0, 2, len(self.texts)), 3).tolist()

    def attention(self, ids: list[int]) -> list:
        rows = [[1 / (y + 1) if x <= y else 0.0 for x in range(len(ids))] for y in range(len(ids))]
        return [[rows, rows], [rows, rows]]

    def choices(self, asked: dict) -> list[list[str]]:
        """Pieces of the continuations of POST /v1/completions: the texts, from another one each."""
        count = len(self.texts) if asked["max_tokens"] == -1 else asked["max_tokens"]
        start = asked["seed"] % len(self.texts)
        every = [*self.texts[start:], *self.texts[:start]]
        return [(every[i:] + every[:i])[:count] for i in range(asked["n"])]

    def inside(self, ids: list[int], asked: dict) -> dict:
        """A response of POST /api/inside, with the model's texts in each of its fields."""
        tokens = [{"id": i, "text": text} for i, text in enumerate(self.texts)]
        row = {"probability": 0.25, "rank": 1}
        last = len(ids) - 1
        top = [[i, text, 0.1] for i, text in enumerate(self.texts[:5])]
        found = {
            "start": 0, "position": last if asked["position"] is None else asked["position"],
            "token": tokens[-1], "names": [[["previous token", 0.75], ["induction", 0.25]]] * 2,
            "lens": [row | {"name": name, "top": top} for name in ("embedding", "block1")],
            "contributions": [["1.1", 1.5], ["mlp1", -0.5]], "logit": 1.0, "total": 1.0,
            "attention": self.attention(ids[-self.window :]), "loss": 2.0, "continuation": tokens,
        }  # fmt: skip
        if asked.get("ablate"):
            after = [[i, text, 0.1, 0.2] for i, text in enumerate(self.texts[:5])]
            change = {"loss": 2.5, "next": after, "others": [1, 0.5, 0.0]}
            found["ablation"] = change | {"parts": asked["ablate"], "continuation": tokens}
        return found


class Handler(BaseHTTPRequestHandler):
    """The playground's files and its API."""

    server: Stub

    def do_GET(self) -> None:
        if self.path == "/api/model":
            model = self.server.model
            facts = {
                "name": model.name, "checkpoint": "runs/stub", "parameters": 1234, "shape": {},
                "window": model.window, "vocab_size": len(model.texts), "tokenizer": "char",
                "ends": model.ends, "end_of_text": model.ends[0] if model.ends else None,
                "tour": model.tour, "trained_length": model.trained,
            }  # fmt: skip
            if len(model.texts) <= SMALL_VOCABULARY:
                facts["tokens"] = model.texts
            self.answer(200, facts)
            return
        pages = {"/": "playground.html", "/write": "write.html"}
        name = pages.get(self.path) or self.path.removeprefix("/static/")
        path = STATIC / name
        if not path.is_file():
            self.answer(404, {"error": {"message": "no such page"}})
            return
        self.reply(200, path.read_bytes(), TYPES[path.suffix])

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = self.server.model
        if self.path == "/v1/completions":
            asked["text"] = asked["prompt"]
        left = []
        if asked.get("unknown") == "drop":
            left = sorted(set(asked["text"]) - set(model.texts))
            asked["text"] = "".join(c for c in asked["text"] if c in model.texts)
        try:
            ids = asked["ids"] if "ids" in asked else model.encode(asked["text"])
        except UnknownError as error:
            self.answer(400, {"error": {"message": str(error), "code": "unknown_characters"}})
            return
        if self.path == "/v1/completions":
            self.stream(model.choices(asked))
            return
        if self.path == "/api/attention":
            shown = ids[-model.window :]
            start = len(ids) - len(shown)
            weights = model.attention(shown)
            self.answer(200, {"layers": 2, "heads": 2, "start": start, "weights": weights})
            return
        if self.path == "/api/inside":
            self.answer(200, model.inside(ids, asked))
            return
        tokens = [{"id": i, "text": model.texts[i]} for i in ids]
        start = max(0, len(ids) - model.window)
        answer = {"ids": ids, "tokens": tokens, "window_start": start}
        if left:
            answer |= {"text": asked["text"], "left_out": left}
        self.answer(200, answer | listed_logits(model, model.logits(ids)))

    def stream(self, choices: list[list[str]]) -> None:
        """Send the pieces one by one, at the server's pace; without an end if it fails."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with contextlib.suppress(OSError):  # the page has stopped it
            for number, pieces in enumerate(zip(*choices, strict=True)):
                if number == self.server.fails_after:
                    return
                for index, text in enumerate(pieces):
                    event = {"choices": [{"index": index, "text": text}]}
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                time.sleep(self.server.pause_s)
                self.server.pieces_sent = number + 1
            self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, status: int, values: dict) -> None:
        key = self.server.key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            status, values = 401, {"error": {"message": "the key is missing or wrong"}}
        self.reply(status, json.dumps(values).encode(), TYPES[".json"])

    def reply(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for header in SAFE_HEADERS.items() if self.server.strict else ():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def listed_logits(model: MadeUp, logits: list) -> dict:
    """As the server's, except that minus infinity is null."""
    found = logits_content(np.array(logits), model.texts.__getitem__)
    if "logits" in found:
        found["logits"] = [None if x == -INF else x for x in found["logits"]]
    return found


class Stub(ThreadingHTTPServer):
    """The server; with `key` it asks for that, with `strict` it sends the security policy."""

    daemon_threads = True
    pause_s = 0.0  # between the pieces of a continuation
    fails_after: int | None = None  # pieces, after which the connection is closed
    pieces_sent = 0

    def __init__(self, model: MadeUp, port: int = 0, key: str = "", strict: bool = True) -> None:
        self.model, self.key, self.strict = model, key, strict
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()
