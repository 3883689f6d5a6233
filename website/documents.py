"""The pages of the site, a hook of MkDocs: the repository's documents under their own paths.

So a link from one document to another, which GitHub resolves in the repository, is resolved in the
site in the same way. The navigation has the order of docs/README.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
HOME, INDEX = ROOT / "README.md", ROOT / "docs" / "README.md"
_LINK = re.compile(r"\]\(([^)#\s]+)")


def on_config(config: MkDocsConfig) -> None:
    """Set the navigation: a section for each heading of docs/README.md, a page for each link."""
    sections: list[dict[str, list[str]]] = []
    seen = {HOME, INDEX}
    for text in INDEX.read_text(encoding="utf-8").split("\n## ")[1:]:
        pages = [page for page in linked_files(INDEX, text) if page.suffix == ".md"]
        pages = [page for page in pages if page not in seen]
        seen.update(pages)
        sections.append({text.partition("\n")[0]: [source_of(page) for page in pages]})
    config.nav = [{"Start": source_of(HOME)}, {"Documents": source_of(INDEX)}, *sections]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the documents in docs/ and those that they link to, and the files these link to."""
    waiting = [HOME, *sorted((ROOT / "docs").rglob("*.md"))]
    added: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in added:
            continue
        added.add(path)
        files.append(File.generated(config, source_of(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            waiting += linked_files(path, path.read_text(encoding="utf-8"))


def linked_files(document: Path, text: str) -> list[Path]:
    """The files of the repository that `text`, of this document, links to, each once, in order."""
    paths = [(document.parent / link).resolve() for link in _LINK.findall(text)]
    return list(dict.fromkeys(path for path in paths if path.is_file()))


def source_of(path: Path) -> str:
    """A file's path in the repository, with slashes."""
    return path.relative_to(ROOT).as_posix()
