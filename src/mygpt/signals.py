"""What a signal does to a command: it ends within a second, whatever is being computed.

Python runs a signal's handler in the main thread, between two of its instructions, and so not
while a kernel, torch or LLVM computes there. But the signal's number is written to a pipe at once
(`signal.set_wakeup_fd`). A thread reads it, since whoever computes lets other threads run. The
handler raises the exception that unwinds the command; where the process is still there after a
moment, the thread ends it.

Imports next to nothing: until a `Watch` is installed, a signal ends Python with a traceback.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import sys
import time

from mygpt.errors import interruption

TYPE_CHECKING = False  # `typing` takes longer to import than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

# A keyboard, whoever ends processes, a terminal that closes; and a scheduler that warns ahead,
# which is only asked for where work can be finished.
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
_FINISHING = (*_ENDING, "SIGUSR1")
_HANGUP = getattr(signal, "SIGHUP", None)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_GRACE_S = 0.3  # for a command to unwind
_LAST_WORDS_S = 0.2  # for what is said when it did not
# `timeout` sends its signal twice, microseconds apart; torchrun repeats a terminal's.
_ECHO_S, _LAUNCHED_ECHO_S = 0.02, 2.0
_SHOW_CURSOR = b"\x1b[?25h\n"


class Abandoned(KeyboardInterrupt):
    """Work that is abandoned on the first signal, inside `Postponed`: see `AtOnce`."""


class Postponed:
    """While entered, the first signal is only noted; the second one ends the command.

    The second raises a KeyboardInterrupt in the main thread. Further SIGHUPs count for nothing: a
    terminal that closes may send several. A signal that is ignored (as nohup does) stays so, and
    outside the main thread all are left alone.

    Args:
        on_first: called with the first signal's name.

    Attributes:
        received: the first signal's number; the caller may set it to another process's.
    """

    def __init__(self, on_first: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._own: int | None = None
        self._announced = self._abandoned = False
        self._on_first = on_first
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Postponed:
        import threading

        if threading.current_thread() is threading.main_thread():
            _postponed.append(self)
            self._before = _handle_with(_handler, _FINISHING)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _postponed:
            _restore(self._before)
            _postponed.remove(self)

    def end(self) -> None:
        """Let the signal that was received, if there was one, end the command after all."""
        if self.received is not None:
            if _watch is not None:
                _watch.end_by(self.received)
            raise interruption(self.received)

    def takes(self, number: int) -> bool:
        """Note a signal; whether that is all it does."""
        if self._own is not None:
            return number == _HANGUP
        self._own = number
        if self.received is None:
            self.received = number
        return True

    def is_news(self) -> bool:
        """Whether a first signal is to be announced; from then on it is not."""
        news = self._own is not None and not self._announced
        self._announced |= news
        return news

    def announce(self) -> None:
        """Report the first signal."""
        try:
            self._on_first(signal.Signals(self._own or signal.SIGINT).name)
        except (RuntimeError, OSError):  # in the middle of printing, or to nobody
            return

    def abandon(self) -> None:
        """Raise what abandons the work inside `AtOnce`, where a first signal has come."""
        if self.received is not None and not self._abandoned:
            self._abandoned = True
            raise Abandoned


class AtOnce:
    """Inside, also a first signal ends the work, by `Abandoned`: it leaves nothing half done."""

    depth = 0

    def __enter__(self) -> None:
        if _postponed:
            _postponed[-1].abandon()
        AtOnce.depth += 1

    def __exit__(self, *_: object) -> None:
        AtOnce.depth -= 1


class LastWords:
    """While entered, `action` is called once where a signal ends the command.

    In the main thread, once the exception comes by; else in another, before the process is ended.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._said = False

    def __enter__(self) -> LastWords:
        if _watch is not None:
            _watch.last_words.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if _watch is not None and self in _watch.last_words:
            _watch.last_words.remove(self)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.say()

    def say(self) -> None:
        """Call the action, unless that was done."""
        if not self._said:
            self._said = True
            self._action()


class Watch:
    """Ends the process on a signal, also where the main thread cannot be interrupted.

    The first SIGINT, SIGTERM or SIGHUP (inside `Postponed` the second) ends the process with
    128 + its number: by a KeyboardInterrupt in the main thread, or, where that has not ended it
    after a moment, as it is.

    Args:
        instead_of: a handler that is replaced as Python's own are; others stay.

    Attributes:
        received: the signal that ends the process; None while none does.
        unwinds: whether the exception is raised; without it the process is ended as it is.
    """

    def __init__(self, instead_of: Any = None) -> None:
        self.received: int | None = None
        self.unwinds = False
        self._raised = self._stopped = self._closed = False
        self._ends_at = 0.0
        self._last: tuple[int, float] = (0, 0.0)
        self._echo_s = _LAUNCHED_ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else _ECHO_S
        self._lock = _thread.RLock()
        self.last_words: list[LastWords] = []
        self._hook = sys.unraisablehook
        self._reading, self._writing = os.pipe()
        for end in (self._reading, self._writing):
            os.set_blocking(end, False)
        self._before_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        _thread.start_new_thread(self._run, ())
        self._before = _handle_with(_handler, _ENDING, instead_of=(*_DEFAULTS, instead_of))

    def end_by(self, number: int) -> None:
        """End the process by a signal; the caller unwinds the command."""
        with self._lock:
            self.received, self._raised = number, True
            self._ends_at = time.monotonic() + _GRACE_S
        self._wake()

    def close(self) -> None:
        """Leave all as it was before."""
        with self._lock:
            self._stopped = True
        _restore(self._before)
        signal.set_wakeup_fd(self._before_fd)
        sys.unraisablehook = self._hook
        self._closed = True  # nothing writes to the pipe any more
        self._wake()

    def forget(self) -> None:
        """Leave all as it was before, in a forked child: it shares the pipe and has no thread."""
        signal.set_wakeup_fd(-1)
        _restore(self._before)

    def handle(self) -> None:
        """What a signal's handler does; in the main thread."""
        self._read()
        self._wake()  # the thread may have something to announce, or to wait for
        if self.received is None:
            if AtOnce.depth and _postponed:
                _postponed[-1].abandon()
        elif self.unwinds and not self._raised:
            self._raised = True
            # Where it strikes in a callback of C code, Python would print it and carry on.
            sys.unraisablehook = self._report_unraisable
            raise interruption(self.received)

    def _report_unraisable(self, found: Any) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):
            self._hook(found)

    def _read(self) -> None:
        """Count the signals that have come; the handler does or the thread, whoever is first."""
        with self._lock:
            try:
                numbers = os.read(self._reading, 512)
            except OSError:  # there are none
                return
            for number in numbers:
                self._count(number, time.monotonic())

    def _count(self, number: int, now: float) -> None:
        known = [getattr(signal, name, None) for name in (_FINISHING if _postponed else _ENDING)]
        last, at = self._last
        if number not in known or (number == last and now - at < self._echo_s):
            return
        self._last = (number, now)
        if not (_postponed and _postponed[-1].takes(number)) and self.received is None:
            self.received = number
            self._ends_at = now + (_GRACE_S if self.unwinds else 0.0)

    def _wake(self) -> None:
        try:
            os.write(self._writing, b"\0")
        except OSError:  # it is full: there is enough to wake by
            return

    def _run(self) -> None:
        """The thread: announce first signals, and end the process after a second one."""
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        while not self._closed:
            left_s = self._ends_at - time.monotonic()
            poll.poll(None if self.received is None else max(0.0, 1000 * left_s))
            self._read()
            for postponed in tuple(_postponed):
                if (
                    postponed.is_news()
                ):  # in a thread, since whoever reads our lines may have stopped
                    _thread.start_new_thread(postponed.announce, ())
            with self._lock:
                due = self.received is not None and time.monotonic() >= self._ends_at
                if due and not self._stopped:
                    self._end(128 + (self.received or 0))
        os.close(self._reading)
        os.close(self._writing)

    def _end(self, code: int) -> None:
        said = _thread.allocate_lock()
        said.acquire()
        _thread.start_new_thread(self._say_last_words, (said,))
        said.acquire(timeout=_LAST_WORDS_S)  # whoever reads our lines may have stopped
        os._exit(code)

    def _say_last_words(self, said: Any) -> None:
        try:
            for words in reversed(self.last_words):
                words.say()
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
        finally:
            said.release()


_postponed: list[Postponed] = []  # the innermost last
_watch: Watch | None = None


def install(instead_of: Any = None) -> Watch | None:
    """Watch signals for a command; None outside the main thread, or where somebody does."""
    global _watch
    if os.name == "posix" and _watch is None:
        try:
            _watch = Watch(instead_of)
        except ValueError:  # not the main thread
            return None
        return _watch
    return None


def uninstall() -> None:
    """Leave signals as they were before `install`; twice is no error."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None


def watch() -> Watch | None:
    """The watch of the command that runs; None where there is none."""
    return _watch


def _handler(number: int, frame: FrameType | None) -> None:
    if _watch is not None:
        _watch.handle()
        return
    if not _postponed or not _postponed[-1].takes(number):
        raise interruption(number)
    if _postponed[-1].is_news():
        _postponed[-1].announce()
    if AtOnce.depth:
        _postponed[-1].abandon()


def _handle_with(
    handler: Any, names: tuple[str, ...], *, instead_of: tuple[Any, ...] | None = None
) -> dict[int, Any]:
    """Set a handler, in the place of some or of all but "ignored"; returns what was there."""
    before: dict[int, Any] = {}
    for name in names:
        if not hasattr(signal, name):
            continue
        number = getattr(signal, name)
        now = signal.getsignal(number)
        if now is not signal.SIG_IGN and (instead_of is None or now in instead_of):
            before[number] = signal.signal(number, handler)
    return before


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _forget() -> None:
    global _watch
    if _watch is not None:
        _watch.forget()
        _watch = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
