"""Tensor names without the prefixes of wrappers: DataParallel, torch.compile, FSDP, Lightning.

A wrapper adds a part to every name ("module.", "_orig_mod."), a class that contains the model adds
an outer prefix ("model."), and a model that is saved without its head lacks the family's prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mygpt.errors import InputError

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_names(
    where: object, names: Iterable[str], anchors: Iterable[str] = (), prefix: str = ""
) -> dict[str, str]:
    """Remove the prefixes of wrappers from tensor names.

    Args:
        where: the file or folder, for messages.
        names: the names in the file.
        anchors: names without `prefix`; the first of them that is found shows the outer prefix.
        prefix: the family's prefix, which all names but the head's get in the result.

    Returns:
        The name in the file for each name without wrappers.

    Raises:
        InputError: if two names in the file become equal.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in found:
            raise InputError(
                f"{where} has tensor {plain!r:.80} twice, once as {name!r:.80}: save "
                "model.state_dict() of the plain model"
            )
        found[plain] = name
    outer = _outer_prefix(found, anchors, prefix)
    if outer is None:
        return found
    return {_renamed(plain, *outer, prefix): name for plain, name in found.items()}


def _outer_prefix(
    names: Mapping[str, str], anchors: Iterable[str], prefix: str
) -> tuple[str, bool] | None:
    """The prefix before all names, and whether `prefix` follows it; None if it is ambiguous."""
    for anchor in anchors:
        ends = [name for name in names if name == anchor or name.endswith(f".{anchor}")]
        if len(ends) == 1:
            outer = ends[0].removesuffix(anchor)
            has_prefix = f".{outer}".endswith(f".{prefix}")
            return outer.removesuffix(prefix) if has_prefix else outer, has_prefix
    return None


def _renamed(name: str, outer: str, has_prefix: bool, prefix: str) -> str:
    if not name.startswith(outer):
        return name
    inner = name.removeprefix(outer)
    return inner if has_prefix or inner.startswith("lm_head.") else prefix + inner


def name_in_file(name: str, names: Mapping[str, str]) -> str:
    """The name that a file would use for a tensor, given `names` of `plain_names`."""
    for ours, theirs in names.items():
        if theirs.endswith(ours):
            return theirs.removesuffix(ours) + name
        if ours.endswith(theirs):
            return name.removeprefix(ours.removesuffix(theirs))
    return name
