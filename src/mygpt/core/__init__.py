"""A small complete GPT: model, cache, sampling, generation, tokenizer, data and training.

Start at README.md in this folder. Nothing here imports another part of mygpt but `errors`.
"""
