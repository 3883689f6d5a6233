"""Comments of dataclass fields as documentation, an extension of Griffe.

In `embed_dim: int  # C, width of the residual stream` the comment is for the reader of the code.
The reference of the API shows it as the description of the argument `embed_dim`.
"""

from __future__ import annotations

import ast
from typing import Any

from griffe import Class, Extension


class FieldComments(Extension):
    """Add the section "Args" to the docstring of a dataclass whose fields have comments."""

    def on_class_members(self, *, node: ast.ClassDef, cls: Class, **_: Any) -> None:
        """Called by Griffe after the members of a class."""
        lines = cls.lines_collection[cls.filepath]
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        comments = {ast.unparse(field.target): comment_of(field, lines) for field in fields}
        if cls.docstring is None or "dataclass" not in cls.labels or not any(comments.values()):
            return
        section = "\n\nArgs:" + "".join(f"\n    {name}: {text}" for name, text in comments.items())
        text, heading, rest = cls.docstring.value.partition("\n\nRaises:")
        cls.docstring.value = text + section + heading + rest


def comment_of(field: ast.AnnAssign, lines: list[str]) -> str:
    """The comment at the end of a field's line, or else on the lines above it."""
    text = lines[field.end_lineno - 1][field.end_col_offset :].strip().removeprefix("#").strip()
    if text:
        return text
    above: list[str] = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().removeprefix("#").strip())
    return " ".join(above)
