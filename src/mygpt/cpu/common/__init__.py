"""What decoding and training share: vectors, products, threads, the cache of machine code."""
