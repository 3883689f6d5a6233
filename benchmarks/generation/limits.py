"""The machine's limits: memory bandwidth and float32 GEMM rate, by number of threads.

Bandwidth is measured with torch.sum and torch.mv, whichever is faster, on memory that was written
before (reading untouched pages is several times faster); the GEMM rate with torch.mm. The fastest
of many repetitions is taken. Times include the call overhead, which is a large part at 0.8 MB.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

SIZES_MB = {"500 MB": 500.0, "42 MB": 42.0, "0.8 MB": 0.8}


def best_s(work: Callable[[], object], budget_s: float = 1.0) -> float:
    """Seconds of the fastest repetition within a time budget, of at least three."""
    best, end = float("inf"), time.perf_counter() + budget_s
    repetitions = 0
    while repetitions < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
        repetitions += 1
    return best


def measure(threads: int) -> dict[str, float]:
    """GB/s by size of the matrix that is read, and GFLOP/s of a product of 1024 x 1024 matrices."""
    import torch

    torch.set_num_threads(threads)
    found = {}
    for name, size_mb in SIZES_MB.items():
        columns = 4096 if size_mb > 10 else 512
        matrix = torch.randn(int(size_mb * 1e6 / 4 / columns), columns)
        vector = torch.randn(columns)
        seconds = min(best_s(matrix.sum), best_s(lambda m=matrix, v=vector: m.mv(v)))
        found[name] = matrix.numel() * 4 / seconds / 1e9
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    found["gemm"] = 2 * 1024**3 / best_s(lambda: a @ b) / 1e9
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
