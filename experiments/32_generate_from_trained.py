"""Experiment 32: the same continuation as experiment 30, through `generate` with top_k=1."""

from common import load_trained, words

from mygpt import generate, to_ids


def main() -> None:
    prompt = to_ids(["I"])[None]  # (1, 1)
    ids = generate(load_trained(), prompt, max_new_tokens=7, top_k=1)  # (1, 8)
    print(f"prompt: {words(prompt[0])}")
    print(f"output: {words(ids[0])}")


if __name__ == "__main__":
    main()
