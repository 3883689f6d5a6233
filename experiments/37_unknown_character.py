"""Experiment 37: a character that the vocabulary lacks is an error, never a silent guess."""

from mygpt import CharTokenizer


def main() -> None:
    tokenizer = CharTokenizer.from_text("I love AI !")
    for text in ("I love", "I love you?"):
        try:
            print(f"{text!r}: {tokenizer.encode(text).tolist()}")
        except KeyError as error:
            print(f"{text!r}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
