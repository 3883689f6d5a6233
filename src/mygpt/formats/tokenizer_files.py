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
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import InputError
from mygpt.formats.added_tokens import optional_object, read_added_tokens, with_added_tokens
from mygpt.json_objects import TOKENIZER
from mygpt.tokenization import END_OF_TEXT
from mygpt.tokenization.bpe import read_json

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
    config = optional_object(folder / "tokenizer_config.json")
    rules = None
    if (folder / "tokenizer.json").is_file():
        description = read_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        rules = _rules(folder, config)
        description = _assembled(folder, rules, config)
    else:
        raise _no_tokenizer(folder)
    tokens = read_added_tokens(folder, config, {} if rules is None else rules.defaults)
    most = sys.maxsize if rows is None else rows
    description, notes = with_added_tokens(folder, description, tokens, most)
    described = Described(description, tokens.roles, notes)
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
    model = optional_object(folder / "config.json")
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
