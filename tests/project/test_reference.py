"""docs/reference.md has an entry for every public name, and docs/README.md lists every document."""

from __future__ import annotations

import re

import mygpt
from paths import ROOT

DOCS = ROOT / "docs"


def entries() -> list[str]:
    """The names whose docstrings the reference shows."""
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    return re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)


def test_every_public_name_has_its_entry_once() -> None:
    """A name that joins `mygpt.__all__` needs a line `::: mygpt.NAME` in docs/reference.md."""
    public = [name.removeprefix("mygpt.") for name in entries() if name.count(".") == 1]
    assert sorted(public) == sorted(mygpt.__all__)


def test_the_index_lists_every_document() -> None:
    """The site's navigation is made from the index; `make docs` fails for a page without one."""
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    listed = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#]+)", index)}
    assert set(DOCS.rglob("*.md")) - {DOCS / "README.md"} - listed == set()
