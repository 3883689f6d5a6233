"""The fields that Python and the kernel of n-gram predictions share.

Letters: M positions, N tokens of the text, V vocabulary.
"""

# The job, int64: the address of positions (M,) int64, of the text's ids (N,) uint32, of `lowest`
# (N,) uint32, of the levels, of the result (M, V) float32; then M, V, levels, threads.
JOB_SIZE = 9
POSITIONS, TOKENS, LOWEST, LEVELS, OUT, COUNT, VOCAB, ORDER, THREADS = range(JOB_SIZE)
# A level, int64: addresses of the arrays of `Level`.
LEVEL_SIZE = 5
CONTEXTS, STARTS, FOLLOWERS, COUNTS, DISCOUNTS = range(LEVEL_SIZE)
