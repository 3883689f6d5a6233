"""Ending a run on a signal: the first lets the step finish, the second leaves at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from mygpt.errors import interruption

# A keyboard, whoever ends processes, a scheduler that warns ahead, a terminal that closes.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class StopOnSignal:
    """While entered, these signals are noted in `received` instead of ending the program.

    The second one raises a KeyboardInterrupt, unless it is SIGHUP: a terminal that closes may send
    several. A signal that is ignored (as nohup does) stays so, and
    outside the main thread all are left alone.

    Args:
        on_first: is called with the first signal's name.
    """

    def __init__(self, on_first: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._on_first = on_first
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if signal.Signals(number).name == "SIGHUP":
                return
            raise interruption(number)
        self.received = number
        with contextlib.suppress(RuntimeError, OSError):  # in the middle of printing, or to nobody
            self._on_first(signal.Signals(number).name)
