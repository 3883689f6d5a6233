"""Experiment 40: two hundred characters after "ROMEO:" from the model of experiment 39."""

import torch
from common import SHAKESPEARE_MODEL, SHAKESPEARE_TOKENIZER, require

from mygpt import GPT, CharTokenizer, generate, set_seed


def main() -> None:
    for name in (SHAKESPEARE_MODEL, SHAKESPEARE_TOKENIZER):
        require(name, "39_train_shakespeare.py")
    tokenizer = CharTokenizer.load(SHAKESPEARE_TOKENIZER)
    model = GPT(tokenizer.vocab_size, embed_dim=64, num_heads=4, num_layers=4, max_seq_len=64)
    model.load_state_dict(torch.load(SHAKESPEARE_MODEL, weights_only=True))
    set_seed(0)
    prompt = tokenizer.encode("ROMEO:")[None]  # (1, 6)
    ids = generate(model, prompt, max_new_tokens=200, temperature=1.0, top_k=10)  # (1, 206)
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    main()
