"""Build token stores: `build.py` has the entry point, `build_store`.

`request.py` compares the request with an existing store, `tokenizer.py` trains the tokenizer,
`jobs.py` splits documents into jobs at the positions that `chunking.py` finds, `pool.py` has the
processes of `worker.py` encode them, `words.py` is their cache of words, and `index.py` reads and
writes `index.json`.
"""
