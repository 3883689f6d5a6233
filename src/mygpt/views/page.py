"""Make one HTML file that contains its data, scripts and styles, and loads nothing.

The markup does not depend on the data. Generated text and names are JSON in the page, and the
scripts show them only as text, never as markup. A Content-Security-Policy allows only the page's
own script and style, identified by their digests. A page that a server sends gets its data later,
and the server's own policy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mygpt.errors import InputError

VIEWS = Path(__file__).parent
_STYLES = (
    "static/style.css",
    "static/inside.css",
    "pages/page.css",
    "pages/formation.css",
    "pages/loss_map.css",
)

_IMPORT = re.compile(r'^import \{([\w$\s,]*)\} from "(\.{1,2}/[\w./-]+\.js)";[ \t]*$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:(?:async )?function|const|class) ([\w$]+))", re.MULTILINE)
# Import and export statements in other forms than the two above.
_OTHER = re.compile(r"^\s*(?:import|export)\b|\bimport\s*[(.]", re.MULTILINE)
_NAME = re.compile(r"([\w$]+)(?:\s+as\s+([\w$]+))?")
# These would end the script element, or hide its end from the HTML parser.
_NO_SCRIPT = re.compile(r"</script|<script|<!--", re.IGNORECASE)
_NO_STYLE = re.compile(r"</style|@import|url\(", re.IGNORECASE)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{policy}<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
{style}
</head>
<body>
<noscript>This page needs JavaScript, which is disabled.</noscript>
<main id="page"></main>
{script}
</body>
</html>
"""
_POLICY = '<meta http-equiv="Content-Security-Policy" content="{}">\n'
_DATA_AND_SCRIPT = """<script type="application/json" id="data">{}</script>
<script>{}</script>"""


def require_free(out: Path | None, *, overwrite: bool) -> None:
    """Raise `InputError` if the page `out` exists and is not to be overwritten."""
    if out is not None and out.exists() and not overwrite:
        raise InputError(f"{out} exists: add --overwrite, or choose another --out")


def make_page(entry: str, data: Any, *, title: str = "mygpt") -> str:
    """Return the HTML of a page that runs `entry` on `data`.

    Args:
        entry: the JavaScript module that fills the page's `main`, a path inside this folder.
        data: plain JSON values, without NaN.
        title: the title until the script sets one; letters, digits, spaces and dots.
    """
    assert re.fullmatch(r"[\w .]+", title), title
    script, style = _script_and_style(entry)
    for text, forbidden in ((script, _NO_SCRIPT), (style, _NO_STYLE)):
        if found := forbidden.search(text):
            raise ValueError(f"a page's script or style cannot contain {found.group()!r}")
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return _PAGE.format(
        policy=_POLICY.format(policy),
        title=title,
        style=f"<style>{style}</style>",
        script=_DATA_AND_SCRIPT.format(embedded_json(data), script),
    )


def served_files(entry: str, *, title: str = "mygpt") -> dict[str, tuple[str, bytes]]:
    """Return a page without data as files of a server, whose policy allows only its own files.

    Args:
        entry: the JavaScript module that runs, a path inside this folder.
        title: as for `make_page`.

    Returns:
        The media type and the content of each file by its path; the page's is "/".
    """
    assert re.fullmatch(r"[\w .]+", title), title
    script, style = _script_and_style(entry)
    page = _PAGE.format(
        policy="",
        title=title,
        style='<link rel="stylesheet" href="/page.css">',
        script='<script src="/page.js"></script>',
    )
    return {
        "/": ("text/html; charset=utf-8", page.encode()),
        "/page.js": ("text/javascript; charset=utf-8", script.encode()),
        "/page.css": ("text/css; charset=utf-8", style.encode()),
    }


def _script_and_style(entry: str) -> tuple[str, str]:
    return bundle(VIEWS / entry), "\n".join(_read(VIEWS / name) for name in _STYLES)


def embedded_json(data: Any) -> str:
    """JSON text without characters that could end the surrounding HTML or JavaScript."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: no U+2028 either
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def shown_path(path: str | Path) -> str:
    """A path as pages show it: without this machine's folders, since pages may be published.

    It is relative to the current folder if it is inside it, else only its last part.
    """
    if not os.path.isabs(path):
        return str(path)
    inside = os.path.relpath(path)
    return os.path.basename(path) if inside.startswith(os.pardir) else inside


@dataclass
class _Module:
    """One module of the bundle."""

    name: str  # the JavaScript constant for its exports
    exports: list[str]  # their names
    text: str  # the expression that runs it, after the modules that it imports


def bundle(entry: Path) -> str:
    """Bundle the ES module `entry` and its imports into one classic script.

    Supported are `import {a, b as c} from "./x.js";` and `export` before function, const and
    class, each at the beginning of a line.

    Raises:
        ValueError: for other forms of import or export, a missing name, or circular imports.
    """
    done: dict[Path, _Module] = {}
    _add(entry.resolve(), done, ())
    body = "\n".join(f"const {module.name} = {module.text};" for module in done.values())
    return f'\n"use strict";\n{{\n{body}\n}}\n'


def _add(path: Path, done: dict[Path, _Module], within: tuple[Path, ...]) -> _Module:
    """Append a module to `done`, after the modules that it imports."""
    if path in done:
        return done[path]
    if path in within:
        raise ValueError(f"{path.name} imports itself through {within[-1].name}")
    text = _read(path)
    lines = []
    for match in _IMPORT.finditer(text):
        module = _add((path.parent / match.group(2)).resolve(), done, (*within, path))
        lines.append(f"const {{ {_destructured(match.group(1), module, path)} }} = {module.name};")
    exports = _EXPORT.findall(text)
    body = _EXPORT.sub("", _IMPORT.sub("", text))
    if found := _OTHER.search(body):
        line = body[found.start() :].lstrip().partition("\n")[0]
        raise ValueError(f"{path.name}: {line!r} is an unsupported form of import or export")
    name = f"module${len(done)}"
    given = f"return {{ {', '.join(exports)} }};"
    module = _Module(name, exports, "(() => {\n" + "\n".join([*lines, body, given]) + "\n})()")
    done[path] = module
    return module


def _destructured(names: str, module: _Module, importer: Path) -> str:
    """The names in an import's braces as a destructuring pattern."""
    patterns = []
    for part in names.split(","):
        if not part.strip():
            continue
        match = _NAME.fullmatch(part.strip())
        if match is None or match.group(1) not in module.exports:
            raise ValueError(f"{importer.name} imports {part.strip()!r}, which is not exported")
        patterns.append(match.group(1) + (f": {match.group(2)}" if match.group(2) else ""))
    return ", ".join(patterns)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The digest that identifies a text in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
