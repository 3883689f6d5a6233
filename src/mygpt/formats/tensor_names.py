"""Names of tensors without what wraps a model: DataParallel, torch.compile, FSDP, Lightning.

A wrapper puts its own attribute into every name ("module.", "_orig_mod."), a class around the
model one before it ("model."), and a model that is saved without its head leaves one out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mygpt.errors import InputError

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_names(
    where: object, names: Iterable[str], anchors: Iterable[str] = (), prefix: str = ""
) -> dict[str, str]:
    """The name in a mapping of ours for each name in a file: {ours: theirs}.

    Args:
        where: the file or folder, for messages.
        names: of the file's tensors.
        anchors: names without `prefix`, of which the first that is there tells what else stands
            before all names.
        prefix: what our mapping has before the names of all but the head.

    Raises:
        InputError: where two names become one.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in found:
            raise InputError(
                f"{where} holds tensor {name!r:.80} twice, with another name around it: save "
                "model.state_dict() of the plain model"
            )
        found[plain] = name
    before = _before(found, anchors, prefix)
    if before is None:
        return found
    outer, whole = before
    return {_renamed(plain, outer, whole, prefix): name for plain, name in found.items()}


def _before(
    names: Mapping[str, str], anchors: Iterable[str], prefix: str
) -> tuple[str, bool] | None:
    """What stands before all names, and whether `prefix` follows it; None where it is not clear."""
    for anchor in anchors:
        ends = [name for name in names if name == anchor or name.endswith(f".{anchor}")]
        if len(ends) == 1:
            before = ends[0].removesuffix(anchor)
            whole = f".{before}".endswith(f".{prefix}")
            return before.removesuffix(prefix) if whole else before, whole
    return None


def _renamed(name: str, outer: str, whole: bool, prefix: str) -> str:
    if not name.startswith(outer):
        return name
    inner = name.removeprefix(outer)
    return inner if whole or inner.startswith("lm_head.") else prefix + inner


def spelled(name: str, names: Mapping[str, str]) -> str:
    """A name of our mapping as the file that has `names` (`plain_names`) would have it."""
    for ours, theirs in names.items():
        if theirs.endswith(ours):
            return theirs.removesuffix(ours) + name
        if ours.endswith(theirs):
            return name.removeprefix(ours.removesuffix(theirs))
    return name
