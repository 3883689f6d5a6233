"""Damaged and forged files: flipped bits, truncations, hostile headers, hostile pickles."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from mutations import forged, mutated_json, noise
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.errors import MygptError
from mygpt.training.run import RunFolder
from mygpt.training.state import read_state
from torture import Tally
from torture.runs import fresh, in_child, reference_of, resume, resumes_differently

_MODEL, _STATE = "best.safetensors", "last.state.safetensors"
_MAX_BYTES = 2**30  # of memory, whatever a hostile file claims


def _refusal(path: Path) -> str:
    """The message with which a run's state or model is refused; empty if it is accepted."""
    try:
        read_state(path) if path.name == _STATE else read_checkpoint(path)
    except MygptError as error:
        return str(error)
    return ""


def flipped_bits(count: int, folder: Path) -> Tally:
    """One bit anywhere in a model's file or a state."""
    tally = Tally("single flipped bits refused, naming the file")
    run, rng = reference_of(folder), random.Random(0)
    for trial in range(count):
        path = folder / (_MODEL, _STATE)[trial % 2]
        data = bytearray((run / path.name).read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        refusal = _refusal(path)
        tally.count(str(path) in refusal, f"bit {bit} of {path.name}: {refusal}")
    return tally


def cut_ends(count: int, folder: Path) -> Tally:
    """A state truncated anywhere is refused, and resuming loads the previous state.

    Every 20th trial also trains on from it, to the end.
    """
    tally = Tally("truncations refused, the previous state loaded instead")
    reference, rng = reference_of(folder), random.Random(0)
    intact = (reference / _STATE).read_bytes()
    run, resumed = shutil.copytree(reference, fresh(folder)), 0
    for trial in range(count):
        path = run / _STATE
        length = rng.randrange(len(intact))
        path.write_bytes(intact[:length])
        refusal = _refusal(path)
        state, note = RunFolder(run).load_state()
        ok = str(path) in refusal and note is not None and refusal in note
        ok = ok and state.path.name == "previous.state.safetensors"
        if ok and trial % 20 == 0:
            ok = not resumes_differently(run, reference)
            ok = ok and (run / f"damaged.{_STATE}").exists()
            resumed += 1
            shutil.copytree(reference, fresh(folder))
        tally.count(ok, f"cut to {length}: {refusal}")
    tally.note = f"resumed {resumed} times, bitwise the same"
    return tally


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def hostile_pickles(count: int, folder: Path) -> Tally:
    """Pickles of all protocols: alone, as torch writes them, in a zip file, and after a header."""
    import torch

    tally = Tally("hostile pickles refused and not executed")
    rng, marker = random.Random(0), folder / "ran"
    for trial in range(count):
        bomb: Any = Bomb(marker)
        for _ in range(rng.randrange(3)):
            bomb = [bomb] if rng.random() < 0.5 else {"model": bomb, "n": rng.random()}
        path = folder / rng.choice(["x.pt", "ckpt.pt", _MODEL, _STATE])
        if trial % 5 == 0:
            torch.save(bomb, path, _use_new_zipfile_serialization=bool(trial % 2))
        else:
            path.write_bytes(pickle.dumps(bomb, protocol=rng.randrange(6)))
        if trial % 7 == 0:  # with a length before it, as a header has
            data = path.read_bytes()
            path.write_bytes(len(data).to_bytes(8, "little") + data)
        refusal = _refusal(path)
        tally.count(str(path) in refusal and not marker.exists(), f"trial {trial}: {refusal}")
        if marker.exists():
            marker.rmdir()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the pickle does nothing even where it is loaded"
    return tally


def hostile_headers(count: int, folder: Path) -> Tally:
    """Mutated headers and metadata with correct digests: a MygptError, or a usable file.

    In a child process with limited memory, which records the files that are opened. What is
    accepted is also used: a model is built from it, a run is resumed.
    """
    tally = Tally("mutated headers and metadata: refused or usable, memory bounded")
    reference = reference_of(folder)
    per_child = 250
    counts = {"refused": 0, "usable": 0}
    for first in range(0, count, per_child):
        trials = range(first, min(first + per_child, count))
        out = folder / "trials.json"
        code = in_child(_try_headers, reference, trials, out)
        results = json.loads(out.read_text()) if code == 0 else {}
        out.unlink(missing_ok=True)
        for trial in trials:
            result = results.get(str(trial), f"the child ended with {code}")
            tally.count(result in counts, f"trial {trial}: {result}")
            if result in counts:
                counts[result] += 1
    tally.note = f"{counts['refused']:,} refused, {counts['usable']:,} usable"
    return tally


def _try_headers(reference: Path, trials: range, out: Path) -> None:
    work = out.parent / "hostile"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(reference, work)
    (work / "previous.state.safetensors").unlink()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MAX_BYTES, resource.RLIM_INFINITY))
    results = {}
    _record_opened_files()
    for trial in trials:
        rng = random.Random(trial)
        name = (_MODEL, _STATE)[trial % 2]
        data = (reference / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        if trial % 4 < 2:
            header = json.loads(data[8:end])
            for _ in range(rng.randrange(1, 4)):
                header = mutated_json(header, rng)
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
        else:
            text = noise(data[8:end], rng)
        (work / name).write_bytes(forged(text, data[end:]))
        results[trial] = _use(work, name)
    out.write_text(json.dumps(results))


_opened: list[str] = []


def _record_opened_files() -> None:
    """From now on, in this process, record every file that is opened, except code."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.fsdecode(args[0])
            if not path.endswith((".py", ".pyc", ".so")) and not path.startswith(sys.prefix):
                _opened.append(path)

    sys.addaudithook(hook)


def _use(work: Path, name: str) -> str:
    """Read a file and use what it holds: "refused", "usable", or what went wrong.

    Reading a model must open no other file. A state names the text of its run, which resuming
    reads, as text, and compares with its digest.
    """
    del _opened[:]
    result = _used(work, name)
    system = ("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup")  # the free memory
    others = [p for p in _opened if p != str(work / name) and not p.startswith(system)]
    if name == _MODEL and others:
        return f"opened {others[0]}"
    return result


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
                resume(work)  # the run is finished: no step is taken
            finally:
                (work / name).write_bytes(before)
    except MygptError as error:
        return "refused" if "\n" not in str(error) else f"more than one line: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "usable"
