"""POST /v1/completions: from what a request wants to its choices, whole or piece by piece."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mygpt.core.random import Stream, fresh_seed
from mygpt.engines.contract import Request
from mygpt.errors import InputError, UnknownTokenError
from mygpt.generation.writer import Writer
from mygpt.server.bodies import Bodies, json_pieces
from mygpt.server.problems import ApiError, json_answer
from mygpt.server.reading import Reader
from mygpt.server.requests import (
    CompletionRequest,
    Prompt,
    invalid,
    parse_completion,
    parse_json,
    too_long,
)
from mygpt.server.samples import Entry, Piece, Sample
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings
from mygpt.server.streaming import EventStream, while_connected
from mygpt.server.tickets import Ticket
from mygpt.tokenization import ByteTokenizer, CharTokenizer, ends_of
from mygpt.tokenization.unknown import without_unknown

_MOST_ENTRIES = 256  # of a prompt in one event of a stream
_PIECE = 2**14  # characters of a long prompt that are encoded at a time
_CHARACTERS_A_TOKEN = 16  # on average; four are usual
_CONTEXT = 64  # tokens of a prompt that decide how it ends
UNKNOWN_CHARACTERS = "unknown_characters"  # the code of an error, by which the page knows it
_MOST_ECHOES = 16  # of the largest prompt that a body holds, in one answer
_LARGE = 2048  # tokens of an answer that is made beside the event loop


@dataclass
class ReadPrompt:
    """A prompt.

    Attributes:
        text: as it is echoed.
        ids: (T,) as the model reads it.
        given: how many tokens at its beginning are none of the text's.
        left_out: what the tokenizer does not know, and was left out of the text.
        entries: log-probabilities of its tokens, where they are asked for.
    """

    text: str
    ids: NDArray[np.int64]
    given: int = 0
    left_out: list[str] = field(default_factory=list)
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
            prompt.ids,
            wanted.max_tokens,
            wanted.sampling,
            Stream(self.seed, number),
            wanted.overflow,
            ends_of(writer.tokenizer),
        )
        return Sample(
            number,
            request,
            prompt=prompt.text,
            tokenizer=writer.tokenizer,
            stop=wanted.stop,
            logprobs=wanted.logprobs,
            before=len(prompt.text) if wanted.echo else 0,
            given=prompt.given,
        )

    async def pieces(self, ticket: Ticket | None) -> AsyncIterator[list[Piece]]:
        """All pieces of all choices, those of the prompts first where they are echoed."""
        for sample in self.samples if self.wanted.echo else ():
            prompt = self.prompts[sample.number // self.wanted.n]
            yield [Piece(sample.number, prompt.text, prompt.entries[:_MOST_ENTRIES])]
            for start in range(_MOST_ENTRIES, len(prompt.entries), _MOST_ENTRIES):
                await asyncio.sleep(0)  # so that others get their turns
                entries = prompt.entries[start : start + _MOST_ENTRIES]
                yield [Piece(sample.number, entries=entries)]
            await asyncio.sleep(0)
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
        bodies: where large ones are read, and large answers made.
    """

    def __init__(
        self,
        writer: Writer,
        settings: ServerSettings,
        scheduler: Scheduler,
        reader: Reader,
        bodies: Bodies,
    ) -> None:
        self.writer, self.settings = writer, settings
        self.scheduler, self.reader, self.bodies = scheduler, reader, bodies

    async def answer(self, request: HttpRequest) -> Response:
        """One request's answer; `ApiError` where there is none."""
        wanted, prompts = await self.bodies.read(request, self._parse)
        if wanted.echo and wanted.logprobs is not None:
            await while_connected(request.receive, self._score(wanted, prompts))
        job = Job(wanted, prompts, self.writer)
        ticket = None
        if wanted.max_tokens:
            client = request.client.host if request.client else ""
            ticket = self.scheduler.submit(job.samples, client=client)

        def finish() -> None:
            if ticket is not None:
                self.scheduler.cancel(ticket)
            if wanted.logprobs is not None and len(job.samples) * wanted.max_tokens > _LARGE:
                self.bodies.tidy_soon()

        head, told = Head(self.settings.name, job.seed), wanted.logprobs is not None
        left_out = list(dict.fromkeys(part for prompt in prompts for part in prompt.left_out))
        if left_out:
            head.values["left_out"] = left_out
        if wanted.stream:
            return EventStream(_events(job, ticket, head), finish)
        try:
            pieces = await while_connected(request.receive, job.whole(ticket))
        finally:
            finish()

        def content() -> dict[str, Any]:
            choices = [choice_of(piece, told) for piece in pieces]
            return head.with_choices(choices, usage=job.usage())

        if wanted.echo or job.drawn > _LARGE:
            return await self.bodies.answer(request, lambda: json_pieces(content()))
        return json_answer(content())

    def _parse(self, body: bytes) -> tuple[CompletionRequest, list[ReadPrompt]]:
        """What a request wants, and its prompts' tokens."""
        wanted = parse_completion(parse_json(body), self.settings)
        prompts = [
            encode(self.writer, prompt, self.settings, "prompt", wanted.unknown)
            for prompt in wanted.prompts
        ]
        for given, prompt in zip(wanted.prompts, prompts, strict=True):
            if wanted.max_tokens and not isinstance(given, str):
                # A character that is unfinished there is the choice's.
                decoder = self.writer.tokenizer.decoder(after=prompt.ids[-_CONTEXT:].tolist())
                prompt.text = prompt.text.removesuffix(decoder.finish())
        echoed = wanted.n * sum(len(prompt.text) for prompt in prompts)
        most = _MOST_ECHOES * self.settings.max_body_bytes
        if wanted.echo and echoed > most:
            raise invalid(
                "echo",
                f"{echoed} characters of prompts are more than {most} in one answer: send fewer "
                "prompts, or a smaller n",
            )
        return wanted, prompts

    async def _score(self, wanted: CompletionRequest, prompts: Sequence[ReadPrompt]) -> None:
        """Compute the log-probabilities of the prompts' tokens."""
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
                self.reader.score, prompt.ids.tolist(), prompt.given, wanted.logprobs, refill
            )


def encode(
    writer: Writer, prompt: Prompt, settings: ServerSettings, param: str, unknown: str = "error"
) -> ReadPrompt:
    """A prompt's text and tokens; with "drop" without what the tokenizer does not know.

    Raises:
        ApiError: for characters or ids that the model does not know, or too many of them.
    """
    most = settings.max_prompt_tokens
    left_out: list[str] = []
    try:
        if isinstance(prompt, str) and unknown == "drop":
            if len(prompt) > most * _CHARACTERS_A_TOKEN:
                raise too_many_characters(param, prompt, most)
            prompt, left_out = without_unknown(writer.tokenizer, prompt)
        if isinstance(prompt, str):
            ids = _ids_of(writer, prompt, most, param)  # of an empty one, what a text starts from
            found = ReadPrompt(prompt, ids, len(writer.tokenizer.beginning) if prompt else len(ids))
        else:
            found = ReadPrompt(writer.tokenizer.decode(prompt), np.array(prompt, np.int64))
    except UnknownTokenError as error:
        message = f'{error}; "unknown": "drop" leaves them out'
        raise ApiError(400, message, param=param, code=UNKNOWN_CHARACTERS) from None
    except InputError as error:
        raise invalid(param, str(error)) from None
    if len(found.ids) > most:
        raise too_long(param, str(len(found.ids)), most)
    found.left_out = left_out
    return found


def too_many_characters(param: str, text: str, most: int) -> ApiError:
    """What is answered to a text that is not encoded, for it has too many characters."""
    return invalid(
        param,
        f"{param} has {len(text)} characters, more than {most * _CHARACTERS_A_TOKEN} for "
        f"{most} tokens: shorten it",
    )


def _ids_of(writer: Writer, text: str, most: int, param: str) -> NDArray[np.int64]:
    """The ids of a text, (T,); of one with too many it is not all encoded to find that out.

    A tokenizer of ours encodes piece by piece, and no further than it has to. Another one wants
    the whole text: of that, characters have a limit too.
    """
    if len(text) <= most:
        return np.array(writer.prompt_ids(text), np.int64)
    tokenizer = writer.tokenizer
    if isinstance(tokenizer, (CharTokenizer, ByteTokenizer)):
        raise too_long(param, str(len(text)), most)
    if len(text) > most * _CHARACTERS_A_TOKEN:
        raise too_many_characters(param, text, most)
    rows, count = [np.array(tokenizer.beginning, np.int64)], len(tokenizer.beginning)
    for row in tokenizer.encode_pieces(
        text[start : start + _PIECE] for start in range(0, len(text), _PIECE)
    ):
        rows.append(row)
        count += len(row)
        if count > most:
            raise too_long(param, f"at least {count}", most)
    return np.concatenate(rows)


async def _events(job: Job, ticket: Ticket | None, head: Head) -> AsyncIterator[list[Any]]:
    """A stream's objects: pieces, then the usage where it is asked for."""
    told = job.wanted.logprobs is not None
    more: dict[str, Any] = {"usage": None} if job.wanted.include_usage else {}
    async for pieces in job.pieces(ticket):
        yield [head.with_choices([choice_of(piece, told)], **more) for piece in pieces]
    if job.wanted.include_usage:
        yield [head.with_choices([], usage=job.usage())]
