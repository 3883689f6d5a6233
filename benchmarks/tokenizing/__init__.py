"""`mygpt tokenize` beside the `tokenizers` library's own batches, and the memory it takes."""
