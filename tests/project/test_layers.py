"""The floors of the house: imports point down, and `import mygpt` loads nothing heavy."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mygpt
from paths import ROOT


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_room_imports_only_from_floors_below_its_own():
    """pyproject.toml's contract, read by import-linter; new rooms have to be given a floor."""
    shown = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert "floors KEPT" in shown


@pytest.mark.parametrize("module", ["mygpt", "mygpt.errors", "mygpt.core.config"])
def test_import_loads_neither_torch_nor_numpy(module):
    """`import mygpt` and `mygpt --help` answer at once."""
    heavy = "{'torch', 'numpy', 'safetensors', 'transformers'}"
    run(sys.executable, "-c", f"import sys, {module}; assert not {heavy} & set(sys.modules)")


@pytest.mark.parametrize("module", ["core.random", "tokenization", "checkpoint", "machine"])
def test_the_lower_floors_do_without_torch(module):
    """What the NumPy engine and `tokenize` need; torch comes where a tensor is asked for."""
    run(sys.executable, "-c", f"import sys, mygpt.{module}; assert 'torch' not in sys.modules")


def test_every_public_name_is_there():
    """Each is found where `__init__` says it lives, and `dir` shows them all."""
    assert set(mygpt.__all__) <= set(dir(mygpt))
    for name in mygpt.__all__:
        assert getattr(mygpt, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mygpt.nonsense


@pytest.mark.slow
def test_importing_any_module_prints_nothing():
    """Habit 11: importing does nothing that can be seen."""
    names = [m.name for m in pkgutil.walk_packages(mygpt.__path__, "mygpt.")]
    assert "mygpt.generation.tokens" in names
    modules = ", ".join(name for name in names if not name.endswith("__main__"))
    assert run(sys.executable, "-c", f"import {modules}") == ""
