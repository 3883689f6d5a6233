"""What scanners of model files say of an exported folder: picklescan and modelscan find nothing.

modelscan needs older versions of libraries than mygpt, so it is a program of an environment of its
own: the one on the path, or the file `MYGPT_MODELSCAN`.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from mygpt import CharTokenizer, save_checkpoint
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.formats import export_checkpoint
from refusals import Malice
from shapes import LLAMA, build

MODELSCAN = os.environ.get("MYGPT_MODELSCAN") or shutil.which("modelscan")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder, with the checkpoint that it was made from."""
    path, folder = tmp_path / "model.safetensors", tmp_path / "exported"
    save_checkpoint(path, build(LLAMA), CharTokenizer("abcdef"))
    export_checkpoint(read_checkpoint(path), "hf", folder)
    shutil.copy(path, folder / "checkpoint.safetensors")
    return folder


def test_picklescan_finds_nothing_in_an_export(folder: Path) -> None:
    scanner = pytest.importorskip("picklescan.scanner")
    found = scanner.scan_directory_path(str(folder))
    assert not found.scan_err
    assert (found.infected_files, found.issues_count) == (0, 0)
    folder.joinpath("vocabulary.pkl").write_bytes(pickle.dumps(Malice(folder / "made")))
    assert scanner.scan_directory_path(str(folder)).infected_files == 1


@pytest.mark.processes
@pytest.mark.skipif(MODELSCAN is None, reason="modelscan is not here")
def test_modelscan_finds_nothing_in_an_export(folder: Path) -> None:
    def scan() -> str:
        done = subprocess.run(
            [str(MODELSCAN), "-p", str(folder)], capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 1, 3), done.stderr  # nothing found, found, nothing to scan
        return done.stdout

    assert "No issues found" in scan()
    folder.joinpath("vocabulary.pkl").write_bytes(pickle.dumps(Malice(folder / "made")))
    assert "No issues found" not in scan()
