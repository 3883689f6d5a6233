"""The inputs with which fuzzing begins, and those that were faults, in short: without atheris."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from fuzzing import CORPUS, FOUND, HANG_S, NAMES, inputs, target


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", inputs(CORPUS), ids=named)
def test_every_seed_is_accepted(path: Path) -> None:
    """Else fuzzing would begin with inputs that reach no further than an error."""
    assert target(path.parent.name).accepts(path.read_bytes())


@pytest.mark.parametrize("path", inputs(FOUND), ids=named)
def test_what_was_a_fault_is_one_no_more(path: Path) -> None:
    """Each of them once was an exception, a hang, or more than a gigabyte of memory."""
    began = time.monotonic()
    target(path.parent.name).accepts(path.read_bytes())
    assert time.monotonic() - began < HANG_S


@pytest.mark.parametrize("name", [name for name in NAMES if name != "torch_files"])
def test_the_corpus_is_that_of_the_script(name: str) -> None:
    """torch's files are excepted: their bytes differ between its versions."""
    stored = {path.name: path.read_bytes() for path in (CORPUS / name).iterdir()}
    assert stored == target(name).seeds(), "write it again: python -m fuzzing.seeds"


@pytest.mark.parametrize("name", NAMES)
def test_mutated_inputs_are_often_accepted(name: str) -> None:
    """Lengths and digests are corrected: otherwise nothing behind their checks would be reached."""
    fuzzed, rng = target(name), random.Random(0)
    stored = [path.read_bytes() for path in inputs(CORPUS) if path.parent.name == name]
    changed = [fuzzed.mutated(rng.choice(stored), rng, lambda part: part) for _ in range(60)]
    assert sum(map(fuzzed.accepts, changed)) > 5
    assert not set(changed) <= set(stored)
