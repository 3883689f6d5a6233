"""Texts and rules for words, and a BPE tokenizer trained on a small text."""

from __future__ import annotations

from hypothesis import strategies as st

from mygpt.tokenization import END_OF_TEXT, BPETokenizer

PARAGRAPH = (
    "The quick brown fox's den isn't here; they'LL say 'tis 1234567 times!\n\n"
    "def f(x):\n    return x + 10  # naïve café, 東京都に行く。\r\n\tпривет, мир 🙂🙂👍🏽\n"
)
TEXT = (
    PARAGRAPH
    + "-----------\n   \n<|endoftext|> and again the quick brown fox, the quicker the better.\n"
) * 8
BPE = BPETokenizer.train([TEXT], 400)
END = 256
# The rules for words of Qwen2's and Llama 3's files.
QWEN_2, LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + "|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r"\p{N}", r"\p{N}{1,3}")
)

# Mostly characters that the rule for words distinguishes; the rest is any character.
_parts = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'re", "the", " quick", "12", "½", "²", "Ⅷ", "é",
     "e\u0301", "\u0301", "ſ", "'ſ", "\u00a0", "\u2028", "\u0085", "\x1c", "\u180e", "\u200b",
     "京", "🙂", "\u0903", "!", "...", "--", END_OF_TEXT, "<|", "_", "\x00", "İ", "ǅ", "𝔸", "𐌰"]
)  # fmt: skip
texts = st.one_of(st.lists(st.one_of(_parts, st.characters(codec="utf-8")), max_size=24)).map(
    "".join
)


def ids_of(tokenizer, pieces):
    return [i for row in tokenizer.encode_pieces(pieces) for i in row.tolist()]
