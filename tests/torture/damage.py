"""Files that something happened to: flipped bits, cut ends, hostile headers, foreign pickles."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mygpt.checkpoint import read_checkpoint
from mygpt.errors import MygptError
from mygpt.training.run import RunFolder, read_state
from torture import Figure
from torture.runs import Child, differs, fresh, in_child, resume, train

_MODEL, _STATE = "best.safetensors", "last.state.safetensors"
_MOST_BYTES = 2**30  # of memory, for whatever a hostile file says


def _a_run(folder: Path) -> Path:
    run = folder / "reference"
    if not run.exists():
        assert in_child(lambda: train(run)) == 0
    return run


def _read(path: Path) -> Any:
    """Read a file of a run as what its name says it is."""
    return read_state(path) if path.name.endswith("state.safetensors") else read_checkpoint(path)


def _refusal(path: Path) -> str | None:
    """The words with which a file is refused; None when it is not."""
    try:
        _read(path)
    except MygptError as error:
        return str(error)
    return None


def flipped_bits(count: int, folder: Path) -> Figure:
    """One bit anywhere in a model's file or a state."""
    figure = Figure("single flipped bits refused, naming the file")
    run, chance = _a_run(folder), random.Random(0)
    for trial in range(count):
        path = folder / (_MODEL, _STATE)[trial % 2]
        data = bytearray((run / path.name).read_bytes())
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        told = _refusal(path)
        figure.count(told is not None and str(path) in told, f"bit {bit} of {path.name}: {told}")
    return figure


def cut_ends(count: int, folder: Path) -> Figure:
    """A state cut anywhere is refused, and going on takes the one before it.

    Each time the previous state is what is loaded; each 20th time the run also goes on from it.
    """
    figure = Figure("truncations refused, the previous state taken in its place")
    reference, chance = _a_run(folder), random.Random(0)
    whole = (reference / _STATE).read_bytes()
    run = fresh(folder)
    shutil.copytree(reference, run)
    went_on = 0
    for trial in range(count):
        path = run / _STATE
        length = chance.randrange(len(whole))
        path.write_bytes(whole[:length])
        told = _refusal(path)
        state, note = RunFolder(run).load_state()
        ok = told is not None and str(path) in told and note is not None and told in note
        ok = ok and state.path.name == "previous.state.safetensors"
        if ok and trial % 20 == 0:
            ok = in_child(lambda: _goes_on_from_previous(run)) == 0 and not differs(run, reference)
            went_on += 1
            shutil.rmtree(run)
            shutil.copytree(reference, run)
        figure.count(ok, f"cut to {length}: {told}")
    figure.note = f"gone on with {went_on} times, same to the bit"
    return figure


def _goes_on_from_previous(run: Path) -> None:
    resume(run)
    assert (run / f"damaged.{_STATE}").exists()


class Bomb:
    """Says that it was run, by making a folder."""

    def __init__(self, marker: Path, how: Callable[..., Any] = os.mkdir) -> None:
        self.marker, self.how = str(marker), how

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how, (self.marker,)


def hostile_pickles(count: int, folder: Path) -> Figure:
    """Pickles of all protocols, bare, as torch writes them, in a zip, after a header, cut."""
    import torch

    figure = Figure("hostile pickles refused and not run")
    chance, marker = random.Random(0), folder / "ran"
    for trial in range(count):
        bomb: Any = Bomb(marker)
        for _ in range(chance.randrange(3)):
            bomb = [bomb] if chance.random() < 0.5 else {"model": bomb, "n": chance.random()}
        path = folder / chance.choice(["x.pt", "ckpt.pt", _MODEL, _STATE])
        if trial % 5 == 0:
            torch.save(bomb, path, _use_new_zipfile_serialization=bool(trial % 2))
        else:
            path.write_bytes(pickle.dumps(bomb, protocol=chance.randrange(6)))
        if trial % 7 == 0:  # what else a forger puts around it
            data = path.read_bytes()
            path.write_bytes(len(data).to_bytes(8, "little") + data)
        told = _refusal(path)
        figure.count(
            told is not None and str(path) in told and not marker.exists(), f"trial {trial}: {told}"
        )
        if marker.exists():
            marker.rmdir()
    pickle.loads(pickle.dumps(Bomb(marker)))
    figure.count(marker.exists(), "the trap itself does not work")
    figure.of, figure.passed = figure.of - 1, figure.passed - marker.exists()
    return figure


def _forged(header: bytes, body: bytes) -> bytes:
    """A file of that header, with its digest made right, as a forger would."""
    place = header.find(b'"sha256":"') + 10
    data = len(header).to_bytes(8, "little") + header + body
    if place < 10:
        return data
    zeroed = data[: place + 8] + b"0" * 64 + data[place + 72 :]
    return data[: place + 8] + hashlib.sha256(zeroed).hexdigest().encode() + data[place + 72 :]


_STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, "", "x",
    "../../etc/passwd", "/etc/passwd", "\u202e", "\x00", "NaN", [], {}, [[]],
    [0], [-1], [2**62] * 2,
    {"a": 1}, "9" * 5000, float("nan"), float("inf"), ["x"] * 1000, {"kind": "char", "chars": []},
]  # fmt: skip


def _mutated(value: Any, chance: random.Random) -> Any:
    """The same JSON value with something in it changed, dropped, doubled or nested."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        changed = dict(value)
        what = chance.random()
        if what < 0.15:
            del changed[key]
        elif what < 0.25:
            changed[f"{key}{chance.choice(['', '2', '/x'])}more"] = changed[key]
        elif what < 0.4:
            changed[key] = chance.choice(_STRANGE)
        else:
            changed[key] = _mutated(changed[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.7:
        changed_list = list(value)
        changed_list[chance.randrange(len(value))] = chance.choice(_STRANGE)
        return changed_list
    if isinstance(value, str) and value[:1] == "{" and chance.random() < 0.9:
        with contextlib.suppress(ValueError):  # a part: JSON inside JSON
            return json.dumps(_mutated(json.loads(value), chance), separators=(",", ":"))
    return chance.choice(_STRANGE)


def _noise(header: bytes, chance: random.Random) -> bytes:
    """The header's bytes with some changed, cut or put in."""
    data = bytearray(header)
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(data))
        what = chance.randrange(3)
        if what == 0:
            data[place] = chance.randrange(256)
        elif what == 1:
            del data[place : place + chance.randrange(1, 40)]
        else:
            data[place:place] = chance.choice([b"[" * 5000, b'"', b"{", b"9" * 400, b"\\u0000"])
        if not data:
            data = bytearray(b"{}")
    return bytes(data)


def hostile_headers(count: int, folder: Path) -> Figure:
    """Mutated headers and metadata with right digests: our own refusal, or a file that is sound.

    Done in a child with a limit on its memory, which watches what files are opened. What is
    accepted is also put to use: a model is built, a run is gone on with.
    """
    figure = Figure("mutated headers and metadata: refused by us or sound, memory bounded")
    reference = _a_run(folder)
    per_child = 250
    counts = {"refused": 0, "sound": 0}
    for first in range(0, count, per_child):
        trials = range(first, min(first + per_child, count))
        out = folder / "trials.json"
        child = Child(lambda _, t=trials, o=out: _try_headers(reference, t, o))  # type: ignore[misc]
        code = child.wait()
        results = json.loads(out.read_text()) if code == 0 else {}
        out.unlink(missing_ok=True)
        for trial in trials:
            told = results.get(str(trial), f"the child ended with {code}")
            figure.count(told in counts, f"trial {trial}: {told}")
            if told in counts:
                counts[told] += 1
    figure.note = f"{counts['refused']:,} refused, {counts['sound']:,} sound"
    return figure


def _try_headers(reference: Path, trials: range, out: Path) -> None:
    work = out.parent / "hostile"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(reference, work)
    (work / "previous.state.safetensors").unlink()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MOST_BYTES, resource.RLIM_INFINITY))
    results = {}
    _watch_files()
    for trial in trials:
        chance = random.Random(trial)
        name = (_MODEL, _STATE)[trial % 2]
        data = (reference / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        if trial % 4 < 2:
            header = json.loads(data[8:end])
            for _ in range(chance.randrange(1, 4)):
                header = _mutated(header, chance)
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
        else:
            text = _noise(data[8:end], chance)
        (work / name).write_bytes(_forged(text, data[end:]))
        results[trial] = _use(work, name)
    out.write_text(json.dumps(results))


_opened: list[str] = []


def _watch_files() -> None:
    """From now on, in this process, note every file that is opened, but for code."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.fsdecode(args[0])
            if not path.endswith((".py", ".pyc", ".so")) and not path.startswith(sys.prefix):
                _opened.append(path)

    sys.addaudithook(hook)


def _use(work: Path, name: str) -> str:
    """Read a file and use what it holds: "refused", "sound", or what else happened.

    A model's file must not lead to any other. A state's names the text to go on with, which
    is read, as text, and compared with its digest.
    """
    del _opened[:]
    told = _used(work, name)
    system = ("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup")  # how much memory is free
    others = [p for p in _opened if p != str(work / name) and not p.startswith(system)]
    if name == _MODEL and others:
        return f"opened {others[0]}"
    return told


def _used(work: Path, name: str) -> str:
    try:
        if name == _MODEL:
            checkpoint = read_checkpoint(work / name)
            checkpoint.build_model()
            checkpoint.tokenizer.decode([0])
        else:
            read_state(work / name)
            before = (work / name).read_bytes()
            try:
                resume(work)  # of a run that is finished: no step is made
            finally:
                (work / name).write_bytes(before)
    except MygptError as error:
        return "refused" if "\n" not in str(error) else f"more than one line: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "sound"
