"""Experiment 35: text becomes ids, and the ids become the same text."""

from mygpt import CharTokenizer


def main() -> None:
    text = "I love AI ! I love AI !"
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)  # (T,) int64
    print(f"ids: {ids.dtype}, shape {tuple(ids.shape)}")
    print(f"first 12: {ids[:12].tolist()}")
    print(f"decoded:  {tokenizer.decode(ids)!r}")
    print(f"same as the text: {tokenizer.decode(ids) == text}")


if __name__ == "__main__":
    main()
