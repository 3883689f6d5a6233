"""The notebooks can be read and have no outputs; `make notebooks` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mygpt
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str) -> list[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3


@each_notebook
def test_no_outputs_are_stored(path: Path) -> None:
    for cell in cells_of(path, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@each_notebook
def test_each_code_cell_compiles(path: Path) -> None:
    """A line that begins with "!" is a command of the terminal."""
    for cell in cells_of(path, "code"):
        compile(re.sub(r"(?m)^!.*", "pass", "".join(cell["source"])), path.name, "exec")


@each_notebook
def test_only_public_names_are_used(path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells_of(path, "code"))
    assert "from mygpt." not in code
    used = set(re.findall(r"(?<![\w!])mygpt\.(\w+)", code))
    for names in re.findall(r"^from mygpt import (.+)$", code, re.MULTILINE):
        used.update(names.split(", "))
    assert used
    assert used <= set(mygpt.__all__)


@each_notebook
def test_links_lead_to_files(path: Path) -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells_of(path, "markdown"))
    links = re.findall(r"\]\(([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []
