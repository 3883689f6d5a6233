"""mygpt's engines, with the same interface as the other programs."""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.generation.models import CONFIGS, build
from benchmarks.generation.torch_peers import Run
from numpy.typing import NDArray


def cpu(
    size: str,
    prompt: NDArray[np.int64],
    *,
    threads: int | None,
    weights: str = "float32",
    overflow: str = "crop",
    drafts: bool = False,
) -> Run:
    """The CPU engine (machine code by Numba), greedy; with drafts copied from the text, or not."""
    from mygpt.checkpoint.model_file import model_arrays
    from mygpt.core.config import SamplingConfig
    from mygpt.core.random import Stream
    from mygpt.cpu.decode.engine import CpuEngine
    from mygpt.cpu.decode.speculation import Drafts
    from mygpt.engine import Request

    engine = CpuEngine(
        CONFIGS[size],
        model_arrays(build(size)),
        weights=weights,
        threads=threads,
        drafts=Drafts() if drafts else None,
    )
    greedy = SamplingConfig(temperature=0.0)

    def run(n: int) -> list[list[int]]:
        requests = [Request(row, n, greedy, Stream(0, i), overflow) for i, row in enumerate(prompt)]
        return engine.start(requests).advance(n)

    return run


def generate_draw(size: str, prompt: NDArray[np.int64]) -> Run:
    """`mygpt.generate` with sampling by torch, as the chapter calls it."""
    import mygpt

    model, ids = build(size), torch.tensor(prompt)

    def run(n: int) -> list[list[int]]:
        torch.default_generator.manual_seed(
            0
        )  # CPU only: torch.manual_seed for all devices takes 130 us
        return mygpt.generate(model, ids, n)[:, ids.shape[1] :].tolist()

    return run
