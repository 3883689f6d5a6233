"""The tokenizer's part of a GGUF file, so that llama.cpp encodes text to the same ids as mygpt.

Tokenizers of Llama 2's kind (BPE over characters with byte fallback) become llama.cpp's "llama".
All others become its byte-level BPE, "gpt2":

- BPE is of that kind. llama.cpp knows the rule for splitting text into words by a name: mygpt's
  rule is "qwen2", except for the bound on runs (mygpt splits a run of more than 256 letters, signs
  or spaces).
- A byte tokenizer is BPE without merges.
- A character is a token of one or more bytes, with merges that form it from its bytes, from the
  first byte on. The intermediate results have no id; llama.cpp does not require one. (One of
  Ollama's engines does, and drops characters of three and four bytes from a prompt.) The first
  byte in UTF-8 gives a character's length, so no merge crosses the end of a character, and a text
  of known characters gets the same ids. llama.cpp drops unknown characters from a prompt; mygpt
  raises an error. llama.cpp's other tokenizers would change texts, or could sample untrained rows.

The end-of-text token is the only control token that mygpt adds; its name in a text stays text.
llama.cpp also treats tokens of some names as end tokens (`</s>`, `<|im_end|>`, ...). No character
has such a name, and no BPE token, since letters and the signs after them are different words. The
end token is also given as the beginning-of-text token (as in GPT-2, and as in training) and is
never added automatically: without that entry llama.cpp would use token 11, a real character.

llama.cpp's "llama" (SentencePiece's BPE) has scores in place of a list of merges: of all adjacent
pairs whose concatenation is a token it merges the pair whose token has the highest score, the
leftmost first. A list of merges is equivalent if it contains every split of every token, and all
splits of one token follow each other. That is checked; a token's score is then minus its rank in
the list.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any, NamedTuple

from mygpt.errors import InputError
from mygpt.tokenization import CharTokenizer, Tokenizer
from mygpt.tokenization.tokenizer_json import (
    DIGITS,
    TokenizerFile,
    to_symbols,
    word_rules,
)
from mygpt.tokenization.words import GPT_2, LIBRARY_PATTERN, LLAMA_3, QWEN_2

Value = str | bool | int | float | list[str] | list[int] | list[float]  # of an entry of the file

# llama.cpp's numbers for the types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Names of end-of-text tokens in other families.
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>")
_MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
# llama.cpp's names, by the rules of a pre-tokenizer and by "ignore_merges".
_NAMES: dict[tuple[tuple[str | None, ...], bool], str] = {
    ((LIBRARY_PATTERN,), False): "qwen2",
    ((QWEN_2,), False): "qwen2",
    ((LLAMA_3,), False): "smaug-bpe",
    ((LLAMA_3,), True): "llama-bpe",
    ((GPT_2,), False): "gpt-2",
    ((DIGITS, GPT_2), False): "smollm",
}
# Names of tokens with other roles.
_OTHER_ROLES = {
    "padding": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<PAD>"),
    "unknown": ("<unk>",),
}
_LOWEST = -1e4  # the score of padding tokens, which no merge forms

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


class _Vocabulary(NamedTuple):
    """A tokenizer in llama.cpp's terms."""

    tokens: list[str]  # by id
    types: list[int]  # by id
    values: dict[str, Value]  # the entries of its kind: its name, and the merges
    scores: list[float]  # by id; empty for a kind that has merges
    notes: list[str]  # for the user


def tokenizer_values(tokenizer: Tokenizer, vocab_size: int) -> tuple[dict[str, Value], list[str]]:
    """The `tokenizer.ggml` values of a model, and notes for the user.

    Args:
        tokenizer: of the model.
        vocab_size: V of the model; ids past the tokenizer's become unused tokens.

    Raises:
        InputError: if the tokenizer has no end-of-text token, or llama.cpp does not support it.
    """
    tokens, types, own, scores, notes = _vocabulary(tokenizer)
    end = _end(tokenizer, tokens, types)
    others = [number for number in tokenizer.other_ends if number != end]
    if len(others) > len(_MORE_ENDS):
        ignored = ", ".join(map(repr, others[len(_MORE_ENDS) :]))
        notes.append(f"GGUF has no entry for the ids {ignored:.80}, which also end a text in mygpt")
    _fill(tokens, types, vocab_size)
    for token in (end, *others):
        types[token] = CONTROL
    first = tokenizer.beginning
    if len(first) > 1:
        raise _refused(f"{len(first)} tokens that begin each text (llama.cpp adds at most one)")
    values: dict[str, Value] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **own,
        "tokenizer.ggml.bos_token_id": first[0] if first else end,
        "tokenizer.ggml.eos_token_id": end,
        # llama.cpp has entries for two more tokens that end a text.
        **dict(zip(_MORE_ENDS, others, strict=False)),
        "tokenizer.ggml.add_bos_token": bool(first),
        "tokenizer.ggml.add_eos_token": False,
    }
    for role, names in _OTHER_ROLES.items():
        number = next((tokens.index(name) for name in names if name in tokens), None)
        if number is not None and types[number] in (CONTROL, UNKNOWN):
            values[f"tokenizer.ggml.{role}_token_id"] = number
    if scores:
        values["tokenizer.ggml.scores"] = scores + [_LOWEST] * (vocab_size - len(scores))
    return values, notes


def _refused(what: str) -> InputError:
    return InputError(
        f"this tokenizer has {what}, which llama.cpp does not support: export with --to hf"
    )


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    """The tokenizer's own tokens and rules, without padding."""
    if isinstance(tokenizer, CharTokenizer):
        return _characters(tokenizer)
    file = TokenizerFile(tokenizer.to_json())
    if file.model.get("byte_fallback") and "merges" in file.model:
        return _sentencepiece(file)
    return _bpe(file)


def _end(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> int:
    """The id of the end-of-text token; `InputError` if there is none."""
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    for name in _OTHER_ENDS:
        if name in tokens and types[tokens.index(name)] == CONTROL:
            return tokens.index(name)
    raise InputError(
        f"this model's vocabulary of {len(tokens):,} has no end-of-text token, and llama.cpp would "
        "use a real token as one: train without --preset tutorial (new tokenizers have one), or "
        "export with --to hf"
    )


def _fill(tokens: list[str], types: list[int], vocab_size: int) -> None:
    """Add unused tokens up to the model's vocabulary; raise for names that llama.cpp rejects."""
    if len(tokens) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokens):,} ids and the model {vocab_size:,}: import the model "
            "with its own tokenizer"
        )
    tokens += [f"[PAD{number}]" for number in range(len(tokens), vocab_size)]
    types += [UNUSED] * (vocab_size - len(types))
    seen: set[str] = set()
    for token in tokens:
        if token in seen or "\0" in token:
            raise _refused(f"the token {token!r:.40} twice, or with a NUL in it")
        seen.add(token)


# --- byte-level BPE ------------------------------------------------------------------------


def _byte_level(rule: str, merges: list[str]) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.merges": merges,
    }


def _characters(tokenizer: CharTokenizer) -> _Vocabulary:
    """Tokens of one character, and the merges that form those of several bytes."""
    tokens = [to_symbols(token.decode()) for token in tokenizer.tokens]
    types = [CONTROL if n in tokenizer.control else NORMAL for n in range(len(tokens))]
    characters = tokens[: len(tokenizer.chars)]
    merges = [f"{token[:n]} {token[n]}" for token in characters for n in range(1, len(token))]
    return _Vocabulary(tokens, types, _byte_level("qwen2", list(dict.fromkeys(merges))), [], [])


def _bpe(file: TokenizerFile) -> _Vocabulary:
    try:
        _ = file.byte_level
    except InputError as error:
        raise InputError(
            f"llama.cpp does not support this tokenizer ({error}): export with --to hf"
        ) from None
    for token in file.added:
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name) and not token["special"]:
                raise _refused(f"the added token {token['content']!r:.40} with {name}")
    merges = list(map(" ".join, file.merges))
    ignored = bool(file.model.get("ignore_merges"))
    rule = _NAMES.get((tuple(word_rules(file.description["pre_tokenizer"])), ignored))
    if not merges:  # a byte tokenizer: words do not matter
        rule = "qwen2"
    if rule is None:
        raise InputError(
            "this tokenizer's rule for splitting text into words is not one of those that can be "
            "exported to GGUF (GPT-2's, Llama 3's, Qwen2's, SmolLM's): export with --to hf"
        )
    notes = []
    if file.description.get("normalizer"):
        notes.append(
            "the tokenizer normalizes text to NFC, and llama.cpp does not: give it text in NFC"
        )
    tokens, types = _tokens(file)
    return _Vocabulary(tokens, types, _byte_level(rule, merges), [], notes)


def _tokens(file: TokenizerFile) -> tuple[list[str], list[int]]:
    """The tokens and their types by id; `InputError` if ids have gaps."""
    if file.size > len(file.names):
        raise _refused(f"ids that are not 0 to {len(file.names) - 1:,}")
    types = [NORMAL] * file.size
    for token in file.added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return [file.names[number] for number in range(file.size)], types


# --- BPE over characters with byte fallback --------------------------------------------------


def _sentencepiece(file: TokenizerFile) -> _Vocabulary:
    """For a tokenizer of Llama 2's kind that the tokenizers library loads.

    Raises:
        InputError: naming a rule that llama.cpp does not have.
    """
    model = file.model
    spaced, notes = _spaces(file.description)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise _refused(f"{name}={model[name]!r:.40}")
    tokens, types = _tokens(file)
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    if missing:
        raise _refused(f"no token for byte {missing[0]}")
    for number, name in enumerate(tokens):
        if name == model.get("unk_token"):
            types[number] = UNKNOWN
        elif types[number] == NORMAL and _BYTE.fullmatch(name):
            types[number] = BYTE
    of_type = list(zip(tokens, types, strict=True))
    scores = _scores(file.merges, {name for name, kind in of_type if kind == NORMAL})
    spelled = [name for name, kind in of_type if kind in (UNKNOWN, CONTROL, BYTE)]
    reached = [name for name in spelled if _splits(name, model["vocab"])]
    if reached:
        notes.append(
            f"llama.cpp encodes the text {', '.join(map(repr, reached[:3]))} in a prompt as the "
            "token of that name, and mygpt does not"
        )
    tokens = [name.replace(_SPACE, " ") if kind == USER_DEFINED else name for name, kind in of_type]
    lowest = -float(len(tokens))  # of tokens that no merge forms
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": spaced,
    }
    by_id = [scores.get(token, lowest) for token in tokens]
    return _Vocabulary(tokens, types, values, by_id, notes)


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
    if splitter.get("prepend_scheme", "always") == "never":
        return False, []
    return True, ["llama.cpp adds a space before text that begins with one, and mygpt does not"]


def _scores(merges: list[tuple[str, str]], tokens: set[str]) -> dict[str, float]:
    """The score of each token that merges form: minus its rank in the list."""
    scores: dict[str, float] = {}
    before = None
    for pair in merges:
        token = "".join(pair)
        if token != before and token in scores:
            raise _refused(f"merges to {token!r:.40} that do not follow each other in its list")
        before = token
        scores.setdefault(token, -float(len(scores)))
    known = set(merges)
    for token in tokens:
        missing = next((pair for pair in _splits(token, tokens) if pair not in known), None)
        if missing is not None:
            raise _refused(f"no merge of {missing[0]!r:.40} and {missing[1]!r:.40}")
    return scores


def _splits(token: str, tokens: Container[str]) -> list[tuple[str, str]]:
    """The splits of a token into two texts, each a single character or a token."""
    halves = [(token[:n], token[n:]) for n in range(1, len(token))]
    return [pair for pair in halves if all(len(half) == 1 or half in tokens for half in pair)]
