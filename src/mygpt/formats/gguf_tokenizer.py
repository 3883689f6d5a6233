"""A tokenizer in GGUF, so that llama.cpp splits text as we do: as its byte-level BPE ("gpt2").

Merges over characters with bytes for the rest, Llama 2's, become llama.cpp's "llama"
(`gguf_sentencepiece.py`). What follows is of the others.

BPE is that already. Its rule for where words end goes by a name: ours is Qwen2's, but for the
bound on runs (a run of more than 256 letters, signs or spaces is cut elsewhere).

Bytes are BPE without merges. Characters are tokens of one or more bytes, each with the merges
that build it from its bytes, first byte first. What those merges make on the way (the first two
bytes of a three-byte character) is no token, needs no id, and llama.cpp does not ask for one. (A
program that does, as one of Ollama's engines, loses characters of three and four bytes from a
prompt.) No merge reaches over the end of a character, since UTF-8's first byte tells its length;
so every text of known characters gets our ids. Characters that are not in the vocabulary are left
out of a prompt, where mygpt refuses them.

What else llama.cpp has would serve worse: "llama" (SentencePiece) takes U+2581 for a space,
"plamo2" wants tokens for all 256 bytes, whose untrained rows could be drawn, and "rwkv" takes text
that spells the end token for that token, and never returns from an unknown character whose first
byte is also a known one's.

The end token is the one control token of ours: text that spells it stays text. llama.cpp also
takes tokens for ends by what they spell (`</s>`, `<|im_end|>`, ...); no character does, and no
rule for words lets letters and the signs after them become one token. The end token is named as
beginning of text too (as GPT-2 has it, and as training has seen it) and never added: where that
is left open, llama.cpp takes token 11 for both, which would be a real character.
"""

from __future__ import annotations

from typing import Any

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

# What other families' tokenizers call the end of a text.
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>")
_QWEN2, _LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + "|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r"\p{N}", r"\p{N}{1,3}")
)
_MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_GPT_2 = "gpt-2"  # whose rule has no text of its own in a tokenizer.json
_DIGITS = "each digit"  # nor has this one
# llama.cpp's names, by rules and by whether a word that is a token is taken without merging.
_NAMES = {
    (LIBRARY_PATTERN, False): "qwen2",
    (_QWEN2, False): "qwen2",
    (_LLAMA_3, False): "smaug-bpe",
    (_LLAMA_3, True): "llama-bpe",
    (_GPT_2, False): "gpt-2",
    (_DIGITS, _GPT_2, False): "smollm",
}
# What other roles' tokens are called.
_OTHER_ROLES = {
    "padding": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<PAD>"),
    "unknown": ("<unk>",),
}
_LOWEST = -1e4  # the score of what no merge makes


def tokenizer_values(tokenizer: Tokenizer, vocab_size: int) -> tuple[dict[str, Value], list[str]]:
    """The `tokenizer.ggml` values of a model, and what the user should know.

    Args:
        tokenizer: of the model.
        vocab_size: V of the model; ids past the tokenizer's become unused tokens.

    Raises:
        InputError: without an end-of-text token, or for a tokenizer llama.cpp has no rule for.
    """
    notes: list[str] = []
    scores: list[float] = []
    merges: list[str] = []
    model, rule, spaced = "gpt2", "qwen2", False
    if isinstance(tokenizer, (BPETokenizer, ForeignTokenizer)):
        description = tokenizer.to_state()["tokenizer"]
        if is_sentencepiece(description):
            model, rule = "llama", "default"
            tokens, types, scores, spaced, notes = sentencepiece(description)
        else:
            tokens, types, merges, rule, notes = _bpe(description)
    elif isinstance(tokenizer, CharTokenizer):
        tokens, types, merges = _character_tokens(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer):
        tokens, types = [*SYMBOLS, END_OF_TEXT], [NORMAL] * 256 + [CONTROL]
    else:
        raise InputError(
            f"a tokenizer of kind {tokenizer.kind!r:.20} does not go into GGUF: use --to hf"
        )
    end = _end(tokenizer, tokens, types)
    others = [number for number in tokenizer.other_ends if number != end]
    if len(others) > len(_MORE_ENDS):
        left_out = ", ".join(map(repr, others[len(_MORE_ENDS) :]))
        notes.append(f"GGUF has no place for the ids {left_out:.80}, which end a text here too")
    _fill(tokens, types, vocab_size)
    for token in (end, *others):
        types[token] = CONTROL
    first = tokenizer.beginning
    if len(first) > 1:
        raise InputError(
            f"this tokenizer begins texts with {len(first)} tokens, and llama.cpp with one: export "
            "with --to hf"
        )
    values: dict[str, Value] = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": first[0] if first else end,
        "tokenizer.ggml.eos_token_id": end,
        # What ends a text too: llama.cpp has places for two more.
        **dict(zip(_MORE_ENDS, others, strict=False)),
        "tokenizer.ggml.add_bos_token": bool(first),
        "tokenizer.ggml.add_eos_token": False,
    }
    for role, names in _OTHER_ROLES.items():
        number = next((tokens.index(name) for name in names if name in tokens), None)
        if number is not None and types[number] in (CONTROL, UNKNOWN):
            values[f"tokenizer.ggml.{role}_token_id"] = number
    if model == "llama":
        del values["tokenizer.ggml.merges"]
        values["tokenizer.ggml.scores"] = scores + [_LOWEST] * (vocab_size - len(scores))
        values["tokenizer.ggml.add_space_prefix"] = spaced
    return values, notes


def _bpe(
    description: dict[str, Any],
) -> tuple[list[str], list[int], list[str], str, list[str]]:
    """Tokens, types, merges, the rule's name and notes of byte-level BPE."""
    try:
        contents = check(description)
    except InputError as error:
        raise InputError(
            f"llama.cpp has no tokenizer like this one here ({error}): export with --to hf"
        ) from None
    _check_added(description)
    tokens, types = _bpe_tokens(description, contents)
    merges = [m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]]
    notes = []
    if description.get("normalizer"):
        notes.append("llama.cpp does not compose characters (NFC): give it text that is NFC")
    return tokens, types, merges, _rule(description), notes


def _check_added(description: dict[str, Any]) -> None:
    """Refuse added tokens of text that take the spaces beside them, which llama.cpp's do not."""
    for token in description.get("added_tokens") or []:
        taken = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
        if taken and not token["special"]:
            raise InputError(
                f"llama.cpp knows no {taken[0]} of an added token, as {token['content']!r:.40} has "
                "it: export with --to hf"
            )


def _in_symbols(data: bytes) -> str:
    return "".join(SYMBOLS[byte] for byte in data)


def _character_tokens(tokenizer: CharTokenizer) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types, and the merges that build characters of several bytes."""
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
    """llama.cpp's name for where a checked tokenizer's words begin and end."""
    splitter = description["pre_tokenizer"]
    *cuts, last = splitter.get("pretokenizers", [splitter])
    rules: list[Any] = [_cut(cut) for cut in cuts]
    if last.get("use_regex", True):
        rules.append(_GPT_2)
    whole = bool(description["model"].get("ignore_merges"))
    name = _NAMES.get((*rules, whole))
    if name is None:
        raise InputError(
            "this tokenizer's rule for words is none of those known here by llama.cpp's names "
            "(GPT-2's, Llama 3's, Qwen2's, SmolLM's): export with --to hf"
        )
    return name


def _cut(cut: dict[str, Any]) -> str | None:
    """What a checked pre-tokenizer cuts at, by which `_NAMES` knows it."""
    if cut["type"] == "Digits":
        return _DIGITS if cut.get("individual_digits") else None
    pattern: str | None = cut["pattern"].get("Regex")
    return _DIGITS if pattern == r"\p{N}" else pattern


def _end(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> int:
    """The id that ends a text."""
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    for name in _OTHER_ENDS:
        if name in tokens and types[tokens.index(name)] == CONTROL:
            return tokens.index(name)
    raise InputError(
        f"this model's vocabulary of {len(tokens):,} has no end-of-text token, and llama.cpp would "
        "take a real one for it: train without --preset tutorial (new tokenizers have one), or "
        "export with --to hf"
    )


def _fill(tokens: list[str], types: list[int], vocab_size: int) -> None:
    """Name the ids that the model has and the tokenizer has not; check what llama.cpp asserts."""
    if len(tokens) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokens):,} ids and the model {vocab_size:,}: this is not "
            "the model's tokenizer"
        )
    tokens += [f"[PAD{number}]" for number in range(len(tokens), vocab_size)]
    types += [UNUSED] * (vocab_size - len(types))
    seen: set[str] = set()
    for token in tokens:
        if token in seen or "\0" in token:
            raise InputError(
                f"the token {token!r:.40} is there twice, or holds a NUL, which llama.cpp does not "
                "take: export with --to hf"
            )
        seen.add(token)
