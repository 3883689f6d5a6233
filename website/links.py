"""Check of the built site, a hook of MkDocs: links lead to files and anchors, none loads from afar.

MkDocs checks the links of the documents. This check reads the pages that came of them, with the
theme and the reference of the API. Each fault is a warning, so that `mkdocs build --strict` fails.
"""

from __future__ import annotations

import logging
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig

_LOADED = {"src", "srcset", "poster"}  # attributes whose address the browser loads
_log = logging.getLogger("mkdocs.hooks.links")


class Page(HTMLParser):
    """The addresses that a page links to or loads, and the anchors in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif name in _LOADED or (tag == "link" and name == "href"):
                self.loaded.append(value)
            elif name == "href":
                self.links.append(value)


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of every link that leads nowhere and everything that another host would deliver."""
    site = Path(config.site_dir)
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin with the site's address
            continue
        for address in page.loaded:
            if urlsplit(address).netloc:
                _log.warning("%s loads %s from another host", path.relative_to(site), address)
        for address in page.loaded + page.links:
            if (fault := fault_of(address, path, pages)) is not None:
                _log.warning("%s links to %s: %s", path.relative_to(site), address, fault)


def fault_of(address: str, page: Path, pages: dict[Path, Page]) -> str | None:
    """What is wrong with a link on a page; None for a correct one, and for other sites'."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "no such anchor"
    return None
