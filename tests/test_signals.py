"""Signals end a command within a second, whatever it does, and leave a program as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mygpt import signals
from mygpt.cli import main
from mygpt.signals import Abandonable, Abandoned, DeferredSignals

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's"),
]
LIMIT_S = 5.0  # a second on an idle machine


def command(body: str) -> str:
    """A program whose command reports that it runs, and does this."""
    start = """
import ctypes, hashlib, os, time
import mygpt.cli.commands as commands
from mygpt.cli import main
from mygpt.signals import DeferredSignals, ExitAction
def report(): print("running", flush=True)
def work(): hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
def fill():  # the pipe behind standard output
    os.set_blocking(1, False)
    try:
        while os.write(1, b"."):
            pass
    except BlockingIOError:
        os.set_blocking(1, True)
def run(args):
"""
    return start + textwrap.indent(textwrap.dedent(body), "    ") + "\ncommands.run = run\nmain()"


# The main thread is inside a C function that gives up Python's lock, as kernels do.
IN_A_KERNEL = command("report(); work()")
# In a callback from C, an exception is printed and nothing else.
IN_A_CALLBACK = command("""
    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    def compare(one, other):
        time.sleep(60)
        return 0
    report()
    ctypes.CDLL(None).qsort((ctypes.c_int * 64)(), 64, 4, compare)
""")
# A library makes something else of the exception.
IN_A_LIBRARY = command("""
    try:
        report()
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("half imported") from None
""")
TWICE = command("""
    with ExitAction(lambda: print("last words", flush=True)):
        with DeferredSignals(lambda name: print("first", name, flush=True)):
            report()
            work()
""")


def begin(program: str, **environment: str) -> subprocess.Popen[str]:
    """A command in a process of its own, once it runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    return process


def ends(process: subprocess.Popen[str], number: int) -> tuple[int, str, str]:
    """Send the signal: code, output and errors of the process, which ends soon."""
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < LIMIT_S
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("program", [IN_A_KERNEL, IN_A_CALLBACK, IN_A_LIBRARY])
def test_a_signal_ends_a_command_wherever_it_strikes(program: str, number: int) -> None:
    """It was lost in callbacks and waited for kernels; libraries made errors of it."""
    assert ends(begin(program), number) == (128 + number, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_what_finishes_after_the_first(number: int) -> None:
    """Also where the main thread runs no Python: two signals of a number were one to Python."""
    process = begin(TWICE)
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == f"first {signal.Signals(number).name}\n"
    time.sleep(0.1)
    assert process.poll() is None
    assert ends(process, number) == (128 + number, "last words\n", "")


def test_a_signal_that_is_sent_twice_at_once_is_one(tmp_path: Path) -> None:
    """As `timeout` does; and a terminal that closes may send several SIGHUPs."""
    for number, gap_s in ((signal.SIGTERM, 0.0), (signal.SIGHUP, 0.1)):
        process = begin(TWICE)
        for _ in range(3):
            process.send_signal(number)
            time.sleep(gap_s)
        time.sleep(0.2)
        assert process.poll() is None
        code, out, _ = ends(process, signal.SIGINT)
        assert (code, out.count("first")) == (130, 1)


def test_what_torchrun_repeats_is_no_second_signal() -> None:
    """A terminal sends Ctrl-C to all, and torchrun sends it again to each."""
    process = begin(TWICE, TORCHELASTIC_RUN_ID="none")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.poll() is None
    assert ends(process, signal.SIGTERM)[0] == 128 + signal.SIGTERM


def test_output_that_nobody_reads_keeps_no_command_alive() -> None:
    """Neither the report of a first signal nor the last words are waited for."""
    process = begin(TWICE.replace("    report()", "    report(); fill()"))
    time.sleep(0.3)  # it fills the pipe
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert time.monotonic() - began < LIMIT_S
    process.communicate()


def test_a_command_leaves_a_programs_signals_as_they_were(capsys: pytest.CaptureFixture) -> None:
    def own(number: int, frame: object) -> None:
        raise AssertionError

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    before = signal.signal(signal.SIGTERM, own)
    try:
        handlers = [signal.getsignal(getattr(signal, name)) for name in names]
        with pytest.raises(SystemExit):
            main(["--version"])
        assert [signal.getsignal(getattr(signal, name)) for name in names] == handlers
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signals.watch() is None
    wakeup = signal.set_wakeup_fd(-1)
    assert wakeup == -1


def test_an_ignored_signal_stays_ignored_in_a_command() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        watch = signals.install()
        assert watch is not None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with DeferredSignals(lambda name: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signals.uninstall()
        signal.signal(signal.SIGHUP, before)


def test_a_signal_of_a_forked_child_does_not_end_its_parent() -> None:
    """They share the pipe that the numbers of signals go through."""
    watch = signals.install()
    assert watch is not None
    try:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, lambda *_: None)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        time.sleep(0.1)
        assert watch.received is None
    finally:
        signals.uninstall()


def test_a_first_signal_abandons_what_leaves_nothing_half_done() -> None:
    with DeferredSignals(lambda name: None) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.received == signal.SIGINT
    with DeferredSignals(lambda name: None) as interrupt:
        with pytest.raises(Abandoned), Abandonable():
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    with DeferredSignals(lambda name: None):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Abandoned), Abandonable():
            pytest.fail("nothing is begun after a signal")


def test_little_is_imported_before_a_signal_has_its_handler() -> None:
    """SIGINT 0.05 s after the start printed a traceback out of an import."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import mygpt.cli; print(*sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    found = subprocess.check_output(command, text=True).split()
    assert "mygpt.cli" in found
    assert not {"typing", "typer", "re", "threading", "contextlib"} & set(found)


# --- compiling ------------------------------------------------------------------------------

COMPILING = """
import os, signal, threading, time
from mygpt import processes
from mygpt.cpu.common import build
start_process = processes.start
def start(*args):
    process = start_process(*args)
    print(process.pid, flush=True)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    return process
processes.start = start
try:
    build.compile_now()
    print("compiled")
except KeyboardInterrupt:
    print("interrupted")
"""


def compiling(program: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MYGPT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_ctrl_c_ends_compiling(tmp_path: Path) -> None:
    """In LLVM's callbacks it was lost, and the program carried on."""
    found = compiling(COMPILING, tmp_path / "cache")
    assert found.returncode == 0, found.stderr
    pid, *rest = found.stdout.split()
    assert rest == ["interrupted"]
    with pytest.raises(ProcessLookupError):  # waited for
        os.kill(int(pid), 0)
    assert not (tmp_path / "cache").exists()


def test_the_process_that_compiles_ends_with_the_command(tmp_path: Path) -> None:
    """Also where that is killed: its input ends."""
    found = compiling(COMPILING.replace("signal.SIGINT", "signal.SIGKILL"), tmp_path / "cache")
    assert found.returncode == -signal.SIGKILL
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end and _runs(int(found.stdout)):
        time.sleep(0.02)
    assert not _runs(int(found.stdout))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc").exists()


@pytest.mark.kernels
def test_where_no_process_can_be_had_the_kernels_are_compiled_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mygpt.cpu.common import build

    monkeypatch.setattr(sys, "executable", "/no such python")
    monkeypatch.setattr(build, "_compile_here", lambda program: b"compiled here")
    assert build._compile(build.DECODING) == b"compiled here"
