"""Documents are true: links lead to files and headings, and the size of the core is as stated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paths import PACKAGE, ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "experiments/*.md", "src/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.checkout
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (document.parent / link).exists()] == []


def anchors_of(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them: without punctuation."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = [heading.strip().lower() for heading in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.checkout
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_headings(document: Path) -> None:
    """A link to another document's section kept the name of a heading that had changed."""
    links = re.findall(r"\]\(([^)#]*)#([^)]+)\)", document.read_text(encoding="utf-8"))
    inside = [(document.parent / file if file else document, name) for file, name in links
              if "://" not in file]  # fmt: skip
    assert [name for file, name in inside if name not in anchors_of(file)] == []


def test_the_readme_states_the_size_of_the_core() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines, files = re.findall(r"Its core, ([\d,]+) lines in (\d+) files", readme)[0]
    core = list((PACKAGE / "core").glob("*.py"))
    count = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core)
    assert (lines, int(files)) == (f"{count:,}", len(core)), "wc -l src/mygpt/core/*.py"
