"""Experiment 34: a character vocabulary is the sorted distinct characters of a text."""

from mygpt import CharTokenizer


def main() -> None:
    text = "I love AI ! I love AI !"
    tokenizer = CharTokenizer.from_text(text)
    print(f"text: {text!r}, {len(text)} characters")
    print(f"vocab_size: {tokenizer.vocab_size}")
    for token_id, char in tokenizer.itos.items():
        print(f"  {token_id}: {char!r}")


if __name__ == "__main__":
    main()
