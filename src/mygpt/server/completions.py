"""POST /v1/completions: encode the prompts, submit the rows, and send the choices or a stream."""

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

from mygpt.core.random import Stream
from mygpt.decode.writer import Writer
from mygpt.engine import Request, fresh_seed
from mygpt.errors import InputError, UnknownTokenError
from mygpt.server.bodies import Bodies, json_pieces
from mygpt.server.fields import invalid, parse_json
from mygpt.server.problems import ApiError, json_answer
from mygpt.server.reading import Reader
from mygpt.server.requests import CompletionRequest, Prompt, parse_completion, too_long
from mygpt.server.samples import Entry, Piece, Sample
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings
from mygpt.server.streaming import EventStream, while_connected
from mygpt.server.tickets import Ticket
from mygpt.tokenization import ByteTokenizer, CharTokenizer, ends_of
from mygpt.tokenization.unknown import without_unknown

_MOST_ENTRIES = 256  # log-probabilities of a prompt in one event of a stream
_PIECE = 2**14  # characters of a long prompt that are encoded at a time
_CHARACTERS_PER_TOKEN = 16  # limit on a prompt's average; four are usual
_CONTEXT = 64  # last tokens of a prompt that are decoded to find an incomplete character
UNKNOWN_CHARACTERS = "unknown_characters"  # an error code that the page checks
_MOST_ECHOES = 16  # a response echoes at most this many times the largest body
_LARGE = 2048  # tokens of a response that is built in a thread


@dataclass
class EncodedPrompt:
    """A prompt and its tokens.

    Attributes:
        text: as it is echoed.
        ids: (T,) the model's input.
        added: how many tokens at the beginning were added, and are not of the text.
        dropped: parts of the text that the tokenizer does not know, and that were dropped.
        entries: log-probabilities of its tokens, if requested.
    """

    text: str
    ids: NDArray[np.int64]
    added: int = 0
    dropped: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


class Head:
    """The fields that all objects of one response have in common."""

    def __init__(self, model: str, seed: int) -> None:
        self.values = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "seed": seed,
        }

    def with_choices(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object of the response."""
        return self.values | {"choices": choices} | more


def choice_of(piece: Piece, with_logprobs: bool) -> dict[str, Any]:
    """The API's object for a piece of a choice, or for a whole choice."""
    logprobs = None
    if with_logprobs:
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
    """Join the pieces of each choice that arrived while earlier ones were being sent."""
    first: dict[int, Piece] = {}
    for piece in pieces:
        joined = first.setdefault(piece.number, piece)
        if joined is not piece:
            joined.text += piece.text
            joined.entries += piece.entries
            joined.finish_reason, joined.tokens = piece.finish_reason, piece.tokens
    return list(first.values())


class Job:
    """One request in progress.

    Args:
        wanted: the parsed request.
        prompts: its prompts, encoded.
        writer: has the model's tokenizer and window.
    """

    def __init__(
        self, wanted: CompletionRequest, prompts: Sequence[EncodedPrompt], writer: Writer
    ) -> None:
        self.wanted, self.prompts = wanted, prompts
        self.seed = fresh_seed() if wanted.seed is None else wanted.seed
        self.samples = [
            self._sample(number * wanted.n + copy, prompt, writer)
            for number, prompt in enumerate(prompts)
            for copy in range(wanted.n)
        ]
        self.drawn = 0

    def _sample(self, number: int, prompt: EncodedPrompt, writer: Writer) -> Sample:
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
            added=prompt.added,
        )

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
        """The numbers of prompt tokens and generated tokens."""
        read = sum(len(prompt.ids) for prompt in self.prompts)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.drawn,
            "total_tokens": read + self.drawn,
        }


class Completions:
    """The route POST /v1/completions.

    Args:
        writer: the model and its tokenizer.
        settings: the server's limits.
        scheduler: decodes the rows.
        reader: computes the log-probabilities of prompts.
        bodies: parses large bodies and builds large responses.
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
        """Respond to one request; `ApiError` if it is not valid, or cannot be done."""
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
                self.bodies.free_memory_soon()

        head, with_logprobs = Head(self.settings.name, job.seed), wanted.logprobs is not None
        dropped = list(dict.fromkeys(part for prompt in prompts for part in prompt.dropped))
        if dropped:
            head.values["left_out"] = dropped
        if wanted.stream:
            return EventStream(_events(job, ticket, head), finish)
        try:
            pieces = await while_connected(request.receive, job.collect(ticket))
        finally:
            finish()

        def content() -> dict[str, Any]:
            choices = [choice_of(piece, with_logprobs) for piece in pieces]
            return head.with_choices(choices, usage=job.usage())

        if wanted.echo or job.drawn > _LARGE:
            return await self.bodies.answer(request, lambda: json_pieces(content()))
        return json_answer(content())

    def _parse(self, body: bytes) -> tuple[CompletionRequest, list[EncodedPrompt]]:
        """Parse a body and encode its prompts."""
        wanted = parse_completion(parse_json(body), self.settings)
        prompts = [
            encode(self.writer, prompt, self.settings, "prompt", wanted.unknown)
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
        refill, most = wanted.overflow == "refill", self.settings.max_prompt_tokens
        count = wanted.n * sum(len(prompt.ids) for prompt in prompts)
        if count > most:
            raise invalid(
                "prompt",
                f"log-probabilities of {count} prompt tokens are more than {most}, the limit for "
                "one response: send fewer prompts at once",
            )
        for prompt in prompts:
            prompt.entries = await self.reader.run(
                self.reader.score, prompt.ids.tolist(), prompt.added, wanted.logprobs, refill
            )


def encode(
    writer: Writer, prompt: Prompt, settings: ServerSettings, param: str, unknown: str = "error"
) -> EncodedPrompt:
    """Encode a prompt; with unknown="drop", parts that the tokenizer does not know are dropped.

    Args:
        writer: the model and its tokenizer.
        prompt: a text, or token ids.
        settings: the server's limits.
        param: the field's name, for messages.
        unknown: "error" or "drop".

    Raises:
        ApiError: for characters or ids that the model does not know, or too many of them.
    """
    most = settings.max_prompt_tokens
    dropped: list[str] = []
    try:
        if isinstance(prompt, str) and unknown == "drop":
            if len(prompt) > most * _CHARACTERS_PER_TOKEN:
                raise too_many_characters(param, prompt, most)
            prompt, dropped = without_unknown(writer.tokenizer, prompt)
        if isinstance(prompt, str):
            # An empty text is encoded to the tokens that generation without a prompt starts from.
            ids = _ids_of(writer, prompt, most, param)
            added = len(writer.tokenizer.beginning) if prompt else len(ids)
            found = EncodedPrompt(prompt, ids, added)
        else:
            found = EncodedPrompt(writer.tokenizer.decode(prompt), np.array(prompt, np.int64))
    except UnknownTokenError as error:
        message = f'{error}; send "unknown": "drop" to drop them'
        raise ApiError(400, message, param=param, code=UNKNOWN_CHARACTERS) from None
    except InputError as error:
        raise invalid(param, str(error)) from None
    if len(found.ids) > most:
        raise too_long(param, str(len(found.ids)), most)
    found.dropped = dropped
    return found


def too_many_characters(param: str, text: str, most: int) -> ApiError:
    """The error for a text that has too many characters to be encoded at all."""
    return invalid(
        param,
        f"{param} has {len(text)} characters, more than the {most * _CHARACTERS_PER_TOKEN} that "
        f"{most} tokens can have: shorten it",
    )


def _ids_of(writer: Writer, text: str, most: int, param: str) -> NDArray[np.int64]:
    """The ids (T,) of a text. A text with too many tokens is not encoded to its end.

    mygpt's tokenizers encode in pieces, so that encoding stops at the limit. An imported one needs
    the whole text, so the number of characters is limited, too.
    """
    if len(text) <= most:
        return np.array(writer.prompt_ids(text), np.int64)
    tokenizer = writer.tokenizer
    if isinstance(tokenizer, (CharTokenizer, ByteTokenizer)):
        raise too_long(param, str(len(text)), most)
    if len(text) > most * _CHARACTERS_PER_TOKEN:
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
    """The objects of a stream: pieces, then the usage if requested."""
    with_logprobs = job.wanted.logprobs is not None
    more: dict[str, Any] = {"usage": None} if job.wanted.include_usage else {}
    async for pieces in job.pieces(ticket):
        yield [head.with_choices([choice_of(piece, with_logprobs)], **more) for piece in pieces]
    if job.wanted.include_usage:
        yield [head.with_choices([], usage=job.usage())]
