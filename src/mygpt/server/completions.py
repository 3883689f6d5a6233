"""POST /v1/completions: from what a request wants to its choices, whole or piece by piece."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mygpt.engines.contract import Request
from mygpt.errors import InputError
from mygpt.generation.writer import Writer
from mygpt.randomness import Stream, fresh_seed
from mygpt.server.problems import json_answer
from mygpt.server.reading import Reader
from mygpt.server.requests import CompletionRequest, Prompt, invalid, parse_completion, read_json
from mygpt.server.samples import Entry, Piece, Sample
from mygpt.server.scheduler import Scheduler, Ticket
from mygpt.server.settings import ServerSettings
from mygpt.server.streaming import ClientGone, EventStream, while_connected

_LONG = 10_000  # characters whose tokens are looked for beside the event loop


@dataclass
class ReadPrompt:
    """A prompt.

    Attributes:
        text: as it is echoed.
        ids: as the model reads it.
        given: how many tokens at its beginning are none of the text's.
        entries: log-probabilities of its tokens, where they are asked for.
    """

    text: str
    ids: list[int]
    given: int = 0
    entries: list[Entry] = field(default_factory=list)


class Head:
    """What all parts of one answer say alike."""

    def __init__(self, model: str, seed: int) -> None:
        self.values = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "seed": seed,
        }

    def with_choices(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object of the answer."""
        return self.values | {"choices": choices} | more


def choice_of(piece: Piece, told: bool) -> dict[str, Any]:
    """A piece, or a whole choice, as the API has it; `told` says whether with logprobs."""
    logprobs = None
    if told:
        logprobs = {
            "tokens": [entry.text for entry in piece.entries],
            "token_logprobs": [entry.logprob for entry in piece.entries],
            "top_logprobs": [entry.top for entry in piece.entries],
            "text_offset": [entry.offset for entry in piece.entries],
        }
    return {
        "index": piece.number,
        "text": piece.text,
        "logprobs": logprobs,
        "finish_reason": piece.finish_reason,
    }


def merged(pieces: list[Piece]) -> list[Piece]:
    """One piece for each choice, of all that came while the last ones were being sent."""
    first: dict[int, Piece] = {}
    for piece in pieces:
        grown = first.setdefault(piece.number, piece)
        if grown is not piece:
            grown.text += piece.text
            grown.entries += piece.entries
            grown.finish_reason, grown.tokens = piece.finish_reason, piece.tokens
    return list(first.values())


class Job:
    """One request on its way.

    Args:
        wanted: what it asks for.
        prompts: its prompts, read.
        writer: the model's tokenizer and window.
    """

    def __init__(
        self, wanted: CompletionRequest, prompts: Sequence[ReadPrompt], writer: Writer
    ) -> None:
        self.wanted, self.prompts = wanted, prompts
        self.seed = fresh_seed() if wanted.seed is None else wanted.seed
        self.samples = [
            self._sample(number * wanted.n + copy, prompt, writer)
            for number, prompt in enumerate(prompts)
            for copy in range(wanted.n)
        ]
        self.drawn = 0

    def _sample(self, number: int, prompt: ReadPrompt, writer: Writer) -> Sample:
        wanted = self.wanted
        request = Request(
            np.array(prompt.ids, np.int64),
            wanted.max_tokens,
            wanted.sampling,
            Stream(self.seed, number),
            wanted.overflow,
            writer.tokenizer.end_of_text,
        )
        return Sample(
            number,
            request,
            prompt=prompt.text,
            tokenizer=writer.tokenizer,
            stop=wanted.stop,
            logprobs=wanted.logprobs,
            before=len(prompt.text) if wanted.echo else 0,
        )

    async def pieces(self, ticket: Ticket | None) -> AsyncIterator[list[Piece]]:
        """All pieces of all choices, those of the prompts first where they are echoed."""
        if self.wanted.echo:
            yield [
                Piece(sample.number, prompt.text, prompt.entries)
                for sample in self.samples
                for prompt in [self.prompts[sample.number // self.wanted.n]]
            ]
        if ticket is None:
            yield [Piece(sample.number, finish_reason="length") for sample in self.samples]
            return
        async for pieces in ticket.news():
            self.drawn += sum(piece.tokens for piece in pieces)
            yield merged(pieces)

    async def whole(self, ticket: Ticket | None) -> list[Piece]:
        """Every choice as one piece."""
        found = [Piece(sample.number) for sample in self.samples]
        texts: list[list[str]] = [[] for _ in found]
        async for pieces in self.pieces(ticket):
            for piece in pieces:
                texts[piece.number].append(piece.text)
                found[piece.number].entries += piece.entries
                found[piece.number].finish_reason = piece.finish_reason
        for piece, parts in zip(found, texts, strict=True):
            piece.text = "".join(parts)
        return found

    def usage(self) -> dict[str, int]:
        """How many tokens were read and drawn."""
        read = sum(len(prompt.ids) for prompt in self.prompts)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.drawn,
            "total_tokens": read + self.drawn,
        }


class Completions:
    """The route.

    Args:
        writer: the model and its tokenizer.
        settings: what is allowed.
        scheduler: where rows decode.
        reader: where prompts are looked at.
    """

    def __init__(
        self, writer: Writer, settings: ServerSettings, scheduler: Scheduler, reader: Reader
    ) -> None:
        self.writer, self.settings = writer, settings
        self.scheduler, self.reader = scheduler, reader

    async def answer(self, request: HttpRequest) -> Response:
        """One request's answer; `ApiError` where there is none."""
        wanted = parse_completion(await read_json(request), self.settings)
        try:
            prompts = await while_connected(request.receive, self._read(wanted))
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        job = Job(wanted, prompts, self.writer)
        ticket = self.scheduler.submit(job.samples) if wanted.max_tokens else None

        def finish() -> None:
            if ticket is not None:
                self.scheduler.cancel(ticket)

        head, told = Head(self.settings.name, job.seed), wanted.logprobs is not None
        if wanted.stream:
            return EventStream(_events(job, ticket, head), finish)
        try:
            choices = await while_connected(request.receive, job.whole(ticket))
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        finally:
            finish()
        return json_answer(
            head.with_choices([choice_of(piece, told) for piece in choices], usage=job.usage())
        )

    async def _read(self, wanted: CompletionRequest) -> list[ReadPrompt]:
        """The prompts' tokens, and their log-probabilities where they are to be told."""
        if sum(len(prompt) for prompt in wanted.prompts) > _LONG:
            prompts = await asyncio.to_thread(self._encode_all, wanted.prompts)
        else:
            prompts = self._encode_all(wanted.prompts)
        if wanted.echo and wanted.logprobs is not None:
            refill, most = wanted.overflow == "refill", self.settings.max_prompt_tokens
            told = wanted.n * sum(len(prompt.ids) for prompt in prompts)
            if told > most:
                raise invalid(
                    "prompt",
                    f"log-probabilities of {told} prompt tokens are more than {most} in one "
                    "answer: send fewer prompts at once",
                )
            for prompt in prompts:
                prompt.entries = await self.reader.run(
                    self.reader.score, prompt.ids, prompt.given, wanted.logprobs, refill
                )
        return prompts

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[ReadPrompt]:
        return [encode(self.writer, prompt, self.settings, "prompt") for prompt in prompts]


def encode(writer: Writer, prompt: Prompt, settings: ServerSettings, param: str) -> ReadPrompt:
    """A prompt's text and tokens.

    Raises:
        ApiError: for characters or ids that the model does not know, or too many of them.
    """
    try:
        if isinstance(prompt, str):
            ids = writer.prompt_ids(prompt)  # of an empty one, what the model starts from
            found = ReadPrompt(prompt, ids, len(writer.tokenizer.beginning) if prompt else len(ids))
        else:
            found = ReadPrompt(writer.tokenizer.decode(prompt), list(prompt))
    except InputError as error:
        raise invalid(param, str(error)) from None
    most = settings.max_prompt_tokens
    if len(found.ids) > most:
        raise invalid(param, f"{param} has {len(found.ids)} tokens, more than {most}: shorten it")
    return found


async def _events(job: Job, ticket: Ticket | None, head: Head) -> AsyncIterator[list[Any]]:
    """A stream's objects: pieces, then the usage where it is asked for."""
    told = job.wanted.logprobs is not None
    more: dict[str, Any] = {"usage": None} if job.wanted.include_usage else {}
    async for pieces in job.pieces(ticket):
        yield [head.with_choices([choice_of(piece, told)], **more) for piece in pieces]
    if job.wanted.include_usage:
        yield [head.with_choices([], usage=job.usage())]
