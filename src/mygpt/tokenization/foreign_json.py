"""Parse any `tokenizer.json`, and build the library's tokenizer from it.

The file is untrusted. The library reads it; this module determines the token of each id and which
ids are control tokens, and ensures that no text is encoded as a control token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mygpt.errors import InputError
from mygpt.tokenization.tokenizer_json import build

if TYPE_CHECKING:
    import tokenizers

_BEYOND = (
    "\uffff" * 8
)  # prefix of control tokens' names in the library's vocabulary: no text has it


class Parts(NamedTuple):
    """The contents of a `tokenizer.json`.

    Attributes:
        names: the token of each id, including added tokens.
        control: ids that text must not be encoded as: special tokens and the end of text, but not
            the unknown token.
        unknown: the unknown token; None if there is none.
        steps: the decoder's steps, flattened; None if there is no decoder.
        library: the library's tokenizer, changed so that no text is encoded as a control token,
            unless that token is a single character.
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
        description: the JSON object in the file.
        end_of_text: an id to treat as a control token, even if the file does not.
        other_ends: more such ids; some may have no token.

    Raises:
        InputError: if the library rejects the file, it is incomplete, or ids are ambiguous.
    """
    try:
        names = _names(description)
        if end_of_text is not None and (type(end_of_text) is not int or end_of_text not in names):
            raise InputError(f"end_of_text={end_of_text!r} is not an id of this tokenizer")
        model = description["model"]
        description = _with_plain_bytes(description)
        if model.get("dropout"):
            raise InputError(
                'a tokenizer with dropout encodes at random: set "dropout" to null in the file'
            )
        unknown = _unknown(model)
        control = {i for i in special_ids(description) if names[i] != unknown}
        control |= set() if end_of_text is None else {end_of_text}
        control |= {number for number in other_ends if number in names}
        library = _library(description, {names[i] for i in control})
        # As the library parsed it, since it also accepts older forms of a decoder.
        decoder = library.decoder
        steps = None if decoder is None else _steps(json.loads(decoder.__getstate__()))
        return Parts(names, frozenset(control), unknown, steps, library)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the tokenizer's JSON is incomplete ({type(error).__name__}: {str(error)[:80]}): "
            "use a tokenizer.json that the tokenizers library wrote"
        ) from None


def special_ids(description: dict[str, Any]) -> set[int]:
    """The ids of tokens that the file marks as special."""
    return {token["id"] for token in _added(description) if token["special"]}


def prefix_ids(description: dict[str, Any], parts: Parts) -> tuple[int, ...]:
    """The ids that the file's post-processor adds before every text."""
    first = _around(description, "cls")
    wrong = [number for number in first if number not in parts.names]
    if wrong:
        raise InputError(
            f"the tokenizer begins texts with the id {wrong[0]!r:.40}, which has no token"
        )
    return tuple(first)


def suffix_ids(description: dict[str, Any]) -> tuple[int, ...]:
    """The ids that the file's post-processor adds after every text, last first."""
    return tuple(_around(description, "sep"))


def _around(description: dict[str, Any], side: Literal["cls", "sep"]) -> list[Any]:
    """The ids that a post-processor adds before ("cls") or after ("sep") a text, outer first."""
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
        raise InputError(
            "the tokenizer's post_processor is incomplete: use a tokenizer.json that the "
            "tokenizers library wrote"
        ) from None
    return found


def is_single_character(name: str) -> bool:
    """Whether a token is a single character or a single byte (<0xNN>)."""
    return len(name) == 1 or name.startswith("<0x")


def _added(description: dict[str, Any]) -> list[dict[str, Any]]:
    return description.get("added_tokens") or []


def _with_plain_bytes(description: dict[str, Any]) -> dict[str, Any]:
    """The file without its byte tokens (<0x00> to <0xFF>) among the added tokens.

    The library's trainer adds them as special tokens. They would then count as control tokens, and
    characters encoded as bytes would be refused.
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
    else:  # Unigram: pairs of a token and its log-probability
        pairs = [(number, piece) for number, (piece, _) in enumerate(vocab)]
    names: dict[int, str] = {}
    for number, token in pairs + [(token["id"], token["content"]) for token in _added(description)]:
        if type(number) is not int or number < 0 or not isinstance(token, str):
            raise InputError(
                f"the tokenizer has the id {number!r:.40} for {token!r:.40}: ids must be integers "
                "from 0, tokens strings"
            )
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
    # With `encode_special_tokens` the library finds no special added token in a text.
    known |= {token["content"] for token in _added(description) if not token["special"]}
    # A single character's token must stay, or the character could not be encoded.
    names = {name for name in control & known if not is_single_character(name)}
    hidden = _renamed(description, {name: _BEYOND + name for name in names})
    built = build(hidden)
    for token in _added(hidden):
        number = built.token_to_id(token["content"])
        if number != token["id"]:
            name = token["content"].removeprefix(_BEYOND)
            raise InputError(
                f"the tokenizers library gives the added token {name!r:.40} the id {number}, "
                f"the file {token['id']}: ids of added tokens must follow those of the vocabulary"
            )
    return built


def _renamed(description: dict[str, Any], hidden: dict[str, str]) -> dict[str, Any]:
    """The file with some tokens renamed, and without the merges that produce them."""
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
    """The two tokens of a merge, and the merged one."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {first, second, first + second.removeprefix(prefix)}


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]
