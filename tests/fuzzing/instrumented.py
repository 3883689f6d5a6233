"""The process that fuzzes one target: `python -m fuzzing.instrumented TARGET [OPTION...]`.

The options are libFuzzer's. An exception that is a fault is stored once for each place where it is
raised, and fuzzing continues.
A hang, too much memory and a crash of machine code end the process; libFuzzer stores the input.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import resource
import sys
import traceback
from pathlib import Path

import atheris

from fuzzing import CORPUS, FOUND, LONGEST, MOST_BYTES, Target, target

_INCLUDED = ["mygpt", "h11", "http.server", "pickletools", "zipfile"]
_COMPILED = ["mygpt.cpu"]  # Numba compiles its functions, which must not be changed
_LARGER = 2**31  # bytes of address space beyond what libraries took; no allocation may need more


def main(name: str, options: list[str]) -> None:
    """Fuzz until libFuzzer's limits are reached."""
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    if name == "torch_files":
        importlib.import_module("torch")
    with atheris.instrument_imports(include=_INCLUDED, exclude=_COMPILED):
        fuzzed = target(name)
        for path in sorted((CORPUS / name).iterdir()):  # imports inside functions happen now
            fuzzed.accepts(path.read_bytes())
    if name != "torch_files":
        assert "torch" not in sys.modules, f"{name} imports torch"
    _limit_memory()
    checked = _Checked(fuzzed, found)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        def at_random(part: bytes) -> bytes:
            return atheris.Mutate(part, max(1, most))

        try:
            return fuzzed.mutated(data, random.Random(seed), at_random)[:most]
        except RecursionError:  # JSON that is nested as deep as Python can read
            return at_random(data)

    atheris.Setup([name, *options], checked, custom_mutator=mutate)
    atheris.Fuzz()


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _LARGER, resource.RLIM_INFINITY))


class _Checked:
    """Parses an input; stores it if that is a fault."""

    def __init__(self, fuzzed: Target, found: Path) -> None:
        self._fuzzed, self._found, self._known = fuzzed, found, set[str]()

    def __call__(self, data: bytes) -> None:
        try:
            self._fuzzed.accepts(data[:LONGEST])
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a Rust library's panic is not an Exception
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} {where.filename}:{where.lineno}"
            if place not in self._known:
                self._known.add(place)
                name = f"crash-{hashlib.sha256(data).hexdigest()[:12]}"
                (self._found / name).write_bytes(data)
                traceback.print_exc()
                print(f"FAULT {name}: {place}: {error!s:.200}", file=sys.stderr, flush=True)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # never falls again
        if most > MOST_BYTES:
            raise MemoryError(f"{most:,} bytes were resident")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
