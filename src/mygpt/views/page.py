"""One HTML file that holds its data, its scripts and its style, and loads nothing.

Its markup is the same for all data: what a model wrote, or a user named, is JSON in the page,
and gets in front of people as text alone. A Content-Security-Policy lets the page's own script
and style run, known by their digests, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VIEWS = Path(__file__).parent
_STYLES = ("static/style.css", "pages/page.css")

_IMPORT = re.compile(r'^import \{([\w$\s,]*)\} from "(\.{1,2}/[\w./-]+\.js)";[ \t]*$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:(?:async )?function|const|class) ([\w$]+))", re.MULTILINE)
# What is left of such statements once the two above are out: other ways to write them.
_OTHER = re.compile(r"^\s*(?:import|export)\b|\bimport\s*[(.]", re.MULTILINE)
_NAME = re.compile(r"([\w$]+)(?:\s+as\s+([\w$]+))?")
_NO_SCRIPT = re.compile(
    r"</script|<script|<!--", re.IGNORECASE
)  # they would end it, or hide its end
_NO_STYLE = re.compile(r"</style|@import|url\(", re.IGNORECASE)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page draws its pictures with JavaScript, which is off.</noscript>
<main id="page"></main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def make_page(entry: str, data: Any, *, title: str = "mygpt") -> str:
    """The page that `entry` makes of `data`.

    Args:
        entry: the module that fills the page's `main`, a path inside this folder.
        data: plain JSON values, without NaN.
        title: until the script names the page; letters, digits, spaces and dots.
    """
    assert re.fullmatch(r"[\w .]+", title), title
    script = bundle(VIEWS / entry)
    style = "\n".join(_read(VIEWS / name) for name in _STYLES)
    for text, forbidden in ((script, _NO_SCRIPT), (style, _NO_STYLE)):
        if found := forbidden.search(text):
            raise ValueError(f"a page cannot hold {found.group()!r} in its script or style")
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return _PAGE.format(
        policy=policy, title=title, style=style, data=embedded_json(data), script=script
    )


def embedded_json(data: Any) -> str:
    """JSON that no parser of HTML or JavaScript takes for an end of what it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: no U+2028 either
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


@dataclass
class _Module:
    """One module on its way into the bundle.

    Attributes:
        name: the constant that holds its exports.
        exports: their names.
        text: the expression that runs it, once what it imports stands before it.
    """

    name: str
    exports: list[str]
    text: str


def bundle(entry: Path) -> str:
    """One classic script that does what the ES module `entry` and its imports do.

    It knows `import {a, b as c} from "./x.js";` and `export` before function, const and class,
    each at the beginning of a line, and refuses all else.

    Raises:
        ValueError: for another import or export, a missing name, or modules in a circle.
    """
    done: dict[Path, _Module] = {}
    _add(entry.resolve(), done, ())
    body = "\n".join(f"const {module.name} = {module.text};" for module in done.values())
    return f'\n"use strict";\n{{\n{body}\n}}\n'


def _add(path: Path, done: dict[Path, _Module], within: tuple[Path, ...]) -> _Module:
    """Put a module into `done`, behind those that it imports."""
    if path in done:
        return done[path]
    if path in within:
        raise ValueError(f"{path.name} imports itself, by way of {within[-1].name}")
    text = _read(path)
    lines = []
    for match in _IMPORT.finditer(text):
        module = _add((path.parent / match.group(2)).resolve(), done, (*within, path))
        lines.append(f"const {{ {_picked(match.group(1), module, path)} }} = {module.name};")
    exports = _EXPORT.findall(text)
    body = _EXPORT.sub("", _IMPORT.sub("", text))
    if found := _OTHER.search(body):
        line = body[found.start() :].lstrip().partition("\n")[0]
        raise ValueError(f"{path.name}: {line!r} is an import or export of a kind not known here")
    name = f"module${len(done)}"
    given = f"return {{ {', '.join(exports)} }};"
    module = _Module(name, exports, "(() => {\n" + "\n".join([*lines, body, given]) + "\n})()")
    done[path] = module
    return module


def _picked(names: str, module: _Module, importer: Path) -> str:
    """The names in an import's braces, as a pattern that takes them out of an object."""
    picked = []
    for part in names.split(","):
        if not part.strip():
            continue
        match = _NAME.fullmatch(part.strip())
        if match is None or match.group(1) not in module.exports:
            raise ValueError(f"{importer.name} imports {part.strip()!r}, which is not exported")
        picked.append(match.group(1) + (f": {match.group(2)}" if match.group(2) else ""))
    return ", ".join(picked)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """How a Content-Security-Policy names a text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
