"""Documents are true: their links lead to files, and the size of the core is as stated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paths import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "experiments/*.md", "src/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (document.parent / link).exists()] == []


def test_the_readme_states_the_size_of_the_core() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines, files = re.findall(r"Its core, ([\d,]+) lines in (\d+) files", readme)[0]
    core = list((ROOT / "src" / "mygpt" / "core").glob("*.py"))
    count = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core)
    assert (lines, int(files)) == (f"{count:,}", len(core)), "wc -l src/mygpt/core/*.py"
