"""The errors a user can meet, and the checks of values that raise them.

Each message names the value, the limit and the remedy; each class carries the exit code with which
the command line ends. Anything that is not a `MygptError` is a bug of ours (exit code 1).
"""

import re
import signal
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

_MOST = 2**31  # above every width, window and vocabulary
DISTRIBUTION = "mygpt-train"  # what pip installs; "mygpt" there is another project's package


class MygptError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython and notebooks show in place of a traceback: the message."""
        return [f"{type(self).__name__}: {self}"]


class InputError(MygptError, ValueError):
    """Wrong input or usage (exit code 2); also a ValueError, as the tutorial's errors are."""

    exit_code = 2


class UnknownTokenError(InputError, KeyError):
    """Text outside a tokenizer's vocabulary; also a KeyError, as in the tutorial."""

    # KeyError shows repr(message); a user is shown the message itself.
    __str__ = Exception.__str__


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, foreign or newer than this program."""


class DamagedError(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


class StorageError(MygptError, OSError):
    """No space left, or a place that cannot be written to (exit code 3)."""

    exit_code = 3


class OutOfMemoryError(MygptError, MemoryError):
    """More memory than there is (exit code 4)."""

    exit_code = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch raises a RuntimeError for that."""
    phrases = "out of memory|allocate memory|not enough memory|bad allocation|ALLOC_FAILED"
    return isinstance(error, MemoryError) or re.search(phrases, str(error)) is not None


class DivergedError(MygptError):
    """Training whose loss is no longer a finite number (exit code 5)."""

    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """A signal other than SIGINT that ended training (exit code 128 + its number).

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"ended by signal {signal}")
        self.signal = signal


def interruption(number: int) -> KeyboardInterrupt:
    """What a signal raises: for SIGINT the very class, which Python ends with exit code 130."""
    return KeyboardInterrupt() if number == signal.SIGINT else Interrupted(number)


def broken_model() -> InputError:
    """The error of a model whose logits are NaN or infinite."""
    return InputError(
        "the model predicts NaN or infinity: its weights are broken; train again with a lower rate"
    )


def overflowing_settings(temperature: float, repetition_penalty: float | None) -> InputError:
    """The error of settings with which logits overflow float32."""
    return InputError(
        f"temperature={temperature} with repetition_penalty={repetition_penalty} overflows "
        "float32: choose milder values, nearer to 1"
    )


def install_extra(extra: str) -> str:
    """The command that installs an extra of this package, for the messages that need it."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def require_int(name: str, value: Any, *, least: int, unit: str = "") -> None:
    """Raise `InputError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise InputError(f"{name}={value!r:.80} must be a whole number of at least {least}{unit}")
    if int(value) > _MOST:
        raise InputError(f"{name}={value!r:.80} must be at most {_MOST:,}")


def require_number(name: str, value: Any) -> None:
    """Raise `InputError` unless `value` is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name}={value!r:.80} must be a number")
    try:
        float(value)
    except OverflowError:
        raise InputError(f"{name}={value!r:.40}... is past the range of numbers") from None


def make_plain(config: Any) -> None:
    """Replace NumPy numbers in a dataclass's fields by Python's, which JSON can hold."""
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) in (bool, int, float) or not isinstance(value, Real):
            continue
        plain = int(value) if isinstance(value, Integral) else float(value)
        object.__setattr__(config, field.name, plain)


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `InputError` unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}={value!r:.80} is not known: choose {', '.join(choices)}")
