"""What a model's provenance states, as printable lines: it may have any content."""

from __future__ import annotations

from typing import Any

# What states how a model was made: if these are the same, the model is the same.
FACTS = {
    "text": "{corpus[name]}, {corpus[bytes]:,} bytes, sha256 {corpus[sha256]}",
    "imported": "{imported[from]} ({imported[format]})",
    "version": "mygpt {mygpt}",
    "seed": "{training[seed]}",
}


def origin_of(provenance: dict[str, Any]) -> dict[str, str]:
    """The facts that a provenance states, by the names in `FACTS`."""
    found = {}
    for name, form in FACTS.items():
        try:
            found[name] = shown(form.format_map(provenance))
        except (LookupError, ValueError, TypeError, AttributeError):
            continue
    return found


def shown(value: object) -> str:
    """A value on one printable line of at most 500 characters."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return "".join(char if char.isprintable() else "?" for char in text[:500])
