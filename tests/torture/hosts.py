"""Two hosts train one model through torchrun's rendezvous, and one of them dies.

A host is a network namespace with its own name and address; a virtual Ethernet pair connects the
two, and they share the file system. It needs Linux, root, `ip` and `unshare`.
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

from paths import SOURCES
from torture import Tally
from torture.runs import differs, text_file

_STEPS, _SAVE_EVERY, _FAULT_AT = 160, 20, 50  # the fault is well between two saves
_PORT = 29400
_AWAY_S, _LIMIT_S = 3.0, 240.0
# Without the second, the agents' store for their workers outlives a round of the rendezvous: a
# host that joins again waits for an address that was published in an earlier round.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_STEP = re.compile(r"^step +(\d+): loss", re.MULTILINE)
_RECIPE = [
    "--preset", "nano", "--batch-size", "8", "--steps", f"{_STEPS}",
    "--save-every", f"{_SAVE_EVERY}", "--save-seconds", "3600", "--print-every", "1",
    "--eval-every", "80", "--sample-tokens", "0", "--device", "cpu",
]  # fmt: skip


@dataclass
class Host:
    """A network namespace with its own host name, in which processes run.

    Attributes:
        name: of the namespace and of the host.
        folder: of the table of host names and of its processes' output.
        agent: the `torchrun` that was started there last.
        outputs: the output files of all agents and their workers, the last one's last.
    """

    name: str
    folder: Path
    agent: subprocess.Popen[bytes] | None = None
    outputs: list[Path] = field(default_factory=list)

    def start(self, command: list[str]) -> None:
        """Start a command there; the file system is this machine's."""
        output = self.folder / f"{self.name}-{len(self.outputs)}.txt"
        self.outputs.append(output)
        named = f'hostname {self.name} && mount --bind {self.folder}/names /etc/hosts && exec "$@"'
        inside = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount"]
        dropped = ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        env = {**kept, **_ENVIRONMENT, "PYTHONPATH": str(SOURCES)}
        with open(output, "wb") as file:
            self.agent = subprocess.Popen(
                [*inside, "sh", "-c", named, "sh", *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
            )

    def processes(self) -> list[int]:
        """The ids of all its processes."""
        found = _ip("netns", "pids", self.name)
        return [int(line) for line in found.split()]

    def workers(self) -> list[int]:
        """The ids of the newest agent's workers."""
        assert self.agent is not None
        pid = self.agent.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def die(self) -> None:
        """Send SIGKILL to all its processes."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.agent is not None:
                self.agent.wait()

    def die_without_closing(self) -> None:
        """The same, but no connection is closed, as at a loss of power."""
        _ip("-n", self.name, "link", "set", "eth0", "down")
        self.die()
        time.sleep(_AWAY_S)
        _ip("-n", self.name, "link", "set", "eth0", "up")

    def kill_worker(self) -> None:
        """Kill one worker; its agent lives."""
        os.kill(self.workers()[0], signal.SIGKILL)

    def last_step(self) -> int:
        """The last step that its current agent has logged; 0 for none."""
        steps = _STEP.findall(self.outputs[-1].read_text()) if self.outputs else []
        return int(steps[-1]) if steps else 0


Hosts = tuple[Host, Host]


@dataclass(frozen=True)
class Fault:
    """One way in which a host or a process dies.

    Attributes:
        what: its description.
        apply: makes it happen.
        end: the hosts whose agents end by it, and are restarted.
        rendezvous: the host whose agent holds the rendezvous.
        shard: whether the weights are sharded.
    """

    what: str
    apply: Callable[[Hosts], None]
    end: tuple[int, ...] = ()
    rendezvous: int = 0
    shard: bool = False


FAULTS = [
    Fault("second host", lambda hosts: hosts[1].die(), end=(1,)),
    Fault("its worker", lambda hosts: hosts[1].kill_worker()),
    Fault("the first host's worker", lambda hosts: hosts[0].kill_worker()),
    Fault("second host, sharded", lambda hosts: hosts[1].die(), end=(1,), shard=True),
    Fault("host of process 0", lambda hosts: hosts[0].die(), end=(0,), rendezvous=1),
    Fault(
        "second host, no connection closed", lambda hosts: hosts[1].die_without_closing(), end=(1,)
    ),
    Fault("host of the rendezvous", lambda hosts: hosts[0].die(), end=(0, 1)),
]


def _ip(*arguments: str) -> str:
    """The output of `ip`.

    Raises:
        subprocess.CalledProcessError: if it fails, or is not allowed.
    """
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts | None]:
    """Two hosts that reach only each other; None where namespaces are not allowed."""
    mark = secrets.token_hex(3)
    names = [f"mygpt-{mark}-{letter}" for letter in "ab"]
    addresses = [f"10.77.0.{number}" for number in (1, 2)]
    lines = [f"{address} {name}\n" for address, name in zip(addresses, names, strict=True)]
    (folder / "names").write_text("".join(["127.0.0.1 localhost\n", *lines]))
    hosts = Host(names[0], folder), Host(names[1], folder)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield hosts if _connected(names, addresses) else None
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
                host.die()
                _ip("netns", "del", host.name)
        signal.signal(signal.SIGTERM, before)


def _connected(names: list[str], addresses: list[str]) -> bool:
    """Make the namespaces and the link between them; False where that is not allowed."""
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


def _command(run: Path, rendezvous: Host, *, shard: bool) -> list[str]:
    """The command line, the same on both hosts."""
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", run.name,
        "--rdzv-endpoint", f"{rendezvous.name}:{_PORT}",
    ]  # fmt: skip
    train = ["-m", "mygpt", "train", text_file(run.parent), "--output", str(run)]
    return [*launch, *train, "--resume", "auto", *_RECIPE, *(["--shard"] if shard else [])]


def _wait(what: str, hosts: Hosts, done: Callable[[], bool]) -> None:
    """Wait until `done()`.

    Raises:
        TimeoutError: after _LIMIT_S, with the ends of the hosts' outputs.
    """
    end = time.monotonic() + _LIMIT_S
    while not done():
        if time.monotonic() > end:
            output = "\n".join(host.outputs[-1].read_text()[-1500:] for host in hosts)
            raise TimeoutError(f"{what}: not in {_LIMIT_S:.0f} s\n{output}")
        time.sleep(0.02)


def _ended(host: Host) -> bool:
    return host.agent is not None and host.agent.poll() is not None


def _finish(hosts: Hosts) -> str:
    """Wait for both agents; what failed, empty if nothing did."""
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
    """What failed, seconds from the fault to the next step, and the count of recomputed steps."""
    command = _command(run, hosts[fault.rendezvous], shard=fault.shard)
    for host in hosts:
        host.start(command)
    first = hosts[0]  # its name sorts first, so it has process 0, which logs
    _wait("the steps before", hosts, lambda: first.last_step() >= _FAULT_AT)
    fault_s = time.monotonic()
    fault.apply(hosts)
    before = first.last_step()
    steps_before = len(_STEP.findall(first.outputs[-1].read_text()))
    _wait("the end of an agent", hosts, lambda: all(_ended(hosts[n]) for n in fault.end))
    if fault.end:
        time.sleep(_AWAY_S)
    for number in fault.end:
        hosts[number].start(command)
    if 0 in fault.end:
        steps_before = 0

    def next_steps() -> list[str]:
        return _STEP.findall(first.outputs[-1].read_text())[steps_before:]

    _wait("the next step", hosts, lambda: bool(next_steps()) or all(map(_ended, hosts)))
    seconds, resumed_at = time.monotonic() - fault_s, int((next_steps() or ["0"])[0])
    return _finish(hosts), seconds, before - resumed_at + 1


def hosts(count: int, folder: Path) -> Tally:
    """Two hosts train one model; a host or a process of them is killed and restarted."""
    tally = Tally("one of two hosts killed and restarted, bitwise the same")
    if not count:
        tally.note = "not run: it takes minutes, `python -m torture hosts`"
        return tally
    with two_hosts(folder) as pair:
        if pair is None:
            tally.note = "not run: network namespaces are not allowed here"
            return tally
        notes = []
        for number, fault in enumerate(FAULTS[:count]):
            reference = folder / ("sharded" if fault.shard else "replicated")
            if not reference.exists():
                _undisturbed(pair, reference, shard=fault.shard)
            run, seconds, recomputed = folder / f"run-{number}", 0.0, 0
            try:
                problem, seconds, recomputed = _disturbed(pair, run, fault)
                problem = problem or differs(run, reference)
            except TimeoutError as error:
                problem = str(error)
            for host in pair:
                host.die()
            few = 0 < recomputed <= _SAVE_EVERY
            tally.count(
                not problem and few, f"{fault.what}: {problem}, {recomputed} steps recomputed"
            )
            notes.append(f"{fault.what} {seconds:.1f} s, {recomputed}")
        tally.note = "from the fault to the next step, and recomputed steps: " + "; ".join(notes)
    return tally
