"""Texts of many kinds, made on this machine, on which the default recipe is tuned and tested.

`python -m benchmarks.texts.make FOLDER` writes the texts. `python -m benchmarks.texts FOLDER`
trains on each for several times, and compares with hand-set options, n-grams and compressors.
"""
