"""Experiment 38: the corpus in figures: its size, its alphabet, its first lines."""

from common import corpus_parser, read_corpus

from mygpt import CharTokenizer


def main() -> None:
    text = read_corpus(corpus_parser(__doc__).parse_args().path)
    tokenizer = CharTokenizer.from_text(text)
    print(f"bytes: {len(text.encode()):,}")
    print(f"characters: {len(text):,}")
    print(f"distinct characters: {tokenizer.vocab_size}")
    print(f"alphabet: {''.join(tokenizer.chars)!r}")
    print("first 100 characters:")
    print(text[:100])


if __name__ == "__main__":
    main()
