"""Experiment 36: a tokenizer is saved as readable JSON and comes back the same."""

from pathlib import Path

from mygpt import CharTokenizer


def main() -> None:
    text = "I love AI !"
    path = Path("char_tokenizer.json")
    saved = CharTokenizer.from_text(text)
    saved.save(path)
    loaded = CharTokenizer.load(path)
    print(f"{path}: {path.read_text(encoding='utf-8')}")
    print(f"same characters: {loaded.chars == saved.chars}")
    print(f"same ids: {loaded.encode(text).equal(saved.encode(text))}")


if __name__ == "__main__":
    main()
