"""The names of options: refused if they do not exist, and shown by `help()` one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, TypeVar, get_type_hints

from mygpt.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])


def require_known(options: Iterable[str], known: Collection[str]) -> None:
    """Raise `InputError` for an option that does not exist, naming the nearest one that does.

    Args:
        options: the names that were given.
        known: all names.
    """
    unknown = next((name for name in options if name not in known), None)
    if unknown is None:
        return
    from difflib import get_close_matches

    nearest = get_close_matches(unknown, known, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(sorted(known))}"
    raise InputError(f"unknown option {unknown}: {remedy}")


def names_of(function: Callable[..., Any]) -> Collection[str]:
    """The names of a function's parameters, with those that `shows_options` adds."""
    return signature(function).parameters


def shows_options(options: type, *defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """A decorator for a function that takes `**options: Unpack[options]`.

    `inspect.signature`, and with it `help()` and completion, show each option by its name.

    Args:
        options: the TypedDict.
        defaults: values by name, the first that has the name; an option in none of them is None.
    """

    def decorated(function: F) -> F:
        own = signature(function)
        shown = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        for name, kind in get_type_hints(options).items():
            default = next((values[name] for values in defaults if name in values), None)
            shown.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        function.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return decorated


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The default values of a function's or a dataclass's parameters, by name."""
    parameters = signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not Parameter.empty}
