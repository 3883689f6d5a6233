"""Handle signals so that a command ends within a second, whatever it is computing.

Python runs signal handlers in the main thread, between two bytecode instructions. A handler
therefore does not run while native code (a kernel, torch, LLVM) computes in the main thread. But
Python writes the signal's number to a pipe at once (`signal.set_wakeup_fd`), and a second thread
reads that pipe, since native code releases the GIL. The handler raises the exception that ends
the command. If the process still runs after a grace period, the second thread ends it.

This module imports as little as possible, because a signal ends Python with a traceback until a
`Watch` is installed.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import sys
import time

from mygpt.errors import interruption

TYPE_CHECKING = False  # importing `typing` takes longer than importing everything else here
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

# SIGINT comes from Ctrl-C, SIGTERM from `kill`, SIGHUP from a terminal that closes. Schedulers
# send SIGUSR1 as an early warning; it is handled only where work can be finished first.
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
_FINISHING = (*_ENDING, "SIGUSR1")
_HANGUP = getattr(signal, "SIGHUP", None)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_GRACE_S = 0.3  # time for a command to end by its exception
_EXIT_ACTIONS_S = 0.2  # time for exit actions if it did not
# A second signal within this time is a repetition, not a new one: `timeout` sends its signal
# twice, microseconds apart, and torchrun sends a terminal's signal again to its processes.
_ECHO_S, _LAUNCHED_ECHO_S = 0.02, 2.0
_SHOW_CURSOR = b"\x1b[?25h\n"


class Abandoned(KeyboardInterrupt):
    """Raised on the first signal inside `DeferredSignals` and `Abandonable`: work is abandoned."""


class DeferredSignals:
    """While entered, the first signal is only recorded; the second one ends the command.

    The second signal raises a KeyboardInterrupt in the main thread. Further SIGHUPs are ignored,
    since a terminal that closes may send several. A signal that was ignored before (as nohup
    does) stays ignored. Outside the main thread no handler is changed.

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

    def __enter__(self) -> DeferredSignals:
        import threading

        if threading.current_thread() is threading.main_thread():
            _deferred.append(self)
            self._before = _handle_with(_handler, _FINISHING)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _deferred:
            _restore(self._before)
            _deferred.remove(self)

    def end(self) -> None:
        """If a signal was received, end the command by it now."""
        if self.received is not None:
            if _watch is not None:
                _watch.end_by(self.received)
            raise interruption(self.received)

    def defer(self, number: int) -> bool:
        """Record a signal. Returns True if it is deferred, False if it must end the command."""
        if self._own is not None:
            return number == _HANGUP
        self._own = number
        if self.received is None:
            self.received = number
        return True

    def should_announce(self) -> bool:
        """Whether a first signal has not been announced yet. Returns True at most once."""
        first = self._own is not None and not self._announced
        self._announced |= first
        return first

    def announce(self) -> None:
        """Report the first signal to `on_first`."""
        try:
            self._on_first(signal.Signals(self._own or signal.SIGINT).name)
        except (RuntimeError, OSError):  # another print call is active, or the reader has ended
            return

    def abandon(self) -> None:
        """Raise `Abandoned` if a first signal was received."""
        if self.received is not None and not self._abandoned:
            self._abandoned = True
            raise Abandoned


class Abandonable:
    """A block of work without lasting effects: inside it the first signal raises `Abandoned`."""

    depth = 0

    def __enter__(self) -> None:
        if _deferred:
            _deferred[-1].abandon()
        Abandonable.depth += 1

    def __exit__(self, *_: object) -> None:
        Abandonable.depth -= 1


class ExitAction:
    """While entered, `action` is called once if a signal ends the command.

    It is called in the main thread when the exception passes through this context, or else in
    another thread before the process is ended.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._called = False

    def __enter__(self) -> ExitAction:
        if _watch is not None:
            _watch.exit_actions.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if _watch is not None and self in _watch.exit_actions:
            _watch.exit_actions.remove(self)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.call()

    def call(self) -> None:
        """Call the action, unless it was called before."""
        if not self._called:
            self._called = True
            self._action()


class Watch:
    """Ends the process on a signal, even if the main thread cannot be interrupted.

    The first SIGINT, SIGTERM or SIGHUP (inside `DeferredSignals` the second) ends the process
    with the exit code 128 + its number: by a KeyboardInterrupt in the main thread, or, if the
    process still runs after a grace period, by `os._exit`.

    Args:
        instead_of: a signal handler that is replaced, as Python's default handlers are; any other
            handler stays in place.

    Attributes:
        received: the signal that ends the process; None while there is none.
        unwinds: whether the exception is raised; if False, the process ends by `os._exit`.
    """

    def __init__(self, instead_of: Any = None) -> None:
        self.received: int | None = None
        self.unwinds = False
        self._raised = self._stopped = self._closed = False
        self._ends_at = 0.0
        self._last: tuple[int, float] = (0, 0.0)
        self._echo_s = _LAUNCHED_ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else _ECHO_S
        self._lock = _thread.RLock()
        self.exit_actions: list[ExitAction] = []
        self._hook = sys.unraisablehook
        self._reading, self._writing = os.pipe()
        for end in (self._reading, self._writing):
            os.set_blocking(end, False)
        self._before_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        _thread.start_new_thread(self._run, ())
        self._before = _handle_with(_handler, _ENDING, instead_of=(*_DEFAULTS, instead_of))

    def end_by(self, number: int) -> None:
        """Let a signal end the process; the caller raises the exception itself."""
        with self._lock:
            self.received, self._raised = number, True
            self._ends_at = time.monotonic() + _GRACE_S
        self._wake()

    def close(self) -> None:
        """Restore all handlers."""
        with self._lock:
            self._stopped = True
        _restore(self._before)
        signal.set_wakeup_fd(self._before_fd)
        sys.unraisablehook = self._hook
        self._closed = True  # from now on nothing writes to the pipe
        self._wake()

    def forget(self) -> None:
        """Restore all handlers in a forked child, which shares the pipe but has no thread."""
        signal.set_wakeup_fd(-1)
        _restore(self._before)

    def handle(self) -> None:
        """Act on received signals; called by the signal handler in the main thread."""
        self._read()
        self._wake()  # the thread may have to announce a signal or to start the grace period
        if self.received is None:
            if Abandonable.depth and _deferred:
                _deferred[-1].abandon()
        elif self.unwinds and not self._raised:
            self._raised = True
            # Python prints an exception raised in a callback of C code, and continues.
            sys.unraisablehook = self._report_unraisable
            raise interruption(self.received)

    def _report_unraisable(self, found: Any) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):
            self._hook(found)

    def _read(self) -> None:
        """Process the received signals; called by the handler and the thread."""
        with self._lock:
            try:
                numbers = os.read(self._reading, 512)
            except OSError:  # no signal was received
                return
            for number in numbers:
                self._count(number, time.monotonic())

    def _count(self, number: int, now: float) -> None:
        known = [getattr(signal, name, None) for name in (_FINISHING if _deferred else _ENDING)]
        last, at = self._last
        if number not in known or (number == last and now - at < self._echo_s):
            return
        self._last = (number, now)
        if not (_deferred and _deferred[-1].defer(number)) and self.received is None:
            self.received = number
            self._ends_at = now + (_GRACE_S if self.unwinds else 0.0)

    def _wake(self) -> None:
        try:
            os.write(self._writing, b"\0")
        except OSError:  # the pipe is full, so the thread wakes anyway
            return

    def _run(self) -> None:
        """The thread: announces first signals and ends the process after the grace period."""
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        while not self._closed:
            left_s = self._ends_at - time.monotonic()
            poll.poll(None if self.received is None else max(0.0, 1000 * left_s))
            self._read()
            for deferred in tuple(_deferred):
                if deferred.should_announce():
                    # In a thread of its own: printing blocks if the reader does not read.
                    _thread.start_new_thread(deferred.announce, ())
            with self._lock:
                due = self.received is not None and time.monotonic() >= self._ends_at
                if due and not self._stopped:
                    self._end(128 + (self.received or 0))
        os.close(self._reading)
        os.close(self._writing)

    def _end(self, code: int) -> None:
        done = _thread.allocate_lock()
        done.acquire()
        _thread.start_new_thread(self._call_exit_actions, (done,))
        done.acquire(timeout=_EXIT_ACTIONS_S)  # printing blocks if the reader does not read
        os._exit(code)

    def _call_exit_actions(self, done: Any) -> None:
        try:
            for action in reversed(self.exit_actions):
                action.call()
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
        finally:
            done.release()


_deferred: list[DeferredSignals] = []  # the innermost is the last
_watch: Watch | None = None


def install(instead_of: Any = None) -> Watch | None:
    """Install a `Watch` for a command; returns None outside the main thread or if one exists."""
    global _watch
    if os.name == "posix" and _watch is None:
        try:
            _watch = Watch(instead_of)
        except ValueError:  # not the main thread
            return None
        return _watch
    return None


def uninstall() -> None:
    """Restore the handlers from before `install`; does nothing if there is no watch."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None


def watch() -> Watch | None:
    """The installed watch, or None."""
    return _watch


def _handler(number: int, frame: FrameType | None) -> None:
    if _watch is not None:
        _watch.handle()
        return
    if not _deferred or not _deferred[-1].defer(number):
        raise interruption(number)
    if _deferred[-1].should_announce():
        _deferred[-1].announce()
    if Abandonable.depth:
        _deferred[-1].abandon()


def _handle_with(
    handler: Any, names: tuple[str, ...], *, instead_of: tuple[Any, ...] | None = None
) -> dict[int, Any]:
    """Set a handler for signals that are not ignored; returns the handlers it replaced.

    With `instead_of`, only these handlers are replaced.
    """
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
