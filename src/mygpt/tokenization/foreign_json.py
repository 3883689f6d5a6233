"""What a `tokenizer.json` of any kind holds, and the library's tokenizer that is built of it.

The file may come from anybody. The library reads it; what is looked at here are the ids' names,
which of them are control tokens, and that no text spells one of those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mygpt.errors import InputError
from mygpt.tokenization.tokenizer_json import build

if TYPE_CHECKING:
    import tokenizers

_BEYOND = "\uffff" * 8  # begins the names of control tokens where the library looks for text


class Parts(NamedTuple):
    """What a `tokenizer.json` holds.

    Attributes:
        names: the token of each id, added ones included.
        control: ids that text must not become: special tokens and the end of text, but not the
            token of unknown characters.
        unknown: the token that characters become which the tokenizer does not know.
        steps: the decoder's steps one after another; None where there is no decoder.
        library: the library's tokenizer, in which no text spells a control token, unless that is
            a single character.
    """

    names: dict[int, str]
    control: frozenset[int]
    unknown: str | None
    steps: list[dict[str, Any]] | None
    library: tokenizers.Tokenizer


def parts_of(
    description: dict[str, Any], end_of_text: int | None = None, other_ends: Sequence[int] = ()
) -> Parts:
    """Read a `tokenizer.json`.

    Args:
        description: the JSON object it is.
        end_of_text: an id that is a control token, whether the file says so or not.
        other_ends: ids likewise; some may have no token.

    Raises:
        InputError: where the library does not take it, it is not whole, or ids are not clear.
    """
    try:
        names = _names(description)
        if end_of_text is not None and (type(end_of_text) is not int or end_of_text not in names):
            raise InputError(f"end_of_text={end_of_text!r} is no id of this tokenizer")
        model = description["model"]
        description = _with_plain_bytes(description)
        if model.get("dropout"):
            raise InputError("a tokenizer with dropout encodes at random: set it to null")
        unknown = _unknown(model)
        control = {i for i in special_ids(description) if names[i] != unknown}
        control |= set() if end_of_text is None else {end_of_text}
        control |= {number for number in other_ends if number in names}
        library = _library(description, {names[i] for i in control})
        # As the library understood it: it takes old and odd ways of writing a decoder too.
        decoder = library.decoder
        steps = None if decoder is None else _steps(json.loads(decoder.__getstate__()))
        return Parts(names, frozenset(control), unknown, steps, library)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the tokenizer's JSON is not whole ({type(error).__name__}: {str(error)[:80]}): "
            "take the tokenizer.json that the tokenizers library wrote"
        ) from None


def special_ids(description: dict[str, Any]) -> set[int]:
    """The ids of tokens that the file calls special."""
    return {token["id"] for token in _added(description) if token["special"]}


def prefix_ids(description: dict[str, Any], parts: Parts) -> tuple[int, ...]:
    """The ids that the file's post-processor puts before every text."""
    first = _around(description, "cls")
    wrong = [number for number in first if number not in parts.names]
    if wrong:
        raise InputError(f"the tokenizer begins texts with the id {wrong[0]!r:.40}, which it lacks")
    return tuple(first)


def suffix_ids(description: dict[str, Any]) -> tuple[int, ...]:
    """The ids that the file's post-processor puts behind every text, last first."""
    return tuple(_around(description, "sep"))


def _around(description: dict[str, Any], side: Literal["cls", "sep"]) -> list[Any]:
    """What a post-processor puts before a text ("cls") or behind it ("sep"), outermost first."""
    found: list[Any] = []
    try:
        step = description.get("post_processor") or {}
        for each in step.get("processors", [step]):
            kind = each.get("type")
            if kind in ("BertProcessing", "RobertaProcessing"):
                found.append(each[side][1])
            template = each["single"] if kind == "TemplateProcessing" else []
            for piece in template if side == "cls" else reversed(template):
                if "SpecialToken" not in piece:
                    break
                found += each["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    except (LookupError, TypeError, AttributeError):
        raise InputError("the tokenizer's post_processor is not whole") from None
    return found


def is_single_character(name: str) -> bool:
    """Whether a token is one character, or one byte of it."""
    return len(name) == 1 or name.startswith("<0x")


def _added(description: dict[str, Any]) -> list[dict[str, Any]]:
    return description.get("added_tokens") or []


def _with_plain_bytes(description: dict[str, Any]) -> dict[str, Any]:
    """The file with its bytes (<0x00> to <0xFF>) as tokens of the vocabulary alone.

    Training with the library adds them as special tokens. As such they would be control tokens,
    and characters that are spelled in bytes would be refused.
    """
    model = description["model"]
    if not model.get("byte_fallback"):
        return description
    vocab = model["vocab"]
    known = set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    bytes_of_text = known & {f"<0x{byte:02X}>" for byte in range(256)}
    added = [token for token in _added(description) if token["content"] not in bytes_of_text]
    return {**description, "added_tokens": added}


def _names(description: dict[str, Any]) -> dict[int, str]:
    vocab = description["model"]["vocab"]
    if isinstance(vocab, dict):
        pairs = [(number, token) for token, number in vocab.items()]
    else:  # Unigram's: pieces and their log-probabilities
        pairs = [(number, piece) for number, (piece, _) in enumerate(vocab)]
    names: dict[int, str] = {}
    for number, token in pairs + [(token["id"], token["content"]) for token in _added(description)]:
        if type(number) is not int or number < 0 or not isinstance(token, str):
            raise InputError(f"the tokenizer has the id {number!r:.40} for {token!r:.40}")
        if names.setdefault(number, token) != token:
            raise InputError(f"the tokenizer's {names[number]!r:.40} and {token!r:.40} share an id")
    if not names:
        raise InputError("the tokenizer has no tokens")
    return names


def _unknown(model: dict[str, Any]) -> str | None:
    if isinstance(model["vocab"], list):
        number = model.get("unk_id")
        return None if number is None else str(model["vocab"][number][0])
    return model.get("unk_token")


def _library(description: dict[str, Any], control: set[str]) -> tokenizers.Tokenizer:
    vocab = description["model"]["vocab"]
    known = set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    # Added tokens that are special are found in no text already.
    known |= {token["content"] for token in _added(description) if not token["special"]}
    # A single character's token must stay: without it the character would be lost in silence.
    names = {name for name in control & known if not is_single_character(name)}
    hidden = _renamed(description, {name: _BEYOND + name for name in names})
    built = build(hidden)
    for token in _added(hidden):
        number = built.token_to_id(token["content"])
        if number != token["id"]:
            name = token["content"].removeprefix(_BEYOND)
            raise InputError(
                f"the tokenizers library takes the added token {name!r:.40} for id {number}, "
                f"the file says {token['id']}: its ids must go on from the vocabulary's"
            )
    return built


def _renamed(description: dict[str, Any], hidden: dict[str, str]) -> dict[str, Any]:
    """The file with other names for some tokens, and without the merges that make them."""
    if not hidden:
        return description
    model = dict(description["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(name, name): n for name, n in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [m for m in model["merges"] if not _involved(m, prefix) & hidden.keys()]
    added = [{**t, "content": hidden.get(t["content"], t["content"])} for t in _added(description)]
    return {**description, "model": model, "added_tokens": added}


def _involved(merge: str | list[str], prefix: str) -> set[str]:
    """The two tokens of a merge, and the one they become."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {first, second, first + second.removeprefix(prefix)}


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]
