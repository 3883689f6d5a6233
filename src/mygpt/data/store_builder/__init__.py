"""Build token stores. `build.py` has the entry point, `build_store`; the other modules serve it.

`jobs.py` splits documents into jobs at the positions that `chunking.py` finds, `pool.py` has
`worker.py`'s processes encode them, `words.py` is the encoder's cache, `tokenizer.py` trains the
tokenizer, and `index.py` reads and writes `index.json`.
"""
