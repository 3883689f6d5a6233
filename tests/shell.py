"""Commands that tests run in their own process."""

from __future__ import annotations

import io

import pytest

from mygpt.cli import main


class Shell:
    """Runs commands: (exit code, stdout, stderr).

    Args:
        capsys: captures what is printed.
        first: the first words of every command.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str], *first: str) -> None:
        self.capsys, self.first = capsys, first

    def __call__(self, *args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([*self.first, *map(str, args)])
        assert isinstance(left.value.code, int)
        return left.value.code, *self.capsys.readouterr()

    def printed(self, *args: object) -> str:
        """What a command without an error prints."""
        code, out, err = self(*args)
        assert code == 0, err
        return out

    def refused(self, *args: object) -> str:
        """The message of a refusal: exit code 2, one line, nothing on stdout."""
        code, out, err = self(*args)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("mygpt: ")
        return err


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True
