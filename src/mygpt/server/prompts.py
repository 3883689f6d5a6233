"""Prompts: encoded within limits, and the log-probabilities of their tokens.

Letters: T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from mygpt.core.window import Window
from mygpt.decode.completion import Completion, Row, TokenLogprob
from mygpt.decode.writer import Writer
from mygpt.errors import InputError, UnknownTokenError
from mygpt.server.problems import ApiError
from mygpt.server.requests import Prompt, UnknownPolicy, invalid
from mygpt.tokenization.unknown import without_unknown

_PIECE = 2**14  # characters of a long prompt that are encoded at a time
_CHARACTERS_PER_TOKEN = 16  # limit on a prompt's average; four are usual
UNKNOWN_CHARACTERS = "unknown_characters"  # an error code that the page checks


@dataclass
class Entry:
    """One token's log-probability, in the API's form.

    Attributes:
        text: the token as text; for a control token its name.
        logprob: in nats; None for the first token of a text.
        top: log-probabilities of the most probable tokens and of this one, or None. If several
            tokens have the same text, this one, or else the most probable, has the text as its
            key; the others have "token_id:" and their id.
        offset: the token's position in the choice's text, in characters; at most its length.
    """

    text: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int

    @classmethod
    def of(cls, token: TokenLogprob, offset: int) -> Entry:
        """The entry of a token at `offset`."""
        top: dict[str, float] = {}
        for number, (text, logprob) in zip(token.top_ids, token.top, strict=True):
            taken = number != token.id and (text in top or text == token.text)
            top[f"token_id:{number}" if taken else text] = logprob
        top.setdefault(token.text, token.logprob)
        return cls(token.text, token.logprob, top, offset)


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


def encode(
    writer: Writer, prompt: Prompt, most: int, param: str, unknown: UnknownPolicy = "error"
) -> EncodedPrompt:
    """Encode a prompt.

    Args:
        writer: the model and its tokenizer.
        prompt: a text, or token ids.
        most: the limit on its tokens.
        param: the field's name, for messages.
        unknown: whether parts that the tokenizer does not know are an error, or are dropped.

    Raises:
        ApiError: for characters or ids that the model does not know, or too many of them.
    """
    if isinstance(prompt, str) and len(prompt) > most * _CHARACTERS_PER_TOKEN:
        raise invalid(
            param,
            f"{param} has {len(prompt)} characters, more than the {most * _CHARACTERS_PER_TOKEN} "
            f"that {most} tokens can have: shorten it",
        )
    if not isinstance(prompt, str) and len(prompt) > most:
        raise _too_long(param, len(prompt), most)
    dropped: list[str] = []
    try:
        if not isinstance(prompt, str):
            return EncodedPrompt(writer.tokenizer.decode(prompt), np.array(prompt, np.int64))
        if unknown == "drop":
            prompt, dropped = without_unknown(writer.tokenizer, prompt)
        ids = _ids_of(writer, prompt, most)
    except UnknownTokenError as error:
        message = f'{error}; send "unknown": "drop" to drop them'
        raise ApiError(400, message, param=param, code=UNKNOWN_CHARACTERS) from None
    except InputError as error:
        raise invalid(param, str(error)) from None
    if len(ids) > most:
        raise _too_long(param, len(ids), most)
    # An empty text is encoded to the tokens that generation without a prompt starts from.
    added = len(writer.tokenizer.beginning) if prompt else len(ids)
    return EncodedPrompt(prompt, ids, added, dropped)


def _too_long(param: str, count: int, most: int) -> ApiError:
    return invalid(
        param, f"{param} has at least {count} tokens, more than the limit of {most}: shorten it"
    )


def _ids_of(writer: Writer, text: str, most: int) -> NDArray[np.int64]:
    """The ids (T,) of a text. A text with too many tokens is not encoded to its end."""
    if len(text) <= most:
        return np.array(writer.prompt_ids(text), np.int64)
    tokenizer = writer.tokenizer
    rows, count = [np.array(tokenizer.beginning, np.int64)], len(tokenizer.beginning)
    pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    for row in tokenizer.encode_pieces(pieces):
        rows.append(row)
        count += len(row)
        if count > most:
            break
    return np.concatenate(rows)


def score(
    writer: Writer,
    prompt: EncodedPrompt,
    top: int,
    refill: bool,
    check_cancelled: Callable[[], None],
) -> list[Entry]:
    """Each token's log-probability given the tokens before it, by full forward passes.

    Args:
        writer: the model and its tokenizer.
        prompt: the prompt, at least one token.
        top: how many alternatives to return for each token.
        refill: past the window, whether to continue from its newer half (see `Window`).
        check_cancelled: raises if the result is not needed any more.

    Raises:
        ApiError: if the prompt is longer than the window and `refill` is False.
    """
    ids, window = prompt.ids.tolist(), writer.config.max_seq_len
    if len(ids) > window + 1 and not refill:
        raise invalid(
            "prompt",
            f"a prompt of {len(ids)} tokens is longer than the window of {window}, so it has no "
            'log-probabilities: shorten it, or send "overflow": "refill"',
        )
    entries = [Entry(writer.tokenizer.token_text(ids[0]), None, None, 0)]
    for start, group in groupby(range(1, len(ids)), key=Window(window, "refill").start):
        check_cancelled()
        positions = list(group)
        logits = writer.read(ids[start : positions[-1]], shown=1).logits  # (T, V)
        for position in positions:
            check_cancelled()
            entries.append(_entry(writer, ids[position], logits[position - start - 1], top))
    _set_offsets(writer, ids[prompt.added :], entries[prompt.added :])
    return entries


def _entry(writer: Writer, token: int, logits: NDArray[np.float32], top: int) -> Entry:
    row = Row(writer.tokenizer, Completion(""), (), top)
    row.push(token, logits)
    assert row.completion.logprobs is not None
    return Entry.of(row.completion.logprobs[0], 0)


def _set_offsets(writer: Writer, ids: Sequence[int], entries: Sequence[Entry]) -> None:
    offset, decoder = 0, writer.tokenizer.decoder()
    for token, entry in zip(ids, entries, strict=True):
        entry.offset = offset
        offset += len(decoder.push(token))
