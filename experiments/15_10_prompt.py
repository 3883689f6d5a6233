"""Section 15.10, third experiment: a prompt that begins in the middle of the cycle."""

from common import load_trained, words

from mygpt import generate, set_seed, to_ids


def main() -> None:
    model = load_trained()
    set_seed(0)
    prompt = to_ids(["love", "AI", "!"])[None]  # (1, 3)
    ids = generate(model, prompt, max_new_tokens=4)  # (1, 7)
    print(f"prompt:       {words(prompt[0])}")
    print(f"continuation: {words(ids[0, 3:])}")


if __name__ == "__main__":
    main()
