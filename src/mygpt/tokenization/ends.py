"""Which tokens end a text: what the files beside a tokenizer.json say, else its own tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mygpt.json_objects import TOKENIZER_SETTINGS, read_object
from mygpt.tokenization.base import END_OF_TEXT, Tokenizer
from mygpt.tokenization.bpe import BPETokenizer
from mygpt.tokenization.foreign_json import Parts, is_single_character, special_ids, suffix_ids

# Files that name the end of a text by its token, and by ids.
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_BY_ID = ("generation_config.json", "config.json")
# What families of models call it, where only the tokenizer itself is there.
_NAMES = (
    END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos>", "[EOS]", "[SEP]",
)  # fmt: skip


class Ends(NamedTuple):
    """The tokens that end a text.

    Attributes:
        end_of_text: the id between documents; None where there is none.
        others: ids that end a text too once they are drawn.
        notes: what the user should know.
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
    """The tokens that end a text, by the first source that names a usable one.

    These are the files beside the tokenizer, the token that its class implies, what its
    post-processor puts behind a text, and names that others give it. An id that a generation
    config lists ends texts too. Usable is a special token, or one that is no character.

    Args:
        description: the tokenizer.json.
        parts: what it holds.
        folder: where the files are.
        vocab_size: V of the model, whose config.json counts then, and whose rows without a token
            may end texts too; None where there is no model.
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
    # As in transformers, where the older file comes first unless the newer one lists added tokens.
    listing = "added_tokens_decoder" in _optional(folder / _CONFIG)
    for file in (_CONFIG, _MAP) if listing else (_MAP, _CONFIG):
        token = _optional(folder / file).get("eos_token")
        name = token.get("content") if isinstance(token, dict) else token
        if end is not None or not isinstance(name, str):
            continue
        if is_usable(ids.get(name)):
            end = ids[name]
        else:
            what = "a character of text" if name in ids else "no token"
            notes.append(f"{file} ends texts with {name!r:.40}, which is {what}: not used")
    for file in _BY_ID[: 1 if vocab_size is None else 2]:
        found = _optional(folder / file).get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        usable = list(dict.fromkeys(number for number in listed if is_usable(number)))
        if usable:
            named = [number for number in usable if number in parts.names]
            if end is None and named:
                end = named[0]
                notes.append(f"texts end with {parts.names[end]!r:.40}, id {end}, of {file}")
            others = tuple(number for number in usable if number != end)
            if others:
                shown = ", ".join(repr(parts.names.get(n, n)) for n in others[:8])
                notes.append(f"{shown:.120} of {file} end{'s' * (len(others) == 1)} a text too")
            return Ends(end, others, notes)
        if listed and end is None:
            notes.append(f"{file} ends texts with {listed!r:.60}, no special token: not used")
    if end is not None:
        return Ends(end, (), notes)
    behind = map(parts.names.get, suffix_ids(description))
    for name in (implied, *behind, *_NAMES):
        if name is not None and ids.get(name) in special:
            if name != END_OF_TEXT:
                notes.append(f"texts end with {name!r:.40}, id {ids[name]}, by its name")
            return Ends(ids[name], (), notes)
    return Ends(None, (), [*notes, "no token ends a text: the model writes until it is stopped"])


def end_notes(tokenizer: Tokenizer) -> list[str]:
    """Which token ends documents and which begins them; nothing of tokenizers as ours are."""
    ours = tokenizer.kind in ("char", "byte") or (
        isinstance(tokenizer, BPETokenizer) and tokenizer.uses_own_rule
    )
    if ours and tokenizer.end_of_text is not None:
        return []
    first = [repr(tokenizer.token_text(number)) for number in tokenizer.beginning]
    begun = f", and {' '.join(first)} begins each" if first else ""
    if tokenizer.end_of_text is None:
        return [
            "the tokenizer has no token that ends documents, so a model of it writes until it is "
            f"stopped{begun}"
        ]
    name = tokenizer.token_text(tokenizer.end_of_text)
    return [f"the tokenizer's {name!r} (id {tokenizer.end_of_text}) ends documents{begun}"]


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, TOKENIZER_SETTINGS) if path.is_file() else {}
