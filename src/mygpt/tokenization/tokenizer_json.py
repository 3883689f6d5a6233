"""Write, parse and validate a `tokenizer.json`, and build the library's tokenizer from it.

The file is kept as a JSON object. It is untrusted: the library reads it, and this module determines
the token of each id and which ids are control tokens, and ensures that no text is encoded as a
control token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mygpt.errors import InputError
from mygpt.tokenization.base import END_OF_TEXT
from mygpt.tokenization.bounds import check_bounds
from mygpt.tokenization.library import refusals
from mygpt.tokenization.words import GPT_2, LIBRARY_PATTERN, LLAMA_3, QWEN_2

if TYPE_CHECKING:
    import tokenizers

# GPT-2's alphabet: a printable byte is the character of that code point, the others are the
# characters from U+0100 on.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
SYMBOLS = "".join(chr(b if b in _PRINTABLE else 256 + _HIDDEN.index(b)) for b in range(256))
_SYMBOL_OF_BYTE = dict(enumerate(SYMBOLS))
_BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}

DIGITS = r"\p{N}"  # the rule that splits at each digit
# Prefix of control tokens' names in the library's vocabulary: no text has it.
_BEYOND = "\uffff" * 8
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


def split_at(rule: str, in_bytes: dict[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer that splits text into words by a rule."""
    cut = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, in_bytes]}


OWN_RULE = split_at(LIBRARY_PATTERN, BYTE_LEVEL)


def to_symbols(text: str) -> str:
    """The UTF-8 of a text in GPT-2's alphabet of 256 printable characters."""
    return text.encode("utf-8").decode("latin-1").translate(_SYMBOL_OF_BYTE)


def describe(
    model: dict[str, Any],
    pre_tokenizer: dict[str, Any],
    decoder: dict[str, Any],
    end_of_text: int | None,
) -> dict[str, Any]:
    """A `tokenizer.json`; `end_of_text` is the id of its only control token."""
    end = {"id": end_of_text, "content": END_OF_TEXT, "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [] if end_of_text is None else [end],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def bpe_model(tokens: Iterable[str], merges: Iterable[Sequence[str]]) -> dict[str, Any]:
    """The model of a byte-level BPE: its tokens by id, and its merges by priority."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [list(pair) for pair in merges],
    }


class Contents(NamedTuple):
    """The contents of a `tokenizer.json`.

    Attributes:
        names: the token of each id, including added tokens.
        control: ids that text must not be encoded as: special tokens and the end of text, but not
            the unknown token.
        unknown: the unknown token; None if there is none.
        library: the library's tokenizer, changed so that no text is encoded as a control token,
            unless that token is a single character.
    """

    names: dict[int, str]
    control: frozenset[int]
    unknown: str | None
    library: tokenizers.Tokenizer


def parse(
    description: dict[str, Any], end_of_text: int | None = None, other_ends: Iterable[int] = ()
) -> Contents:
    """Read a `tokenizer.json`.

    Args:
        description: the JSON object in the file.
        end_of_text: an id to treat as a control token, even if the file does not.
        other_ends: more such ids; some may have no token.

    Raises:
        InputError: if the library rejects the file, it is incomplete, or ids are ambiguous.
    """
    names = names_of(description)
    if end_of_text is not None and (type(end_of_text) is not int or end_of_text not in names):
        raise InputError(f"end_of_text={end_of_text!r} is not an id of this tokenizer")
    with complete_json():
        model = description["model"]
        if model.get("dropout"):
            raise InputError(
                'a tokenizer with dropout encodes at random: set "dropout" to null in the file'
            )
        unknown = _unknown(model)
        # The library's trainer adds byte tokens as special ones; text is encoded as them.
        in_bytes = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []
        of_text = {unknown, *in_bytes}
        special = {number for number in special_ids(description) if names[number] not in of_text}
        ends = {number for number in (end_of_text, *other_ends) if number in names}
        control = frozenset(special | ends)
        reached = {names[number] for number in control} & _reached(description)
        # A single character's token must stay, or the character could not be encoded.
        hidden = {name for name in reached if not is_single_character(name)}
        library = build(_renamed(description, {name: _BEYOND + name for name in hidden}))
    return Contents(names, control, unknown, library)


def names_of(description: dict[str, Any]) -> dict[int, str]:
    """The token of each id of a `tokenizer.json`; `InputError` if ids are invalid or ambiguous."""
    names: dict[int, str] = {}
    with complete_json():
        added = [(token["id"], token["content"]) for token in added_tokens(description)]
        for number, token in numbered(description["model"]) + added:
            if type(number) is not int or number < 0 or not isinstance(token, str):
                raise InputError(
                    f"the tokenizer has the id {number!r:.40} for {token!r:.40}: ids must be "
                    "integers from 0, tokens strings"
                )
            if names.setdefault(number, token) != token:
                raise InputError(
                    f"the tokenizer's {names[number]!r:.40} and {token!r:.40} share an id"
                )
    if not names:
        raise InputError("the tokenizer has no tokens")
    return names


@contextmanager
def complete_json() -> Iterator[None]:
    """Turn the errors of reading incomplete JSON into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the tokenizer's JSON is incomplete ({type(error).__name__}: {str(error)[:80]}): "
            "use a tokenizer.json that the tokenizers library wrote"
        ) from None


def added_tokens(description: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of "added_tokens"."""
    return description.get("added_tokens") or []


def special_ids(description: dict[str, Any]) -> set[int]:
    """The ids of tokens that the file marks as special."""
    return {token["id"] for token in added_tokens(description) if token["special"]}


def is_single_character(name: str) -> bool:
    """Whether a token is a single character or a single byte (<0xNN>)."""
    return len(name) == 1 or name.startswith("<0x")


def numbered(model: dict[str, Any]) -> list[tuple[int, str]]:
    """The model's tokens with their ids; a token of Unigram's may occur twice."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return [(number, token) for token, number in vocab.items()]
    return [(number, token) for number, (token, _) in enumerate(vocab)]  # with log-probabilities


def _unknown(model: dict[str, Any]) -> str | None:
    if not isinstance(model["vocab"], list):
        return model.get("unk_token")
    number = model.get("unk_id")
    return None if number is None else str(model["vocab"][number][0])


def merged_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of tokens that a BPE merges, by priority."""
    listed = model["merges"]
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in listed]
    return [(first, second) for first, second in pairs]


def _reached(description: dict[str, Any]) -> set[str]:
    """Tokens that a text of several characters can be encoded as."""
    model = description["model"]
    plain = {token["content"] for token in added_tokens(description) if not token["special"]}
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    if "merges" not in model or any(map(model.get, ("ignore_merges", *affixes))):
        return plain | {token for _, token in numbered(model)}
    merges = model["merges"]
    return plain | {m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in merges}


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
        model["merges"] = remaining_merges(model, hidden.keys())
    added = [
        {**token, "content": hidden.get(token["content"], token["content"])}
        for token in added_tokens(description)
    ]
    return {**description, "model": model, "added_tokens": added}


def remaining_merges(model: dict[str, Any], names: Set[str]) -> list[list[str]]:
    """The merges that neither use nor produce any of these tokens."""
    prefix = model.get("continuing_subword_prefix") or ""
    return [
        [first, second]
        for first, second in merged_pairs(model)
        if not names & {first, second, first + second.removeprefix(prefix)}
    ]


def build(description: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build the library's tokenizer; it encodes text that spells a special token as text.

    Raises:
        InputError: if the library rejects the JSON, or gives other ids to added tokens.
    """
    from tokenizers import Tokenizer

    check_bounds(description)
    text = json.dumps({**description, "truncation": None, "padding": None})
    with refusals("the tokenizers library rejects this tokenizer's JSON"):
        built = Tokenizer.from_str(text)
    built.encode_special_tokens = True
    for token in added_tokens(description):
        number = built.token_to_id(token["content"])
        if number != token["id"]:
            name = token["content"].removeprefix(_BEYOND)
            raise InputError(
                f"the tokenizers library gives the added token {name!r:.40} the id {number}, "
                f"the file {token['id']}: ids of added tokens must follow those of the vocabulary"
            )
    return built


def ids_around(description: dict[str, Any], side: Literal["cls", "sep"]) -> list[Any]:
    """The ids that a post-processor adds before ("cls") or after ("sep") a text, outer first."""
    found: list[Any] = []
    with complete_json():
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
    return found


# --- byte-level BPE ------------------------------------------------------------------------


class ByteLevel(NamedTuple):
    """What encoding by a byte-level BPE depends on.

    Attributes:
        added: added tokens: ids that merges do not produce, with their text.
        control: ids of control tokens, which no text is encoded as; a subset of `added`.
        end_of_text: the id of `<|endoftext|>` if that is a control token, else None.
        rule: the rule by which text is split into words before merges, if `words.py` has it and
            nothing else changes or adds words; else None.
        own_rule: whether that is mygpt's rule.
        splits_at_spaces: whether a word is known to begin at a space after a letter.
    """

    added: dict[int, str]
    control: frozenset[int]
    end_of_text: int | None
    rule: str | None
    own_rule: bool
    splits_at_spaces: bool


def check(description: dict[str, Any]) -> ByteLevel:
    """Validate the `tokenizer.json` of a byte-level BPE that encodes any text without loss.

    Raises:
        InputError: if it is another kind of tokenizer, or is incomplete.
    """
    with complete_json():
        model, splitter = description["model"], description.get("pre_tokenizer")
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind != "BPE":
            raise _refused(f"of kind {kind!r:.40}")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(name):
                raise _refused(f"with {name}={model[name]!r:.40}")
        if description.get("normalizer") not in (None, {"type": "NFC"}):
            raise _refused("with a normalizer, which changes the text")
        rules = word_rules(splitter)
        if (description.get("decoder") or {}).get("type") != "ByteLevel":
            raise _refused("without the decoder ByteLevel")
        listed = added_tokens(description)
        added = {token["id"]: token["content"] for token in listed}
        if len(added) < len(listed) or len(set(added.values())) < len(added):
            raise _refused("two of whose added tokens share an id or a text")
        _check_tokens(description, added)
        control = frozenset(special_ids(description))
        reached = {added[number] for number in control} & {*_reached(description), *SYMBOLS}
        if reached:
            name = min(reached)
            raise _refused(f"in which text can be encoded as the control token {name!r:.40}")
        ends = [number for number in control if added[number] == END_OF_TEXT]
        plain = description.get("normalizer") is None and len(added) == len(control)
        own = plain and splitter == OWN_RULE and len(added) == len(ends)
        known = len(rules) == 1 and rules[0] in _KNOWN_RULES
        spaces = known and not any(map(_takes_spaces, listed))
        rule = rules[0] if own or (plain and spaces) else None
        return ByteLevel(added, control, ends[0] if ends else None, rule, own, spaces)


_KNOWN_RULES = (GPT_2, LLAMA_3, QWEN_2)  # in which a word begins at a space after a letter


def _refused(what: str) -> InputError:
    return InputError(f"a tokenizer {what} is not supported: only byte-level BPE is")


def word_rules(splitter: Any) -> list[str | None]:
    """The rules, one after the other, by which a pre-tokenizer splits text into words.

    Returns:
        Regular expressions; None for a rule that is not one.

    Raises:
        InputError: if it does not end with ByteLevel, or it adds or drops text.
    """
    if not isinstance(splitter, dict):
        raise _refused("without the pre-tokenizer ByteLevel")
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    *cuts, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        raise _refused("that does not encode the text's bytes unchanged")
    rules: list[str | None] = []
    for cut in cuts:
        kind = cut.get("type")
        if kind == "Digits":
            rules.append(DIGITS if cut.get("individual_digits") else None)
        elif kind == "Split" and cut["behavior"] == "Isolated" and not cut["invert"]:
            rules.append(cut["pattern"].get("Regex"))
        else:
            raise _refused(f"with the pre-tokenizer {kind!r:.40}")
    return [*rules, GPT_2] if last.get("use_regex", True) else rules


def _takes_spaces(token: dict[str, Any]) -> bool:
    beside = token.get("lstrip") or token.get("rstrip")
    return not token["special"] and (" " in token["content"] or bool(beside))


def _check_tokens(description: dict[str, Any], added: dict[int, str]) -> None:
    """Refuse ids with gaps, bytes without a token, and tokens that are not bytes."""
    names, model = names_of(description), description["model"]
    if max(names) + 1 > len(names):
        raise InputError(f"the tokenizer's {len(names):,} ids do not run from 0 without gaps")
    missing = [byte for byte, symbol in enumerate(SYMBOLS) if symbol not in model["vocab"]]
    if missing:
        raise InputError(f"the tokenizer has no token for byte {missing[0]}: every byte needs one")
    found = [name for number, name in numbered(model) if number not in added]
    if "" in found or not set("".join(found)) <= _BYTE_OF_SYMBOL.keys():
        raise _refused("with tokens that are not sequences of bytes")


def byte_tokens(description: dict[str, Any], vocab_size: int) -> list[bytes]:
    """The bytes of each id, (V,), if the model's tokens are in GPT-2's alphabet.

    Other tokens are UTF-8, as those are that only "added_tokens" has. An id without a token is
    empty.
    """
    tokens = [b""] * vocab_size
    for token in added_tokens(description):
        tokens[token["id"]] = token["content"].encode()
    for number, name in numbered(description["model"]):
        try:
            tokens[number] = bytes(map(_BYTE_OF_SYMBOL.__getitem__, name))
        except KeyError:
            tokens[number] = name.encode()
    return tokens
