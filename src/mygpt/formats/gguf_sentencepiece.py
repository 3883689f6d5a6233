"""BPE over characters with byte fallback (Llama 2's), exported as llama.cpp's tokenizer "llama".

llama.cpp's (SentencePiece's BPE) has scores in place of a list of merges: of all adjacent pairs
whose concatenation is a token it merges the pair whose token has the highest score, the leftmost
first. A list of merges is equivalent if it contains every split of every token, and all splits of
one token follow each other. That is checked; a token's score is then minus its rank in the list.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from mygpt.errors import InputError

# llama.cpp's numbers for the types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


class Pieces(NamedTuple):
    """A vocabulary for llama.cpp's tokenizer "llama".

    Attributes:
        tokens: by id.
        types: by id.
        scores: by id.
        spaced: whether a space is added before every text.
        notes: lines for the user.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    spaced: bool
    notes: list[str]


def is_sentencepiece(description: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is BPE over characters with byte fallback."""
    model = description["model"]
    return bool(model.get("byte_fallback")) and "merges" in model


def sentencepiece(description: dict[str, Any]) -> Pieces:
    """The tokens, types and scores for a `tokenizer.json` that the tokenizers library loads.

    Raises:
        InputError: naming a rule that llama.cpp does not have.
    """
    model = description["model"]
    spaced, notes = _spaces(description)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise _refused(f"{name}={model[name]!r:.40}")
    vocab: dict[str, int] = model["vocab"]
    added = {token["id"]: token for token in description.get("added_tokens") or []}
    names = {number: name for name, number in vocab.items()}
    names |= {number: token["content"] for number, token in added.items()}
    if sorted(names) != list(range(len(names))):
        raise _refused(f"ids that are not 0 to {len(names) - 1:,}")
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        raise _refused(f"no token for byte {missing[0]}")
    types = []
    for number in range(len(names)):
        name = names[number]
        if name == model.get("unk_token"):
            types.append(UNKNOWN)
        elif number in added:
            types.append(CONTROL if added[number]["special"] else USER_DEFINED)
        else:
            types.append(BYTE if _BYTE.fullmatch(name) else NORMAL)
    scores = _scores(model["merges"], {names[n] for n, kind in enumerate(types) if kind == NORMAL})
    spelled = [names[n] for n, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, BYTE)]
    reached = [name for name in spelled if _splits(name, vocab)]
    if reached:
        notes.append(
            f"llama.cpp encodes the text {', '.join(map(repr, reached[:3]))} in a prompt as the "
            "token of that name, and mygpt does not"
        )
    tokens = [
        names[n].replace(_SPACE, " ") if types[n] == USER_DEFINED else names[n]
        for n in range(len(names))
    ]
    lowest = -float(len(names))  # of tokens that no merge forms
    return Pieces(tokens, types, [scores.get(token, lowest) for token in tokens], spaced, notes)


def _refused(what: str) -> InputError:
    return InputError(
        f"this tokenizer has {what}, which llama.cpp does not support: export with --to hf"
    )


def _spaces(description: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space is added before every text, and notes for the user."""
    normalizer, splitter = description.get("normalizer"), description.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if splitter is None and steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return _PREPEND in steps, []
    splitter = splitter or {}
    if splitter.get("type") != "Metaspace" or steps or splitter.get("replacement") != _SPACE:
        raise _refused("another rule for spaces than SentencePiece's")
    inside = any(_SPACE in name[1:] for name in description["model"]["vocab"])
    if splitter.get("split", True) and inside:
        raise _refused("words that end at spaces, and tokens with a space inside")
    scheme = splitter.get("prepend_scheme", "always")
    if scheme == "never":
        return False, []
    return True, ["llama.cpp adds a space before text that begins with one, and mygpt does not"]


def _scores(merges: list[Any], tokens: set[str]) -> dict[str, float]:
    """The score of each token that merges form: minus its rank in the list."""
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]
    scores: dict[str, float] = {}
    before = None
    for pair in pairs:
        token = "".join(pair)
        if token != before and token in scores:
            raise _refused(f"merges to {token!r:.40} that do not follow each other in its list")
        before = token
        scores.setdefault(token, -float(len(scores)))
    known = set(pairs)
    for token in tokens:
        missing = next((pair for pair in _splits(token, tokens) if pair not in known), None)
        if missing is not None:
            raise _refused(f"no merge of {missing[0]!r:.40} and {missing[1]!r:.40}")
    return scores


def _splits(token: str, tokens: Any) -> list[tuple[str, str]]:
    """The splits of a token into two texts, each a single character or a token."""
    halves = [(token[:n], token[n:]) for n in range(1, len(token))]
    return [pair for pair in halves if all(len(half) == 1 or half in tokens for half in pair)]
