"""Two hosts that train one model through torchrun's rendezvous, and the death of one of them.

A host is a network namespace with a name and an address of its own; a pair of virtual cables
joins them, and they share the file system. It needs Linux, root, `ip` and `unshare`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mygpt
from torture import Figure
from torture.runs import differs, text_file

_SOURCES = Path(mygpt.__file__).resolve().parent.parent
_STEPS, _SAVE_EVERY, _STRIKE_AT = 160, 20, 50  # struck well between two saves
_PORT = 29400
_AWAY_S, _LIMIT_S = 3.0, 240.0
# Without the second, what the agents hold for their workers outlives a round: a host that comes
# anew waits for an address that the others told in an earlier one.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_STEP = re.compile(r"^step +(\d+): loss", re.MULTILINE)
_RECIPE = [
    "--preset", "nano", "--batch-size", "8", "--steps", f"{_STEPS}",
    "--save-every", f"{_SAVE_EVERY}", "--save-seconds", "3600", "--print-every", "1",
    "--eval-every", "80", "--sample-tokens", "0", "--device", "cpu",
]  # fmt: skip


@dataclass
class Host:
    """A network namespace in which processes live under a host name of their own.

    Attributes:
        name: of the namespace and of the host.
        folder: where its table of names and what its processes say lie.
        agent: the newest `torchrun` that was started there.
        outputs: of each of them, the file that its workers and it write to.
    """

    name: str
    folder: Path
    agent: subprocess.Popen[bytes] | None = None
    outputs: list[Path] = field(default_factory=list)

    def start(self, command: list[str]) -> None:
        """Start a command there, in this machine's file system."""
        output = self.folder / f"{self.name}-{len(self.outputs)}.txt"
        self.outputs.append(output)
        named = f'hostname {self.name} && mount --bind {self.folder}/names /etc/hosts && exec "$@"'
        inside = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount"]
        left_out = ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        env = {**kept, **_ENVIRONMENT, "PYTHONPATH": str(_SOURCES)}
        with open(output, "wb") as file:
            self.agent = subprocess.Popen(
                [*inside, "sh", "-c", named, "sh", *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
            )

    def processes(self) -> list[int]:
        """The ids of all that runs there."""
        found = _ip("netns", "pids", self.name)
        return [int(line) for line in found.split()]

    def workers(self) -> list[int]:
        """The ids of the newest agent's workers."""
        assert self.agent is not None
        pid = self.agent.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def die(self) -> None:
        """Kill all that runs there, as nothing can be done against."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.agent is not None:
                self.agent.wait()

    def die_unheard(self) -> None:
        """The same without a last word on the wire, as when the power goes."""
        _ip("-n", self.name, "link", "set", "eth0", "down")
        self.die()
        time.sleep(_AWAY_S)
        _ip("-n", self.name, "link", "set", "eth0", "up")

    def kill_worker(self) -> None:
        """Kill one worker; its agent lives."""
        os.kill(self.workers()[0], signal.SIGKILL)

    def last_step(self) -> int:
        """The last step that was told here since the newest start; 0 for none."""
        told = _STEP.findall(self.outputs[-1].read_text()) if self.outputs else []
        return int(told[-1]) if told else 0


Hosts = tuple[Host, Host]


@dataclass(frozen=True)
class Fault:
    """One way in which something of two hosts dies.

    Attributes:
        what: in words.
        strike: does it.
        end: the hosts whose agents end by that, and are started anew.
        meeting: the host whose agent holds the meeting point.
        shard: whether the weights are in parts.
    """

    what: str
    strike: Callable[[Hosts], None]
    end: tuple[int, ...] = ()
    meeting: int = 0
    shard: bool = False


FAULTS = [
    Fault("second host", lambda hosts: hosts[1].die(), end=(1,)),
    Fault("its worker", lambda hosts: hosts[1].kill_worker()),
    Fault("the first host's worker", lambda hosts: hosts[0].kill_worker()),
    Fault("second host, sharded", lambda hosts: hosts[1].die(), end=(1,), shard=True),
    Fault("host of process 0", lambda hosts: hosts[0].die(), end=(0,), meeting=1),
    Fault("second host, unheard", lambda hosts: hosts[1].die_unheard(), end=(1,)),
    Fault("host of the meeting point", lambda hosts: hosts[0].die(), end=(0, 1)),
]


def _ip(*arguments: str) -> str:
    """What `ip` says.

    Raises:
        subprocess.CalledProcessError: where it may not, or cannot.
    """
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts | None]:
    """Two hosts that reach each other, and nothing else; None where the machine has none."""
    mark = secrets.token_hex(3)
    names = [f"mygpt-{mark}-{letter}" for letter in "ab"]
    addresses = [f"10.77.0.{number}" for number in (1, 2)]
    lines = [f"{address} {name}\n" for address, name in zip(addresses, names, strict=True)]
    (folder / "names").write_text("".join(["127.0.0.1 localhost\n", *lines]))
    hosts = Host(names[0], folder), Host(names[1], folder)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield hosts if _joined(names, addresses) else None
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
                host.die()
                _ip("netns", "del", host.name)
        signal.signal(signal.SIGTERM, before)


def _joined(names: list[str], addresses: list[str]) -> bool:
    """Make the namespaces and the cable between them; False where that is not allowed."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    try:
        for name in names:
            _ip("netns", "add", name)
        end = ["eth0", "netns"]
        _ip("link", "add", *end, names[0], "type", "veth", "peer", "name", *end, names[1])
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("netns", "exec", name, "unshare", "--uts", "--mount", "hostname", name)
    except subprocess.CalledProcessError:
        return False
    return True


def _command(run: Path, meeting: Host, *, shard: bool) -> list[str]:
    """The same on both hosts."""
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", run.name,
        "--rdzv-endpoint", f"{meeting.name}:{_PORT}",
    ]  # fmt: skip
    train = ["-m", "mygpt", "train", text_file(run.parent), "--output", str(run), *_RECIPE]
    return [*launch, *train, *(["--shard"] if shard else [])]


def _wait(what: str, hosts: Hosts, done: Callable[[], bool]) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: when it is not in time, with the ends of what the hosts said.
    """
    end = time.monotonic() + _LIMIT_S
    while not done():
        if time.monotonic() > end:
            said = "\n".join(host.outputs[-1].read_text()[-1500:] for host in hosts)
            raise TimeoutError(f"{what}: not in {_LIMIT_S:.0f} s\n{said}")
        time.sleep(0.02)


def _ended(host: Host) -> bool:
    return host.agent is not None and host.agent.poll() is not None


def _finish(hosts: Hosts) -> str:
    """Wait for both agents; what went wrong, empty if nothing did."""
    _wait("the end", hosts, lambda: all(map(_ended, hosts)))
    codes = [host.agent.returncode for host in hosts if host.agent is not None]
    return "" if codes == [0, 0] else f"ended with {codes}"


def _undisturbed(hosts: Hosts, run: Path, *, shard: bool) -> None:
    command = _command(run, hosts[0], shard=shard)
    for host in hosts:
        host.start(command)
    problem = _finish(hosts)
    assert not problem, problem + "".join(host.outputs[-1].read_text()[-1500:] for host in hosts)


def _disturbed(hosts: Hosts, run: Path, fault: Fault) -> tuple[str, float, int]:
    """What went wrong, the seconds from the kill to the next step, and the steps made again."""
    command = _command(run, hosts[fault.meeting], shard=fault.shard)
    for host in hosts:
        host.start(command)
    told = hosts[0]  # its name comes first, so process 0 is there
    _wait("the steps before", hosts, lambda: told.last_step() >= _STRIKE_AT)
    struck_s = time.monotonic()
    fault.strike(hosts)
    before = told.last_step()
    steps_before = len(_STEP.findall(told.outputs[-1].read_text()))
    _wait("the end of an agent", hosts, lambda: all(_ended(hosts[n]) for n in fault.end))
    if fault.end:
        time.sleep(_AWAY_S)
    for number in fault.end:
        hosts[number].start(command)
    if 0 in fault.end:
        steps_before = 0

    def next_steps() -> list[str]:
        return _STEP.findall(told.outputs[-1].read_text())[steps_before:]

    _wait("the next step", hosts, lambda: bool(next_steps()) or all(map(_ended, hosts)))
    seconds, first = time.monotonic() - struck_s, int((next_steps() or ["0"])[0])
    return _finish(hosts), seconds, before - first + 1


def hosts(count: int, folder: Path) -> Figure:
    """Two hosts train together; something of them is killed, and started anew."""
    figure = Figure("of two hosts something killed, started anew, same to the bit")
    if not count:
        figure.note = "not run: it takes minutes, `python -m torture hosts`"
        return figure
    with two_hosts(folder) as pair:
        if pair is None:
            figure.note = "not run: network namespaces are not allowed here"
            return figure
        notes = []
        for number, fault in enumerate(FAULTS[:count]):
            reference = folder / ("sharded" if fault.shard else "whole")
            if not reference.exists():
                _undisturbed(pair, reference, shard=fault.shard)
            run, seconds, again = folder / f"run-{number}", 0.0, 0
            try:
                problem, seconds, again = _disturbed(pair, run, fault)
                problem = problem or differs(run, reference)
            except TimeoutError as error:
                problem = str(error)
            for host in pair:
                host.die()
            few = 0 < again <= _SAVE_EVERY
            figure.count(not problem and few, f"{fault.what}: {problem}, {again} steps again")
            notes.append(f"{fault.what} {seconds:.1f} s, {again}")
        figure.note = "from the kill to the next step, and steps made again: " + "; ".join(notes)
    return figure
