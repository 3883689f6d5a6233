"""Shared by all tests: a fixed number of threads, and examples that are the same every time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from paths import ROOT

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels before the tests' own processes start, once for all of them."""
    if not hasattr(config, "workerinput"):
        from mygpt.engines.cpu.build import compile_now
        from mygpt.training.compiled.library import TRAINING

        compile_now()
        compile_now(TRAINING)


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore some; training heeds that."""
    names = ("SIGINT", "SIGHUP")
    before = {number: signal.getsignal(number) for name in names if (number := _number(name))}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            default = number == signal.SIGINT and signal.default_int_handler
            signal.signal(number, default or signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _number(name: str) -> int | None:
    return getattr(signal, name, None)


@pytest.fixture
def shakespeare() -> Path:
    """Tiny Shakespeare's path; skips where the machine does not have it."""
    path = Path(os.environ.get("MYGPT_SHAKESPEARE", SHAKESPEARE))
    if not path.exists():
        pytest.skip("Tiny Shakespeare is not here: `mygpt data shakespeare` fetches it")
    return path
