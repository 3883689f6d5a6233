"""Find the tokens that end a text, from the configuration files next to a tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mygpt.json_objects import TOKENIZER_SETTINGS, read_object
from mygpt.tokenization.base import END_OF_TEXT, Tokenizer
from mygpt.tokenization.bpe import BPETokenizer
from mygpt.tokenization.foreign_json import Parts, is_single_character, special_ids, suffix_ids

# Files that name the end-of-text token by its text, and by its id.
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_BY_ID = ("generation_config.json", "config.json")
# Its names in families of models, tried if no configuration file is there.
_NAMES = (
    END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos>", "[EOS]", "[SEP]",
)  # fmt: skip


class Ends(NamedTuple):
    """The tokens that end a text.

    Attributes:
        end_of_text: the id between documents; None if there is none.
        others: further ids that end a text when they are sampled.
        notes: for the user, one line each.
    """

    end_of_text: int | None
    others: tuple[int, ...]
    notes: list[str]


def find_ends(
    description: dict[str, Any],
    parts: Parts,
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
        description: the tokenizer.json.
        parts: its parsed contents.
        folder: the folder of the configuration files.
        vocab_size: V of the model. config.json is then read too, and an id without a token may
            end texts. None if there is no model.
        implied: the token that the tokenizer's class implies.
    """
    notes: list[str] = []
    special = special_ids(description)
    ids = {name: number for number, name in parts.names.items()}

    def is_usable(number: object) -> bool:
        if type(number) is not int or number < 0:
            return False
        if number not in parts.names:
            return number < (vocab_size or 0)
        return number in special or not is_single_character(parts.names[number])

    end = None
    # As transformers does, the older file comes first unless the newer one lists added tokens.
    listing = "added_tokens_decoder" in _optional(folder / _CONFIG)
    for file in (_CONFIG, _MAP) if listing else (_MAP, _CONFIG):
        token = _optional(folder / file).get("eos_token")
        name = token.get("content") if isinstance(token, dict) else token
        if end is not None or not isinstance(name, str):
            continue
        if is_usable(ids.get(name)):
            end = ids[name]
        else:
            what = "an ordinary character" if name in ids else "not in the vocabulary"
            notes.append(f"{file} ends texts with {name!r:.40}, which is {what}: ignored")
    for file in _BY_ID[: 1 if vocab_size is None else 2]:
        found = _optional(folder / file).get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        usable = list(dict.fromkeys(number for number in listed if is_usable(number)))
        if usable:
            named = [number for number in usable if number in parts.names]
            if end is None and named:
                end = named[0]
                notes.append(f"texts end with {parts.names[end]!r:.40}, id {end}, from {file}")
            others = tuple(number for number in usable if number != end)
            if others:
                shown = ", ".join(repr(parts.names.get(n, n)) for n in others[:8])
                verb = "end" + "s" * (len(others) == 1)
                notes.append(f"{shown:.120} in {file} also {verb} a text")
            return Ends(end, others, notes)
        if listed and end is None:
            notes.append(f"{file} ends texts with {listed!r:.60}, not a special token: ignored")
    if end is not None:
        return Ends(end, (), notes)
    behind = map(parts.names.get, suffix_ids(description))
    for name in (implied, *behind, *_NAMES):
        if name is not None and ids.get(name) in special:
            if name != END_OF_TEXT:
                notes.append(f"texts end with {name!r:.40}, id {ids[name]}, chosen by its name")
            return Ends(ids[name], (), notes)
    return Ends(
        None,
        (),
        [*notes, "no token ends a text: the model generates until a limit or a stop string"],
    )


def end_notes(tokenizer: Tokenizer) -> list[str]:
    """A note on which tokens begin and end documents; empty for a tokenizer that mygpt trained."""
    trained_here = tokenizer.kind in ("char", "byte") or (
        isinstance(tokenizer, BPETokenizer) and tokenizer.uses_own_rule
    )
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


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, TOKENIZER_SETTINGS) if path.is_file() else {}
