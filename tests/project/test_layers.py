"""Packages import only from lower layers, and `import mygpt` loads no heavy library."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mygpt
from mygpt.cpu.common.build import DECODING, TRAINING
from paths import ROOT


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_package_imports_only_from_lower_layers():
    """pyproject.toml's contract, checked by import-linter; new packages must be added to it."""
    shown = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert "layers KEPT" in shown


@pytest.mark.parametrize("module", ["mygpt", "mygpt.errors", "mygpt.core.config"])
def test_import_loads_neither_torch_nor_numpy(module):
    """So that `import mygpt` and `mygpt --help` are fast."""
    heavy = "{'torch', 'numpy', 'safetensors', 'transformers'}"
    run(sys.executable, "-c", f"import sys, {module}; assert not {heavy} & set(sys.modules)")


@pytest.mark.parametrize("module", ["core.random", "tokenization", "checkpoint", "machine"])
def test_the_lower_layers_do_not_import_torch(module):
    """They are what the NumPy engine and `tokenize` need; torch is imported for tensors only."""
    run(sys.executable, "-c", f"import sys, mygpt.{module}; assert 'torch' not in sys.modules")


def test_every_public_name_exists():
    """Each can be imported, and `dir` lists all of them."""
    assert set(mygpt.__all__) <= set(dir(mygpt))
    for name in mygpt.__all__:
        assert getattr(mygpt, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mygpt.nonsense


@pytest.mark.slow
def test_importing_any_module_prints_nothing():
    """Importing has no side effects: no output here. Kernels are excluded: that compiles them."""
    kernels = {*DECODING.sources, *TRAINING.sources} - {"mygpt.cpu.common.layout"}
    names = {m.name for m in pkgutil.walk_packages(mygpt.__path__, "mygpt.")} - kernels
    assert "mygpt.decode.tokens" in names
    modules = ", ".join(name for name in names if not name.endswith("__main__"))
    assert run(sys.executable, "-c", f"import {modules}") == ""
