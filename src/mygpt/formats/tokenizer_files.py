"""Reading the tokenizer files of a Hugging Face folder into one `tokenizer.json` description.

A folder has its tokenizer in one file or in several: the vocabulary and merges (`vocab.json`,
`merges.txt`), added tokens (`added_tokens.json`, or "added_tokens_decoder" in
`tokenizer_config.json`), and the special tokens that begin, end and pad texts
(`tokenizer_config.json`, `special_tokens_map.json`). If there is no `tokenizer.json`, the class
named in the files decides how text is split into words. All of it is read as transformers reads
it; the tests compare with transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import InputError
from mygpt.file_access import open_regular
from mygpt.json_objects import TOKENIZER
from mygpt.tokenization import END_OF_TEXT
from mygpt.tokenization.base import read_json
from mygpt.tokenization.ends import read_settings
from mygpt.tokenization.tokenizer_json import (
    BYTE_LEVEL,
    TokenizerFile,
    describe,
    is_single_character,
    split_at,
)
from mygpt.tokenization.words import QWEN_2


class _Rules(NamedTuple):
    """How a tokenizer class of transformers splits words, and its default special tokens."""

    defaults: dict[str, str]  # its special tokens by role
    pattern: str | None = None  # the pattern of words; None is GPT-2's rule
    composed: bool = False  # whether text is normalized to NFC first
    enclosed: bool = False  # whether texts are enclosed by the tokens "cls" and "sep"


_GPT2 = _Rules(dict.fromkeys(("bos", "eos", "unk"), END_OF_TEXT))
_ROBERTA = _Rules(
    {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>",
     "mask": "<mask>"},
    enclosed=True,
)  # fmt: skip
_CLASSES = {
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "GPTNeoXTokenizer": _Rules({**_GPT2.defaults, "pad": "<|padding|>"}, composed=True),
    "Qwen2Tokenizer": _Rules(
        dict.fromkeys(("eos", "unk", "pad"), END_OF_TEXT), pattern=QWEN_2, composed=True
    ),
    **dict.fromkeys(
        ("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer",
         "MvpTokenizer"),
        _ROBERTA,
    ),
}  # fmt: skip
# The class for a model whose files name none, by the beginning of its "model_type".
_CLASS_OF_MODEL = {"gpt2": "GPT2Tokenizer", "qwen": "Qwen2Tokenizer"}
_REMEDY = (
    "let transformers write the tokenizer.json: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
# The order in which transformers adds missing special tokens.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Described(NamedTuple):
    """A folder's tokenizer."""

    description: dict[str, Any]  # the JSON object of its `tokenizer.json`
    end_of_text: str | None  # the text of its token with the role "eos"; None if no file names it
    notes: list[str]  # lines for the user


def read_description(folder: Path, rows: int | None) -> Described:
    """The tokenizer of a folder, as one `tokenizer.json`.

    Args:
        folder: the model's folder.
        rows: V of the model: special tokens with larger ids, which no text is encoded to, are
            dropped; None keeps all.

    Raises:
        InputError: if there is no tokenizer, a file is damaged, or its class is not known.
    """
    config = read_settings(folder / "tokenizer_config.json")
    rules = None
    if (folder / "tokenizer.json").is_file():
        description = read_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        rules = _rules(folder, config)
        description = _assembled(folder, rules, config)
    else:
        raise InputError(
            f"{folder} has no tokenizer that can be read, neither tokenizer.json nor vocab.json "
            f"with merges.txt: copy them there, or {_REMEDY}"
        )
    tokens, roles = _read_added_tokens(folder, config, {} if rules is None else rules.defaults)
    most = sys.maxsize if rows is None else rows
    description, notes = _with_added_tokens(folder, description, tokens, most)
    if rules is not None:
        description["post_processor"] = _around(description, roles, rules, config)
    return Described(description, roles.get("eos"), notes)


# --- vocab.json and merges.txt -------------------------------------------------------------


def _rules(folder: Path, config: dict[str, Any]) -> _Rules:
    """The rules of the class that the folder's files name."""
    model = read_settings(folder / "config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not isinstance(name, str):
        kind = model.get("model_type") or (model.get("architectures") or [""])[0]
        kind = str(kind).lower()
        name = next((c for k, c in _CLASS_OF_MODEL.items() if kind.startswith(k)), "")
    known = name.removesuffix("Fast")
    if known not in _CLASSES:
        raise InputError(
            f"{folder} has no tokenizer.json, and its tokenizer_class {name!r:.60} is not one "
            f"whose rules are known without it ({', '.join(_CLASSES)}): {_REMEDY}"
        )
    return _CLASSES[known]


def _assembled(folder: Path, rules: _Rules, config: dict[str, Any]) -> dict[str, Any]:
    """The `tokenizer.json` for a vocabulary, merges and the rules of a class."""
    vocab = read_json(folder / "vocab.json")
    model = {"type": "BPE", "vocab": vocab, "merges": _merges(folder / "merges.txt", vocab)}
    words = {**BYTE_LEVEL, "add_prefix_space": bool(config.get("add_prefix_space"))}
    words["use_regex"] = rules.pattern is None
    if rules.pattern is not None:
        words = split_at(rules.pattern, words)
    description = describe(model, words, BYTE_LEVEL, None)
    return {**description, "normalizer": {"type": "NFC"} if rules.composed else None}


def _merges(path: Path, vocab: dict[str, Any]) -> list[list[str]]:
    try:
        with open_regular(path, inside=False) as file:
            data = file.read(TOKENIZER.most_bytes + 1)
        lines = data.decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if len(data) > TOKENIZER.most_bytes:
        raise InputError(
            f"{path} is longer than {TOKENIZER.most_bytes:,} bytes, too long for a tokenizer: "
            "copy it again"
        )
    # Only the first line is a comment: a merge may begin with "#".
    rows = [line.rstrip("\r") for line in lines[lines[0].startswith("#version") :]]
    merges = [row.split(" ") for row in rows if row]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise InputError(
                f"{path}: the line {' '.join(merge)!r:.40} is not two tokens of vocab.json whose "
                "concatenation is a token, too: copy both files from one model"
            )
    return merges


def _around(
    description: dict[str, Any], roles: dict[str, str], rules: _Rules, config: dict[str, Any]
) -> dict[str, Any] | None:
    """The post-processor for the tokens that the class puts around every text."""
    ids = {token["content"]: token["id"] for token in description["added_tokens"]}
    first, last = roles.get("cls"), roles.get("sep")
    if not rules.enclosed or not {first, last} <= ids.keys():
        first, last = (
            roles.get(role) if config.get(f"add_{role}_token") is True else None
            for role in ("bos", "eos")
        )
    pieces: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if first in ids:
        pieces.insert(0, {"SpecialToken": {"id": first, "type_id": 0}})
    if last in ids:
        pieces.append({"SpecialToken": {"id": last, "type_id": 0}})
    if len(pieces) == 1:
        return None
    used = {str(name): ids[name] for name in (first, last) if name in ids}
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in used.items()
        },
    }


# --- added tokens --------------------------------------------------------------------------


def _read_added_tokens(
    folder: Path, config: dict[str, Any], defaults: dict[str, str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The tokens that files other than the vocabulary list.

    They are those of `tokenizer_config.json`, or of the older files if that lists no ids.

    Returns:
        Entries of "added_tokens": those with an id, in the order of their ids, then special ones
        without an id. And the special tokens' texts by role.
    """
    place, settings = folder / "tokenizer_config.json", config
    listed = config.get("added_tokens_decoder")
    if listed is None:
        place = folder / "added_tokens.json"
        settings = config | read_settings(folder / "special_tokens_map.json")
        pairs: list[Any] = [(number, text) for text, number in read_settings(place).items()]
    elif isinstance(listed, dict):
        pairs = list(listed.items())
    else:
        raise InputError(
            f"{place}: added_tokens_decoder={listed!r:.40} must be an object: copy the file again"
        )
    named = {f"{role}_token": content for role, content in defaults.items()} | settings
    special = [_entry(folder, value, special=True) for value in _special(named)]
    contents = {token["content"] for token in special}
    tokens = [{"id": _number(place, number), **_entry(place, value)} for number, value in pairs]
    for token in tokens:
        token["special"] |= token["content"] in contents
    tokens.sort(key=lambda token: int(token["id"]))
    given = {role: named.get(f"{role}_token") for role in _ROLES}
    roles = {r: str(_entry(folder, v)["content"]) for r, v in given.items() if v is not None}
    return tokens + special, roles


def _special(named: dict[str, Any]) -> Iterator[Any]:
    """The special tokens, in the order in which transformers adds them."""
    for role in _ROLES:
        if named.get(f"{role}_token") is not None:
            yield named[f"{role}_token"]
    for name, value in named.items():  # special to a model: "image_token"
        other = name.endswith("_token") and name.removesuffix("_token") not in _ROLES
        if other and isinstance(value, (str, dict)):
            yield value
    more = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    yield from more.values() if isinstance(more, dict) else more if isinstance(more, list) else []


def _entry(place: Path, value: Any, *, special: bool = False) -> dict[str, Any]:
    """An entry of "added_tokens" for a token given as a string, or as an object with flags."""
    values = {"content": value} if isinstance(value, str) else value
    if not isinstance(values, dict) or not isinstance(values.get("content"), str):
        raise InputError(
            f"{place} lists the token {value!r:.60}, which must be a text: copy the file again"
        )
    special = special or values.get("special", False)
    flags = {name: values.get(name, False) for name in _FLAGS}
    flags |= {"special": special, "normalized": values.get("normalized", not special)}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InputError(
                f"{place}: {name}={flag!r:.40} of the token {values['content']!r:.40} must be "
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


def _with_added_tokens(
    folder: Path, description: dict[str, Any], tokens: list[dict[str, Any]], rows: int
) -> tuple[dict[str, Any], list[str]]:
    """The description with missing tokens added, and special ones past the rows dropped."""
    file = TokenizerFile(description)
    added = {token["content"]: dict(token) for token in file.added}
    special = {file.names[number] for number in file.special}
    known = {name: number for number, name in file.numbered}
    reached = max((token["id"] for token in added.values()), default=-1)
    for token in tokens:
        content = token["content"]
        if content in added:
            if "id" in token:  # its flags override those in tokenizer.json
                added[content] |= {**token, "id": added[content]["id"]}
        elif not is_single_character(content):
            # The last is the id that the tokenizers library gives to a new token.
            number = known.get(content, token.get("id", max(reached + 1, len(known))))
            added[content] = {"id": number, **token}
            reached = max(reached, number)
    special |= {name for name, token in added.items() if token["special"]}
    past = {name for name, token in added.items() if token["id"] >= rows}
    if any(number >= rows for name, number in known.items() if name not in special):
        past = set()  # ordinary tokens also have ids past the rows: another model's tokenizer
    for name in sorted(past - special):
        raise InputError(
            f"{folder}: the tokenizer encodes text to the token {name!r:.40} with id "
            f"{added[name]['id']:,}, and the model has only {rows:,} rows: resize the model "
            "(model.resize_token_embeddings(len(tokenizer))), or use the tokenizer that belongs "
            "to it"
        )
    described = {
        **description,
        "model": _without(file, past),
        "added_tokens": [token for name, token in added.items() if name not in past],
    }
    shown = ", ".join(repr(name)[:40] for name in sorted(past)[:5])
    note = (
        f"{shown}: dropped, since the id is past the model's {rows:,} rows and no text is encoded "
        "to it"
    )
    return described, [note] if shown else []


def _without(file: TokenizerFile, names: set[str]) -> dict[str, Any]:
    """The model of a tokenizer without some of its last tokens."""
    model, known = file.model, [name for _, name in file.numbered if name in names]
    if not known:
        return model
    if isinstance(model["vocab"], list):
        return {**model, "vocab": model["vocab"][: -len(known)]}
    vocab = {name: number for name, number in model["vocab"].items() if name not in names}
    return {**model, "vocab": vocab} | (
        {"merges": file.merges_without(names)} if "merges" in model else {}
    )
