"""The added tokens of a Hugging Face tokenizer: read from its files, and added to its JSON.

The files are `tokenizer_config.json`, or the older `added_tokens.json` and
`special_tokens_map.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import InputError
from mygpt.json_objects import TOKENIZER_SETTINGS, read_object
from mygpt.tokenization.foreign_json import is_single_character

# The order in which transformers adds missing special tokens.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


class AddedTokens(NamedTuple):
    """The tokens that files other than the vocabulary list, as entries of "added_tokens".

    Attributes:
        numbered: those with an id in the files, in the order of their ids.
        others: special ones without an id.
        roles: the special tokens' texts by role.
        implied: the texts of those that no file lists: they are defaults of the class.
    """

    numbered: list[dict[str, Any]]
    others: list[dict[str, Any]]
    roles: dict[str, str]
    implied: frozenset[str]


def read_added_tokens(
    folder: Path, config: dict[str, Any], defaults: dict[str, str]
) -> AddedTokens:
    """The tokens of `tokenizer_config.json`, or of the older files if that lists no ids."""
    place = folder / "tokenizer_config.json"
    listed = config.get("added_tokens_decoder")
    files = config
    numbered: list[dict[str, Any]] = []
    if listed is None:
        place = folder / "added_tokens.json"
        files = files | optional_object(folder / "special_tokens_map.json")
    named = {f"{role}_token": content for role, content in defaults.items()} | files
    special = [_entry(folder, value, special=True) for value in _named(named)]
    contents = {token["content"] for token in special}
    if listed is None:
        for content, number in optional_object(place).items():
            token = _entry(place, content, special=content in contents)
            numbered.append({"id": _number(place, number), **token})
    elif not isinstance(listed, dict):
        raise InputError(
            f"{place}: added_tokens_decoder={listed!r:.40} must be an object: copy the file again"
        )
    else:
        for number, value in listed.items():
            token = _entry(place, value, special=False)
            token["special"] |= token["content"] in contents
            numbered.append({"id": _number(place, number), **token})
    roles: dict[str, str] = {}
    for role in ROLES:
        named_role = named.get(f"{role}_token")
        text = named_role.get("content") if isinstance(named_role, dict) else named_role
        if isinstance(text, str):
            roles[role] = text
    by_files = [_entry(folder, v, special=True)["content"] for v in _named(files)]
    implied = frozenset(defaults.values()) - set(by_files)
    numbered.sort(key=lambda token: int(token["id"]))
    return AddedTokens(numbered, special, roles, implied)


def _named(named: dict[str, Any]) -> Iterator[Any]:
    """The special tokens, in the order in which transformers adds them."""
    for role in ROLES:
        if named.get(f"{role}_token") is not None:
            yield named[f"{role}_token"]
    more = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    others = {k: v for k, v in named.items() if k.endswith("_token") and isinstance(v, (str, dict))}
    for name, value in others.items():  # special to a model: "image_token"
        if name.removesuffix("_token") not in ROLES:
            yield value
    yield from more.values() if isinstance(more, dict) else more if isinstance(more, list) else []


def _entry(place: Path, value: Any, *, special: bool) -> dict[str, Any]:
    """An entry of "added_tokens" for a token given as a string, or as an object with flags."""
    values = {"content": value} if isinstance(value, str) else value
    if not isinstance(values, dict) or not isinstance(values.get("content"), str):
        raise InputError(
            f"{place} lists the token {value!r:.60}, which must be a text: copy the file again"
        )
    flags = {name: values.get(name, False) for name in _FLAGS}
    flags["special"] = special or values.get("special", False)
    flags["normalized"] = values.get("normalized", not flags["special"])
    wrong = next((name for name, flag in flags.items() if not isinstance(flag, bool)), None)
    if wrong is not None:
        raise InputError(
            f"{place}: {wrong}={flags[wrong]!r:.40} of the token {values['content']!r:.40} must be "
            "true or false"
        )
    return {"content": values["content"], **flags}


def _number(place: Path, number: Any) -> int:
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 16:
        number = int(number)
    if type(number) is not int:
        raise InputError(
            f"{place} lists the id {number!r:.40}, which must be an integer: copy the file again"
        )
    return number


def with_added_tokens(
    folder: Path, description: dict[str, Any], tokens: AddedTokens, rows: int
) -> tuple[dict[str, Any], list[str]]:
    """The description with missing tokens added, and special ones past the rows dropped."""
    try:
        vocab = description["model"]["vocab"]
        known = dict(vocab) if isinstance(vocab, dict) else {p[0]: n for n, p in enumerate(vocab)}
        added = {token["content"]: dict(token) for token in description["added_tokens"] or []}
        special = {name for name, token in added.items() if token["special"]}
        reached = -1
        for name, token in added.items():
            if token["id"] != known.get(name, _following(reached, len(known))):
                return description, []  # `parts_of` raises for it
            reached = max(reached, token["id"])
        if any(type(number) is not int for number in known.values()):
            return description, []
    except (LookupError, TypeError, AttributeError, ValueError):
        return description, []
    for token in [*tokens.numbered, *tokens.others]:
        content = token["content"]
        if content in added:
            if "id" in token:  # its flags override those in tokenizer.json
                added[content] |= {**token, "id": added[content]["id"]}
        elif not is_single_character(content):
            number = known.get(content, token.get("id", _following(reached, len(known))))
            added[content] = {"id": number, **token}
            reached = max(reached, number)
    special |= {name for name, token in added.items() if token["special"]}
    past = {name for name, token in added.items() if token["id"] >= rows}
    if any(number >= rows for name, number in known.items() if name not in special):
        past = set()  # ordinary tokens also have ids past the rows: another model's tokenizer
    kept = sorted(past - special)
    if kept:
        raise InputError(
            f"{folder}: the tokenizer encodes text to the token {kept[0]!r:.40} with id "
            f"{added[kept[0]]['id']:,}, and the model has only {rows:,} rows: resize the model "
            "(model.resize_token_embeddings(len(tokenizer))), or use the tokenizer that belongs "
            "to it"
        )
    shown = ", ".join(repr(name)[:40] for name in sorted(past - tokens.implied)[:5])
    note = (
        f"{shown}: dropped, since the id is past the model's {rows:,} rows and no text is encoded "
        "to it"
    )
    described = {
        **description,
        "model": _without(description["model"], past),
        "added_tokens": [token for name, token in added.items() if name not in past],
    }
    return described, [note] if shown else []


def _following(reached: int, size: int) -> int:
    """The id that the tokenizers library gives to a new token; the vocabulary has `size` tokens."""
    return reached + 1 if reached >= size else size


def _without(model: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The model of a tokenizer without some of its tokens."""
    vocab = model["vocab"]
    if isinstance(vocab, dict) and names & vocab.keys():
        model = {**model, "vocab": {k: v for k, v in vocab.items() if k not in names}}
        pairs = [(m, m.split(" ") if isinstance(m, str) else m) for m in model.get("merges") or []]
        kept = [merge for merge, pair in pairs if not names & {*pair, "".join(pair)}]
        model |= {"merges": kept} if "merges" in model else {}
    elif isinstance(vocab, list):
        last = len(vocab)
        while last and vocab[last - 1][0] in names:
            last -= 1
        model = {**model, "vocab": vocab[:last]}
    return model


def optional_object(path: Path) -> dict[str, Any]:
    """The JSON object of a settings file; empty if there is no such file."""
    return read_object(path, TOKENIZER_SETTINGS) if path.is_file() else {}
