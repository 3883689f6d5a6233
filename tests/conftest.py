"""Shared by all tests: a fixed number of threads, and examples that are the same every time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels before the tests' own processes start, once for all of them."""
    if not hasattr(config, "workerinput"):
        from mygpt.engines.cpu.build import compile_now

        compile_now()


@pytest.fixture
def shakespeare() -> Path:
    """Tiny Shakespeare's path; skips where the machine does not have it."""
    path = Path(os.environ.get("MYGPT_SHAKESPEARE", SHAKESPEARE))
    if not path.exists():
        pytest.skip("Tiny Shakespeare is not here: `mygpt data shakespeare` fetches it")
    return path
