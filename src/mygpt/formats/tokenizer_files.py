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
from mygpt.json_objects import TOKENIZER, TOKENIZER_SETTINGS, read_object
from mygpt.tokenization import END_OF_TEXT
from mygpt.tokenization.bpe import read_json
from mygpt.tokenization.foreign_json import is_single_character

# The order in which transformers adds missing special tokens.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Rules(NamedTuple):
    """How a tokenizer class of transformers splits words, and its default special tokens.

    Attributes:
        defaults: its special tokens by role.
        pattern: the pattern of words; None is GPT-2's rule.
        composed: whether text is normalized to NFC first.
        enclosed: whether texts are enclosed by the tokens "cls" and "sep".
    """

    defaults: dict[str, str]
    pattern: str | None = None
    composed: bool = False
    enclosed: bool = False


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
        dict.fromkeys(("eos", "unk", "pad"), END_OF_TEXT), pattern=_QWEN2, composed=True
    ),
    **dict.fromkeys(
        ("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer",
         "MvpTokenizer"),
        _ROBERTA,
    ),
}  # fmt: skip
# The class for a model whose files name none, by the beginning of its "model_type".
_CLASS_OF_MODEL = {"gpt2": "GPT2Tokenizer", "qwen": "Qwen2Tokenizer"}
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
_REMEDY = (
    "let transformers write the tokenizer.json: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


class Described(NamedTuple):
    """A folder's tokenizer.

    Attributes:
        description: the JSON object of its `tokenizer.json`.
        roles: its special tokens by role ("eos", "pad", ...).
        notes: lines for the user.
    """

    description: dict[str, Any]
    roles: dict[str, str]
    notes: list[str]


def read_description(folder: Path, rows: int | None) -> Described:
    """The tokenizer of a folder, as one `tokenizer.json`.

    Args:
        folder: the model's folder.
        rows: V of the model: special tokens with larger ids, which no text is encoded to, are
            dropped; None keeps all.

    Raises:
        InputError: if there is no tokenizer, a file is damaged, or its class is not known.
    """
    config = _optional(folder / "tokenizer_config.json")
    rules = None
    if (folder / "tokenizer.json").is_file():
        description = read_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        rules = _rules(folder, config)
        description = _assembled(folder, rules, config)
    else:
        raise _no_tokenizer(folder)
    tokens = _tokens(folder, config, {} if rules is None else rules.defaults)
    described = _with_added(folder, description, tokens, sys.maxsize if rows is None else rows)
    if rules is not None:
        _set_ends(described, rules, config)
    return described


def _no_tokenizer(folder: Path) -> InputError:
    for name in ("tokenizer.model", "spiece.model", "vocab.txt", "tekken.json"):
        if (folder / name).exists():
            return InputError(f"{folder} has a {name} and no tokenizer.json: {_REMEDY}")
    return InputError(
        f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt: copy "
        "them there, or give a tokenizer's JSON with --tokenizer"
    )


def _rules(folder: Path, config: dict[str, Any]) -> _Rules:
    """The rules of the class that the folder's files name."""
    model = _optional(folder / "config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not isinstance(name, str):
        kind = model.get("model_type") or (model.get("architectures") or [""])[0]
        kind = str(kind).lower()
        name = next((c for k, c in _CLASS_OF_MODEL.items() if kind.startswith(k)), "")
    if not name:
        raise InputError(
            f"{folder} has a vocab.json and merges.txt, and no tokenizer_class in "
            f"tokenizer_config.json: {_REMEDY}"
        )
    if name.startswith(_GENERIC):
        raise InputError(
            f"{folder}: its tokenizer_class {name!r:.60} needs a tokenizer.json, which is missing: "
            "copy it there"
        )
    known = name.removesuffix("Fast")
    if known not in _CLASSES:
        raise InputError(
            f"{folder}: its tokenizer_class {name!r:.60} is not supported without a tokenizer.json "
            f"(supported are {', '.join(_CLASSES)}): {_REMEDY}"
        )
    return _CLASSES[known]


def _assembled(folder: Path, rules: _Rules, config: dict[str, Any]) -> dict[str, Any]:
    """The `tokenizer.json` for a vocabulary, merges and the rules of a class."""
    vocab, merges = read_json(folder / "vocab.json"), _merges(folder / "merges.txt")
    for pair in merges:
        if not {*pair, "".join(pair)} <= vocab.keys():
            raise InputError(
                f"{folder / 'merges.txt'} merges {pair[0]!r:.40} and {pair[1]!r:.40}, and "
                "vocab.json lacks one of them or the result: copy both files from one model"
            )
    spaced = bool(config.get("add_prefix_space"))
    as_bytes = {"type": "ByteLevel", "add_prefix_space": spaced, "trim_offsets": True}
    words: dict[str, Any] = {**as_bytes, "use_regex": rules.pattern is None}
    if rules.pattern is not None:
        cut = {"type": "Split", "pattern": {"Regex": rules.pattern}, "behavior": "Isolated"}
        words = {"type": "Sequence", "pretokenizers": [{**cut, "invert": False}, words]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if rules.composed else None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _merges(path: Path) -> list[list[str]]:
    try:
        if path.stat().st_size > TOKENIZER.most_bytes:
            raise InputError(
                f"{path} is longer than {TOKENIZER.most_bytes:,} bytes, too long for a tokenizer: "
                "copy it again"
            )
        lines = path.read_text(encoding="utf-8").split("\n")
    except InputError:  # which is a ValueError, too
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    # Only the first line is a comment: a merge may begin with "#".
    rows = [line.rstrip("\r") for line in lines[lines[0].startswith("#version") :]]
    merges = [row.split(" ") for row in rows if row]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong is not None:
        raise InputError(
            f"{path}: the line {' '.join(wrong)!r:.40} is not a pair of two tokens: copy the file "
            "again"
        )
    return merges


class _Tokens(NamedTuple):
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


def _tokens(folder: Path, config: dict[str, Any], defaults: dict[str, str]) -> _Tokens:
    """The tokens of `tokenizer_config.json`, or of the older files if that lists no ids."""
    place = folder / "tokenizer_config.json"
    listed = config.get("added_tokens_decoder")
    files = config
    numbered: list[dict[str, Any]] = []
    if listed is None:
        place = folder / "added_tokens.json"
        files = files | _optional(folder / "special_tokens_map.json")
    named = {f"{role}_token": content for role, content in defaults.items()} | files
    special = [_entry(folder, value, special=True) for value in _named(named)]
    contents = {token["content"] for token in special}
    if listed is None:
        for content, number in _optional(place).items():
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
    for role in _ROLES:
        named_role = named.get(f"{role}_token")
        text = named_role.get("content") if isinstance(named_role, dict) else named_role
        if isinstance(text, str):
            roles[role] = text
    by_files = [_entry(folder, v, special=True)["content"] for v in _named(files)]
    implied = frozenset(defaults.values()) - set(by_files)
    numbered.sort(key=lambda token: int(token["id"]))
    return _Tokens(numbered, special, roles, implied)


def _named(named: dict[str, Any]) -> Iterator[Any]:
    """The special tokens, in the order in which transformers adds them."""
    for role in _ROLES:
        if named.get(f"{role}_token") is not None:
            yield named[f"{role}_token"]
    more = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    others = {k: v for k, v in named.items() if k.endswith("_token") and isinstance(v, (str, dict))}
    for name, value in others.items():  # special to a model: "image_token"
        if name.removesuffix("_token") not in _ROLES:
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


def _with_added(folder: Path, description: dict[str, Any], tokens: _Tokens, rows: int) -> Described:
    """The description with missing tokens added, and special ones past the rows dropped."""
    unchanged = Described(description, tokens.roles, [])
    try:
        vocab = description["model"]["vocab"]
        known = dict(vocab) if isinstance(vocab, dict) else {p[0]: n for n, p in enumerate(vocab)}
        added = {token["content"]: dict(token) for token in description["added_tokens"] or []}
        special = {name for name, token in added.items() if token["special"]}
        reached = -1
        for name, token in added.items():
            if token["id"] != known.get(name, _following(reached, len(known))):
                return unchanged  # `parts_of` raises for it
            reached = max(reached, token["id"])
        if any(type(number) is not int for number in known.values()):
            return unchanged
    except (LookupError, TypeError, AttributeError, ValueError):
        return unchanged
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
    return Described(described, tokens.roles, [note] if shown else [])


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


def _set_ends(described: Described, rules: _Rules, config: dict[str, Any]) -> None:
    """Add the post-processor for the tokens that the class puts around every text."""
    roles, added = described.roles, described.description["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    if rules.enclosed and {roles.get("cls"), roles.get("sep")} <= ids.keys():
        around = {name: [roles[name], ids[roles[name]]] for name in ("sep", "cls")}
        described.description["post_processor"] = {
            "type": "RobertaProcessing",
            **around,
            "trim_offsets": True,
            "add_prefix_space": bool(config.get("add_prefix_space")),
        }
        return
    first, last = (
        roles.get(role) if config.get(f"add_{role}_token") is True else None
        for role in ("bos", "eos")
    )
    used = [name for name in (first, last) if name in ids]
    if not used:
        return
    pieces: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if first in used:
        pieces.insert(0, {"SpecialToken": {"id": first, "type_id": 0}})
    if last in used:
        pieces.append({"SpecialToken": {"id": last, "type_id": 0}})
    described.description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [ids[str(name)]], "tokens": [name]} for name in used
        },
    }


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, TOKENIZER_SETTINGS) if path.is_file() else {}
