"""Errors of wrong input, and a pickle that would run code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mygpt.errors import InputError


def refusal(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of the error that a call raises: one line, with exit code 2."""
    with pytest.raises(InputError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable(), message
    return message


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)
