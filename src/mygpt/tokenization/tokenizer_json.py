"""Write, parse and validate a `tokenizer.json`, and build the library's tokenizer from it.

The file is kept as a JSON object. It is untrusted: the library reads it, and this module determines
the token of each id and which ids are control tokens, and ensures that no text is encoded as a
control token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mygpt.errors import InputError
from mygpt.tokenization.base import END_OF_TEXT
from mygpt.tokenization.bounds import MOST_AROUND, MOST_IDS, check_bounds, limit
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
# For `str.translate`: other characters become one that is not in Latin-1.
_BYTE_OF_SYMBOL = dict.fromkeys(range(256), 0x100) | {ord(s): b for b, s in enumerate(SYMBOLS)}

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
    decoder: dict[str, Any] | None,
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


class ByteLevel(NamedTuple):
    """What encoding by a byte-level BPE depends on."""

    end_of_text: int | None  # the id of `<|endoftext|>` if that is a control token, else None
    # The rule by which text is split into words before merges, if `words.py` has it and nothing
    # else changes or adds words; else None
    rule: str | None
    own_rule: bool  # whether that is mygpt's rule
    splits_at_spaces: bool  # whether a word is known to begin at a space after a letter
    splits_at_lines: bool  # the same between a line end and an ordinary character


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


class TokenizerFile:
    """The content of a `tokenizer.json`.

    Args:
        description: the JSON object in the file.

    Attributes:
        description: the same.
        model: its "model".
        added: the entries of its "added_tokens".
        special: the ids of tokens that it marks as special.
        numbered: the model's tokens with their ids; a token of Unigram's may occur twice.
        names: the token of each id, including added tokens.

    Raises:
        InputError: if it is incomplete, or ids are invalid, ambiguous or too large.
    """

    @complete_json()
    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description
        self.model: dict[str, Any] = description["model"]
        self.added: list[dict[str, Any]] = description.get("added_tokens") or []
        self.special = {token["id"] for token in self.added if token["special"]}
        vocab = self.model["vocab"]
        self.numbered: list[tuple[int, str]] = (
            [(number, token) for token, number in vocab.items()]
            if isinstance(vocab, dict)
            else [(number, token) for number, (token, _) in enumerate(vocab)]
        )
        self.names: dict[int, str] = {}
        for number, token in self.numbered + [(t["id"], t["content"]) for t in self.added]:
            if type(number) is not int or number < 0 or not isinstance(token, str):
                raise InputError(
                    f"the tokenizer has the id {number!r:.40} for {token!r:.40}: ids must be "
                    "integers from 0, tokens strings"
                )
            if self.names.setdefault(number, token) != token:
                raise InputError(
                    f"the tokenizer's {self.names[number]!r:.40} and {token!r:.40} share an id"
                )
        if not self.names:
            raise InputError("the tokenizer has no tokens")
        limit("ids", self.size, MOST_IDS)  # some tables have an entry for each of them

    @classmethod
    def of(cls, content: dict[str, Any] | TokenizerFile) -> TokenizerFile:
        """The file itself, or that of a JSON object."""
        return content if isinstance(content, TokenizerFile) else cls(content)

    @cached_property
    def size(self) -> int:
        """The number of ids, from 0 to the largest one that has a token."""
        return max(self.names) + 1

    @cached_property
    @complete_json()
    def unknown(self) -> str | None:
        """The unknown token; None if there is none."""
        if not isinstance(self.model["vocab"], list):
            return self.model.get("unk_token")
        number = self.model.get("unk_id")
        return None if number is None else self.names[number]

    @cached_property
    @complete_json()
    def merges(self) -> list[tuple[str, str]]:
        """The pairs of tokens that a BPE merges, by priority."""
        listed = self.model["merges"]
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in listed]
        return [(first, second) for first, second in pairs]

    def merges_without(self, names: Set[str]) -> list[list[str]]:
        """The merges that neither use nor produce any of these tokens."""
        prefix = self.model.get("continuing_subword_prefix") or ""
        return [
            [first, second]
            for first, second in self.merges
            if not names & {first, second, first + second.removeprefix(prefix)}
        ]

    @complete_json()
    def reached(self, names: Set[str]) -> set[str]:
        """Those of these tokens that a text of several characters can be encoded as."""
        affixes = ("continuing_subword_prefix", "end_of_word_suffix")
        if "merges" not in self.model or any(map(self.model.get, ("ignore_merges", *affixes))):
            made: Iterable[str] = (token for _, token in self.numbered)
        else:
            merges = self.model["merges"]
            made = (m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in merges)
        plain = (token["content"] for token in self.added if not token["special"])
        return {token for token in chain(made, plain) if token in names}

    def ids_around(self, side: Literal["cls", "sep"]) -> list[int]:
        """The ids that its post-processor adds before ("cls") or after a text, outer first."""
        found: list[int] = []
        with complete_json():
            step = self.description.get("post_processor") or {}
            for each in step.get("processors", [step]):
                kind = each.get("type")
                if kind in ("BertProcessing", "RobertaProcessing"):
                    found.append(each[side][1])
                template = each["single"] if kind == "TemplateProcessing" else []
                for piece in template if side == "cls" else reversed(template):
                    if "SpecialToken" not in piece:
                        break
                    found += each["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
                    limit("tokens around a text", len(found), MOST_AROUND)
        for number in found:
            if type(number) is not int:
                raise InputError(
                    f"the tokenizer's post_processor has the id {number!r:.40}: ids must be "
                    "integers"
                )
        return found

    def byte_tokens(self, vocab_size: int) -> list[bytes]:
        """The bytes of each id, (V,), if the model's tokens are in GPT-2's alphabet.

        Other tokens are UTF-8, as those are that only "added_tokens" has. An id without a token is
        empty.
        """
        tokens = [b""] * vocab_size
        for token in self.added:
            tokens[token["id"]] = token["content"].encode()
        for number, name in self.numbered:
            try:
                tokens[number] = name.translate(_BYTE_OF_SYMBOL).encode("latin-1")
            except UnicodeEncodeError:
                tokens[number] = name.encode()
        return tokens

    def build(self, hidden: Set[str] = frozenset()) -> tokenizers.Tokenizer:
        """Build the library's tokenizer; it encodes text that spells a special token as text.

        It adds no tokens around a text, and gives other names to the tokens `hidden`, so that no
        text is encoded as one of them.

        Raises:
            InputError: if the library rejects the JSON, or gives other ids to added tokens.
        """
        from tokenizers import Tokenizer, processors

        check_bounds(self)
        renamed = self._renamed(hidden) if hidden else self.description
        text = json.dumps({**renamed, "truncation": None, "padding": None})
        with refusals("the tokenizers library rejects this tokenizer's JSON"):
            built = Tokenizer.from_str(text)
        built.encode_special_tokens = True
        built.post_processor = processors.Sequence([])
        for token in self.added:
            name = token["content"]
            number = built.token_to_id(_BEYOND * (name in hidden) + name)
            if number != token["id"]:
                raise InputError(
                    f"the tokenizers library gives the added token {name!r:.40} the id {number}, "
                    f"the file {token['id']}: ids of added tokens must follow those of the "
                    "vocabulary"
                )
        return built

    def _renamed(self, hidden: Set[str]) -> dict[str, Any]:
        """The description with some tokens renamed, and without the merges that produce them."""
        names = {name: _BEYOND + name for name in hidden}
        model = dict(self.model)
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): n for n, token in self.numbered}
        else:
            model["vocab"] = [[names.get(token, token), p] for token, p in model["vocab"]]
        if model.get("unk_token") in hidden:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            model["merges"] = self.merges_without(hidden)
        added = [{**t, "content": names.get(t["content"], t["content"])} for t in self.added]
        return {**self.description, "model": model, "added_tokens": added}

    @complete_json()
    def protected(self, ends: Iterable[Any]) -> tuple[frozenset[int], tokenizers.Tokenizer]:
        """The library's tokenizer, changed so that no text is encoded as a control token.

        A token that is a single character stays, since the character could not be encoded else.

        Args:
            ends: ids to treat as control tokens, even if the file does not; others than those of
                tokens are ignored.

        Returns:
            The ids of control tokens: `ends`, and special tokens except the unknown one. And the
            library's tokenizer.
        """
        if self.model.get("dropout"):
            raise InputError(
                'a tokenizer with dropout encodes at random: set "dropout" to null in the file'
            )
        of_text = {self.unknown}
        if self.model.get("byte_fallback"):  # the library's trainer adds byte tokens as special
            of_text.update(f"<0x{byte:02X}>" for byte in range(256))
        special = {number for number in self.special if self.names[number] not in of_text}
        control = frozenset(special | self.names.keys() & set(ends))
        reached = self.reached({self.names[number] for number in control})
        hidden = {name for name in reached if not is_single_character(name)}
        return control, self.build(hidden)

    @cached_property
    @complete_json()
    def byte_level(self) -> ByteLevel:
        """What encoding depends on, if this is byte-level BPE without loss.

        Raises:
            InputError: if it is another kind of tokenizer.
        """
        model, normalizer = self.model, self.description.get("normalizer")
        kind = model.get("type", "BPE" if "merges" in model else None)
        if kind != "BPE":
            raise _refused(f"of kind {kind!r:.40}")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(name):
                raise _refused(f"with {name}={model[name]!r:.40}")
        if normalizer not in (None, {"type": "NFC"}):
            raise _refused("with a normalizer, which changes the text")
        splitter = self.description.get("pre_tokenizer")
        rules = word_rules(splitter)
        if (self.description.get("decoder") or {}).get("type") != "ByteLevel":
            raise _refused("without the decoder ByteLevel")
        added = {token["id"]: token["content"] for token in self.added}
        if len(added) < len(self.added) or len(set(added.values())) < len(added):
            raise _refused("two of whose added tokens share an id or a text")
        self._check_bytes()
        control = {added[number] for number in self.special}
        if reached := self.reached(control) | control & set(SYMBOLS):
            name = min(reached)
            raise _refused(f"in which text can be encoded as the control token {name!r:.40}")
        ends = [number for number in self.special if added[number] == END_OF_TEXT]
        plain = normalizer is None and len(added) == len(control)
        own = plain and splitter == OWN_RULE and len(added) == len(ends)
        known = len(rules) == 1 and rules[0] in _KNOWN_RULES
        spaces = known and not any(map(_takes_spaces, self.added))
        rule = rules[0] if own or (plain and spaces) else None
        lines = spaces and not any("\n" in name for name in added.values())
        return ByteLevel(ends[0] if ends else None, rule, own, spaces, lines)

    def _check_bytes(self) -> None:
        """Refuse ids with gaps, bytes without a token, and tokens that are not bytes."""
        names, added = self.names, {token["id"] for token in self.added}
        if self.size > len(names):
            raise InputError(f"the tokenizer's {len(names):,} ids do not run from 0 without gaps")
        missing = [byte for byte, symbol in enumerate(SYMBOLS) if symbol not in self.model["vocab"]]
        if missing:
            raise InputError(
                f"the tokenizer has no token for byte {missing[0]}: every byte needs one"
            )
        found = [name for number, name in self.numbered if number not in added]
        if "" in found or not set("".join(found)) <= set(SYMBOLS):
            raise _refused("with tokens that are not sequences of bytes")


def is_single_character(name: str) -> bool:
    """Whether a token is a single character or a single byte (<0xNN>)."""
    return len(name) == 1 or name.startswith("<0x")


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
