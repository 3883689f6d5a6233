"""Find the tokens that end a text, from the configuration files next to a tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.json_objects import TOKENIZER_SETTINGS, read_object
from mygpt.tokenization.base import END_OF_TEXT, Tokenizer
from mygpt.tokenization.tokenizer_json import TokenizerFile, is_single_character

# Files that name the end-of-text token by its text, and by its id.
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_BY_ID = ("generation_config.json", "config.json")
# Its names in families of models, tried if no configuration file is there.
END_NAMES = (
    END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos>", "[EOS]", "[SEP]",
)  # fmt: skip


class Ends(NamedTuple):
    """The tokens that end a text."""

    end_of_text: int | None  # the id between documents; None if there is none
    others: tuple[int, ...]  # further ids that end a text when they are sampled
    notes: list[str]  # for the user, one line each


def find_ends(
    file: TokenizerFile,
    folder: Path,
    *,
    vocab_size: int | None = None,
    implied: str | None = None,
) -> Ends:
    """The tokens that end a text, from the first source that names a usable one.

    The sources are, in order: the configuration files next to the tokenizer, the token that the
    tokenizer's class implies, the token that its post-processor appends to a text, and the common
    names. All ids in generation_config.json end texts. A token is usable if it is special, or
    longer than one character.

    Args:
        file: the tokenizer.json.
        folder: the folder of the configuration files.
        vocab_size: V of the model. config.json is then read too, and an id without a token may
            end texts. None if there is no model.
        implied: the token that the tokenizer's class implies.
    """
    search = _Search(file, folder, vocab_size or 0)
    end = search.by_text()
    for place in _BY_ID[: 1 if vocab_size is None else 2]:
        if (found := search.by_id(place, end)) is not None:
            return found
    if end is None:
        appended = map(file.names.get, file.ids_around("sep"))
        end = search.by_name([implied, *appended, *END_NAMES])
    return Ends(end, (), search.notes)


class _Search:
    """Searches for the tokens that end a text, and collects notes.

    Args:
        file: the tokenizer.json.
        folder: the folder of the configuration files.
        vocab_size: ids without a token are usable below it.
    """

    def __init__(self, file: TokenizerFile, folder: Path, vocab_size: int) -> None:
        self.notes: list[str] = []
        self._names, self._special = file.names, file.special
        self._folder, self._vocab_size = folder, vocab_size
        self._ids = {name: number for number, name in file.names.items()}

    def by_text(self) -> int | None:
        """The end-of-text id from the file that names the token by its text."""
        # As transformers does, the older file comes first unless the newer one lists added tokens.
        listing = "added_tokens_decoder" in read_settings(self._folder / _CONFIG)
        for file in (_CONFIG, _MAP) if listing else (_MAP, _CONFIG):
            token = read_settings(self._folder / file).get("eos_token")
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str):
                if self._is_usable(self._ids.get(name)):
                    return self._ids[name]
                self._ignore(file, name)
        return None

    def by_id(self, file: str, end: int | None) -> Ends | None:
        """The ids in a file, of which the first is the end of text unless that is `end`.

        None if the file has no usable id.
        """
        found = read_settings(self._folder / file).get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        usable = list(dict.fromkeys(number for number in listed if self._is_usable(number)))
        if not usable:
            if listed and end is None:
                self._ignore(file, listed)
            return None
        named = [number for number in usable if number in self._names]
        if end is None and named:
            end = named[0]
            self.notes.append(f"texts end with {self._names[end]!r:.40}, id {end}, from {file}")
        others = tuple(number for number in usable if number != end)
        if others:
            shown = ", ".join(repr(self._names.get(n, n)) for n in others[:8])
            verb = "end" + "s" * (len(others) == 1)
            self.notes.append(f"{shown:.120} in {file} also {verb} a text")
        return Ends(end, others, self.notes)

    def by_name(self, names: Iterable[str | None]) -> int | None:
        """The id of the first of these names that is a special token's."""
        for name in names:
            if name is not None and self._ids.get(name) in self._special:
                end = self._ids[name]
                if name != END_OF_TEXT:
                    self.notes.append(f"texts end with {name!r:.40}, id {end}, chosen by its name")
                return end
        self.notes.append(
            "no token ends a text: the model generates until a limit or a stop string"
        )
        return None

    def _ignore(self, file: str, value: object) -> None:
        self.notes.append(f"{file} ends texts with {value!r:.60}, not a special token: ignored")

    def _is_usable(self, number: object) -> bool:
        """Whether an id is a special token, has more than one character, or is a free row."""
        if type(number) is not int or number < 0:
            return False
        if number not in self._names:
            return number < self._vocab_size
        return number in self._special or not is_single_character(self._names[number])


def end_notes(tokenizer: Tokenizer) -> list[str]:
    """A note on which tokens begin and end documents; empty for a tokenizer that mygpt trained."""
    encoder = tokenizer.encoder
    own_rule = tokenizer.kind == "bpe" and encoder is not None and encoder.rules.own_rule
    trained_here = tokenizer.kind in ("char", "byte") or own_rule
    if trained_here and tokenizer.end_of_text is not None:
        return []
    first = [repr(tokenizer.token_text(number)) for number in tokenizer.beginning]
    begun = f", and {' '.join(first)} begins each" if first else ""
    if tokenizer.end_of_text is None:
        return [
            "the tokenizer has no token that ends documents, so its model generates until a limit "
            f"or a stop string{begun}"
        ]
    name = tokenizer.token_text(tokenizer.end_of_text)
    return [f"the tokenizer's {name!r} (id {tokenizer.end_of_text}) ends documents{begun}"]


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object of a settings file; empty if there is no such file."""
    return read_object(path, TOKENIZER_SETTINGS) if path.is_file() else {}
