"""POST /v1/completions: encode the prompts, submit the rows, and send the choices or a stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mygpt.core.random import Stream
from mygpt.decode.completion import Completion, Row
from mygpt.decode.writer import Writer
from mygpt.engine import Request, fresh_seed
from mygpt.server.openapi import Choice, Usage
from mygpt.server.problems import json_answer
from mygpt.server.prompts import EncodedPrompt, Entry, encode, score
from mygpt.server.requests import (
    CompletionRequest,
    invalid,
    parse_completion,
    parse_object,
)
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings
from mygpt.server.threads import EventStream, Threads, while_connected
from mygpt.server.tickets import Ticket
from mygpt.tokenization import Tokenizer, ends_of

_MOST_ENTRIES = 256  # log-probabilities of a prompt in one event of a stream
_CONTEXT = 64  # last tokens of a prompt that are decoded to find an incomplete character
_MOST_ECHOES = 16  # a response echoes at most this many times the largest body
_LARGE = 2048  # tokens of a response that is built in a thread


@dataclass
class Piece:
    """A new piece of one choice's text.

    Attributes:
        number: the choice's number in its request.
        text: the new text that cannot change any more.
        entries: log-probabilities of its tokens, if requested.
        finish_reason: "stop" or "length" in the last piece, else None.
        tokens: in the last piece, the choice's number of generated tokens.
    """

    number: int
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    tokens: int = 0


class Sample:
    """One choice: turns its tokens into pieces of text.

    Args:
        request: the request to the engine; the number of its random stream is the choice's number.
        prompt: the prompt's text.
        tokenizer: the model's tokenizer.
        stop: strings that end the text.
        logprobs: how many alternatives to return for each token, or None.
        before: how many characters of the choice's text are the echoed prompt.
        added: how many tokens at the prompt's beginning are not of its text.
    """

    def __init__(
        self,
        request: Request,
        *,
        prompt: str,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        logprobs: int | None,
        before: int,
        added: int = 0,
    ) -> None:
        self.request, self.before, self.number = request, before, request.stream.index
        self.completion = Completion(prompt, seed=request.stream.seed, index=self.number)
        self.row = Row(tokenizer, self.completion, stop, logprobs, request.prompt[added:])
        self.wants_logits = logprobs is not None
        self._text = ""
        self._entries: list[Entry] = []

    @property
    def ended(self) -> bool:
        """Whether the choice has ended."""
        return self.row.ended

    def take(self, token_id: int, logits: NDArray[np.float32] | None) -> None:
        """Add a token, with the logits (V,) that it was sampled from if `wants_logits`."""
        offset = self.before + len(self.completion.text) + len(self.row.pending)
        self._text += self.row.push(token_id, logits)
        if self.completion.logprobs is not None:
            self._entries.append(Entry.of(self.completion.logprobs[-1], offset))
        if len(self.completion.token_ids) == self.request.max_new_tokens:
            self.finish()

    def finish(self) -> None:
        """End the choice: no more tokens are sampled."""
        self._text += self.row.finish(self.request.max_new_tokens)

    def update(self) -> Piece | None:
        """The new piece since the last call; None if there is nothing new."""
        reason = self.completion.finish_reason
        entries = self._released(reason)
        if not (self._text or entries or reason):
            return None
        piece = Piece(self.number, self._text, entries)
        if reason:
            piece.finish_reason = "stop" if reason in ("stop", "end") else "length"
            piece.tokens = len(self.completion.token_ids)
        self._text = ""
        return piece

    def _released(self, reason: str) -> list[Entry]:
        """Entries of tokens that begin in text that cannot change any more; at the end, all."""
        fixed = self.before + len(self.completion.text)
        if reason:
            for entry in self._entries:  # a stop string may have removed their text
                entry.offset = min(entry.offset, fixed)
            out, self._entries = self._entries, []
            return out
        out = [entry for entry in self._entries if entry.offset < fixed]
        self._entries = self._entries[len(out) :]
        return out


def choice_of(piece: Piece, with_logprobs: bool) -> Choice:
    """The API's object for a piece of a choice, or for all of a choice."""
    return {
        "index": piece.number,
        "text": piece.text,
        "logprobs": {
            "tokens": [entry.text for entry in piece.entries],
            "token_logprobs": [entry.logprob for entry in piece.entries],
            "top_logprobs": [entry.top for entry in piece.entries],
            "text_offset": [entry.offset for entry in piece.entries],
        }
        if with_logprobs
        else None,
        "finish_reason": piece.finish_reason,
    }


def merged(pieces: list[Piece]) -> list[Piece]:
    """Join the pieces of each choice."""
    groups: dict[int, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.number, []).append(piece)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups.values()]


def _joined(group: list[Piece]) -> Piece:
    last = group[-1]
    text = "".join(piece.text for piece in group)
    entries = [entry for piece in group for entry in piece.entries]
    return Piece(last.number, text, entries, last.finish_reason, last.tokens)


class Job:
    """One request in progress.

    Args:
        wanted: the parsed request.
        prompts: its prompts, encoded.
        writer: has the model's tokenizer.
        name: the model's id.
    """

    def __init__(
        self,
        wanted: CompletionRequest,
        prompts: Sequence[EncodedPrompt],
        writer: Writer,
        name: str,
    ) -> None:
        self.wanted, self.prompts, self.drawn = wanted, prompts, 0
        self.with_logprobs = wanted.logprobs is not None
        sampling = wanted.sampling
        seed = fresh_seed() if wanted.seed is None else wanted.seed
        self.samples: list[Sample] = []
        for prompt in prompts:
            for _ in range(wanted.n):
                request = Request(
                    prompt.ids,
                    wanted.max_tokens,
                    sampling,
                    Stream(seed, len(self.samples)),
                    wanted.overflow,
                    ends_of(writer.tokenizer),
                )
                self.samples.append(
                    Sample(
                        request,
                        prompt=prompt.text,
                        tokenizer=writer.tokenizer,
                        stop=wanted.stops,
                        logprobs=wanted.logprobs,
                        before=len(prompt.text) if wanted.echo else 0,
                        added=prompt.added,
                    )
                )
        # The fields that all objects of the response have in common.
        self.head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "seed": seed,
        }
        dropped = list(dict.fromkeys(part for prompt in prompts for part in prompt.dropped))
        if dropped:
            self.head["left_out"] = dropped

    @property
    def large(self) -> bool:
        """Whether the response may need so much memory that it should be freed afterwards."""
        return self.with_logprobs and len(self.samples) * self.wanted.max_tokens > _LARGE

    async def pieces(self, ticket: Ticket | None) -> AsyncIterator[list[Piece]]:
        """The pieces of all choices; echoed prompts come first."""
        for sample in self.samples if self.wanted.echo else ():
            prompt = self.prompts[sample.number // self.wanted.n]
            yield [Piece(sample.number, prompt.text, prompt.entries[:_MOST_ENTRIES])]
            for start in range(_MOST_ENTRIES, len(prompt.entries), _MOST_ENTRIES):
                await asyncio.sleep(0)  # let other requests run
                entries = prompt.entries[start : start + _MOST_ENTRIES]
                yield [Piece(sample.number, entries=entries)]
            await asyncio.sleep(0)
        if ticket is None:
            yield [Piece(sample.number, finish_reason="length") for sample in self.samples]
            return
        async for pieces in ticket.updates():
            self.drawn += sum(piece.tokens for piece in pieces)
            yield merged(pieces)

    async def collect(self, ticket: Ticket | None) -> list[Piece]:
        """Every choice as one piece."""
        found = [piece async for pieces in self.pieces(ticket) for piece in pieces]
        return sorted(merged(found), key=lambda piece: piece.number)

    def content(self, pieces: list[Piece]) -> dict[str, Any]:
        """The response with all choices."""
        choices = [choice_of(piece, self.with_logprobs) for piece in pieces]
        return self.head | {"choices": choices, "usage": self.usage()}

    async def events(self, ticket: Ticket | None) -> AsyncIterator[list[Any]]:
        """The objects of a stream: pieces, then the usage if requested."""
        more: dict[str, Any] = {"usage": None} if self.wanted.include_usage else {}
        async for pieces in self.pieces(ticket):
            yield [
                self.head | {"choices": [choice_of(piece, self.with_logprobs)]} | more
                for piece in pieces
            ]
        if self.wanted.include_usage:
            yield [self.content([])]

    def usage(self) -> Usage:
        """The numbers of prompt tokens and generated tokens."""
        read = sum(len(prompt.ids) for prompt in self.prompts)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.drawn,
            "total_tokens": read + self.drawn,
        }


@dataclass
class Completions:
    """The route POST /v1/completions."""

    writer: Writer
    settings: ServerSettings
    scheduler: Scheduler
    threads: Threads

    async def answer(self, request: HttpRequest) -> Response:
        """Respond to one request; `ApiError` if it is not valid, or cannot be done."""
        wanted, prompts = await self.threads.parse(request, self._parse)
        if wanted.echo and wanted.logprobs is not None:
            await while_connected(request.receive, self._score(wanted, prompts))
        job = Job(wanted, prompts, self.writer, self.settings.name)
        ticket = None
        if wanted.max_tokens:
            client = request.client.host if request.client else ""
            ticket = self.scheduler.submit(job.samples, client=client)

        def finish() -> None:
            if ticket is not None:
                self.scheduler.cancel(ticket)
            if job.large:
                self.threads.free_memory_soon()

        if wanted.stream:
            return EventStream(job.events(ticket), finish)
        try:
            pieces = await while_connected(request.receive, job.collect(ticket))
        finally:
            finish()
        if wanted.echo or job.drawn > _LARGE:
            return await self.threads.answer(request, lambda: job.content(pieces))
        return json_answer(job.content(pieces))

    def _parse(self, body: bytes) -> tuple[CompletionRequest, list[EncodedPrompt]]:
        """Parse a body and encode its prompts."""
        wanted = parse_completion(parse_object(body), self.settings)
        limit = self.settings.max_prompt_tokens
        prompts = [
            encode(self.writer, prompt, limit, "prompt", wanted.unknown)
            for prompt in wanted.prompts
        ]
        for given, prompt in zip(wanted.prompts, prompts, strict=True):
            if wanted.max_tokens and not isinstance(given, str):
                # An incomplete character at a prompt's end belongs to the choice's text.
                decoder = self.writer.tokenizer.decoder(after=prompt.ids[-_CONTEXT:].tolist())
                prompt.text = prompt.text.removesuffix(decoder.finish())
        echoed = wanted.n * sum(len(prompt.text) for prompt in prompts)
        most = _MOST_ECHOES * self.settings.max_body_bytes
        if wanted.echo and echoed > most:
            raise invalid(
                "echo",
                f"{echoed} echoed characters of prompts are more than {most}, the limit for one "
                "response: send fewer prompts, or a smaller n",
            )
        return wanted, prompts

    async def _score(self, wanted: CompletionRequest, prompts: Sequence[EncodedPrompt]) -> None:
        """Compute the log-probabilities of the prompts' tokens."""
        most = self.settings.max_prompt_tokens
        count = wanted.n * sum(len(prompt.ids) for prompt in prompts)
        if count > most:
            raise invalid(
                "prompt",
                f"log-probabilities of {count} prompt tokens are more than {most}, the limit for "
                "one response: send fewer prompts at once",
            )
        thread, refill = self.threads.forward, wanted.overflow == "refill"
        for prompt in prompts:
            prompt.entries = await thread.run(
                score, self.writer, prompt, wanted.logprobs, refill, thread.check_cancelled
            )
