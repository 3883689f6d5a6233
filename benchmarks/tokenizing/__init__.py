"""Speed of `mygpt tokenize` compared with the `tokenizers` library, and its memory."""
