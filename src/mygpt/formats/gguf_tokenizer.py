"""The tokenizer's part of a GGUF file, so that llama.cpp encodes text to the same ids as mygpt.

Tokenizers of Llama 2's kind (BPE over characters with byte fallback) become llama.cpp's "llama"
(`gguf_sentencepiece.py`). All others become its byte-level BPE, "gpt2":

- BPE is of that kind. llama.cpp knows the rule for splitting text into words by a name: mygpt's
  rule is "qwen2", except for the bound on runs (mygpt splits a run of more than 256 letters, signs
  or spaces).
- A byte tokenizer is BPE without merges.
- A character is a token of one or more bytes, with merges that form it from its bytes, from the
  first byte on. The intermediate results (the first two bytes of a three-byte character) have no
  id; llama.cpp does not require one. (A program that does, as one of Ollama's engines, drops
  characters of three and four bytes from a prompt.) No merge crosses the end of a character, since
  the first byte in UTF-8 gives its length, so every text of known characters gets the same ids.
  llama.cpp drops unknown characters from a prompt; mygpt raises an error.

llama.cpp's other tokenizers fit less: "llama" (SentencePiece) reads U+2581 as a space, "plamo2"
needs tokens for all 256 bytes, whose untrained rows could be sampled, and "rwkv" encodes the text
of the end token as that token, and does not terminate for an unknown character whose first byte is
also the first byte of a known one.

The end-of-text token is the only control token that mygpt adds; its name in a text stays text.
llama.cpp also treats some tokens as end tokens because of their names (`</s>`, `<|im_end|>`, ...).
No single character has such a name, and no BPE token does either, since letters and the signs
after them are different words. The end token is also given as the beginning-of-text token (as in
GPT-2, and as in training) and is never added automatically: without that entry llama.cpp would use
token 11 for both, which is a real character.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mygpt.errors import InputError
from mygpt.formats.gguf_file import Value
from mygpt.formats.gguf_sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    is_sentencepiece,
    sentencepiece,
)
from mygpt.tokenization import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    ForeignTokenizer,
    Tokenizer,
)
from mygpt.tokenization.tokenizer_json import SYMBOLS, Contents, check
from mygpt.tokenization.words import LIBRARY_PATTERN

# Names of end-of-text tokens in other families.
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>")
_QWEN2, _LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + "|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r"\p{N}", r"\p{N}{1,3}")
)
_MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_GPT_2 = "gpt-2"  # a rule that a tokenizer.json states by a flag, not by a pattern
_DIGITS = "each digit"  # the same
# llama.cpp's names, by the patterns of a pre-tokenizer and by "ignore_merges".
_NAMES = {
    (LIBRARY_PATTERN, False): "qwen2",
    (_QWEN2, False): "qwen2",
    (_LLAMA_3, False): "smaug-bpe",
    (_LLAMA_3, True): "llama-bpe",
    (_GPT_2, False): "gpt-2",
    (_DIGITS, _GPT_2, False): "smollm",
}
# Names of tokens with other roles.
_OTHER_ROLES = {
    "padding": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<PAD>"),
    "unknown": ("<unk>",),
}
_LOWEST = -1e4  # the score of padding tokens, which no merge forms


class _Vocabulary(NamedTuple):
    """A tokenizer in llama.cpp's terms: lists by id, and the rules by llama.cpp's names."""

    model: str
    rule: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    spaced: bool
    notes: list[str]


def tokenizer_values(tokenizer: Tokenizer, vocab_size: int) -> tuple[dict[str, Value], list[str]]:
    """The `tokenizer.ggml` values of a model, and notes for the user.

    Args:
        tokenizer: of the model.
        vocab_size: V of the model; ids past the tokenizer's become unused tokens.

    Raises:
        InputError: if the tokenizer has no end-of-text token, or llama.cpp does not support it.
    """
    vocabulary = _vocabulary(tokenizer)
    tokens, types, notes = vocabulary.tokens, vocabulary.types, vocabulary.notes
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
        raise InputError(
            f"this tokenizer adds {len(first)} tokens before each text, and llama.cpp at most one: "
            "export with --to hf"
        )
    values: dict[str, Value] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": vocabulary.merges,
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
    if vocabulary.model == "llama":
        scores = vocabulary.scores
        del values["tokenizer.ggml.merges"]
        values["tokenizer.ggml.scores"] = scores + [_LOWEST] * (vocab_size - len(scores))
        values["tokenizer.ggml.add_space_prefix"] = vocabulary.spaced
    return values, notes


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    """The tokenizer's own tokens and rules, without padding."""
    model, rule = "gpt2", "qwen2"
    merges: list[str] = []
    notes: list[str] = []
    if isinstance(tokenizer, (BPETokenizer, ForeignTokenizer)):
        description = tokenizer.to_state()["tokenizer"]
        if is_sentencepiece(description):
            tokens, types, scores, spaced, notes = sentencepiece(description)
            return _Vocabulary("llama", "default", tokens, types, merges, scores, spaced, notes)
        tokens, types, merges, rule, notes = _bpe(description)
    elif isinstance(tokenizer, CharTokenizer):
        tokens, types, merges = _character_tokens(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer):
        tokens, types = [*SYMBOLS, END_OF_TEXT], [NORMAL] * 256 + [CONTROL]
    else:
        raise InputError(
            f"a tokenizer of kind {tokenizer.kind!r:.20} cannot be exported to GGUF: export with "
            "--to hf"
        )
    return _Vocabulary(model, rule, tokens, types, merges, [], False, notes)


def _bpe(
    description: dict[str, Any],
) -> tuple[list[str], list[int], list[str], str, list[str]]:
    """Tokens, types, merges, the rule's name and notes of byte-level BPE."""
    try:
        contents = check(description)
    except InputError as error:
        raise InputError(
            f"llama.cpp does not support this tokenizer ({error}): export with --to hf"
        ) from None
    _check_added(description)
    tokens, types = _bpe_tokens(description, contents)
    merges = [m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]]
    notes = []
    if description.get("normalizer"):
        notes.append(
            "the tokenizer normalizes text to NFC, and llama.cpp does not: give it text in NFC"
        )
    return tokens, types, merges, _rule(description), notes


def _check_added(description: dict[str, Any]) -> None:
    """Raise for added tokens that absorb adjacent spaces, which llama.cpp does not support."""
    for token in description.get("added_tokens") or []:
        taken = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
        if taken and not token["special"]:
            raise InputError(
                f"the added token {token['content']!r:.40} has {taken[0]}, which llama.cpp does "
                "not support: export with --to hf"
            )


def _in_symbols(data: bytes) -> str:
    return "".join(SYMBOLS[byte] for byte in data)


def _character_tokens(tokenizer: CharTokenizer) -> tuple[list[str], list[int], list[str]]:
    """The tokens, their types, and the merges that form characters of several bytes."""
    tokens = [_in_symbols(char.encode("utf-8")) for char in tokenizer.chars]
    merges = [f"{token[:n]} {token[n]}" for token in tokens for n in range(1, len(token))]
    ends = [END_OF_TEXT] if tokenizer.end_of_text is not None else []
    types = [NORMAL] * len(tokens) + [CONTROL] * len(ends)
    return tokens + ends, types, list(dict.fromkeys(merges))


def _bpe_tokens(description: dict[str, Any], contents: Contents) -> tuple[list[str], list[int]]:
    names = {number: token for token, number in description["model"]["vocab"].items()}
    names.update(contents.added)
    types = [NORMAL] * len(names)
    for number in contents.added:
        types[number] = CONTROL if number in contents.control else USER_DEFINED
    return [names[number] for number in range(len(names))], types


def _rule(description: dict[str, Any]) -> str:
    """llama.cpp's name for the rule by which a checked tokenizer splits text into words."""
    splitter = description["pre_tokenizer"]
    *cuts, last = splitter.get("pretokenizers", [splitter])
    rules: list[Any] = [_cut(cut) for cut in cuts]
    if last.get("use_regex", True):
        rules.append(_GPT_2)
    whole = bool(description["model"].get("ignore_merges"))
    name = _NAMES.get((*rules, whole))
    if name is None:
        raise InputError(
            "this tokenizer's rule for splitting text into words is not one of those that can be "
            "exported to GGUF (GPT-2's, Llama 3's, Qwen2's, SmolLM's): export with --to hf"
        )
    return name


def _cut(cut: dict[str, Any]) -> str | None:
    """The pattern of a step of a checked pre-tokenizer, as in the keys of `_NAMES`."""
    if cut["type"] == "Digits":
        return _DIGITS if cut.get("individual_digits") else None
    pattern: str | None = cut["pattern"].get("Regex")
    return _DIGITS if pattern == r"\p{N}" else pattern


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
            raise InputError(
                f"the token {token!r:.40} occurs twice, or contains a NUL, which llama.cpp does "
                "not support: export with --to hf"
            )
        seen.add(token)
