"""`python -m fuzzing [TARGET...] [--seconds 60]`: fuzz each target, one after the other.

Inputs that reach new code are kept in build/fuzz/TARGET, where the next run begins, and the output
of libFuzzer in build/fuzz/TARGET.log.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fuzzing import CORPUS, FOUND, HANG_S, LONGEST, MOST_BYTES, NAMES

_KEPT = Path("build", "fuzz")
_MEMORY = Path("/dev/shm")  # files of inputs are written into memory where there is such a folder
_MOST_ENDS = 10  # hangs, crashes and the like, after which a target is given up
_STATUS = re.compile(r"^#(\d+)\s.*?cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


def main() -> int:
    """Fuzz, and print a line for each target; 1 if a fault was found, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fuzzing", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    options = parser.parse_args()
    if unknown := sorted(set(options.targets) - set(NAMES)):
        parser.error(f"there is no target {unknown[0]}: choose {', '.join(NAMES)}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is missing: pip install -e '.[fuzz]'")
    if options.seconds < 1:
        parser.error(f"--seconds {options.seconds}: at least 1 is needed")
    faults = [fuzz(name, options.seconds) for name in options.targets or NAMES]
    return min(1, sum(faults))


def fuzz(name: str, seconds: int) -> int:
    """Fuzz one target, print what was reached and found, and return the number of faults."""
    kept, found = _KEPT / name, FOUND / name
    for folder in (kept, found):
        folder.mkdir(parents=True, exist_ok=True)
    before, log = set(found.iterdir()), kept.with_suffix(".log")
    log.write_bytes(b"")
    began, runs, reached = time.monotonic(), 0, [0, 0, 0]
    for _ in range(_MOST_ENDS):
        left = seconds - int(time.monotonic() - began)
        if left < 1:
            break
        limits = (
            f"-max_total_time={left}", f"-max_len={LONGEST}", f"-timeout={HANG_S}",
            f"-rss_limit_mb={MOST_BYTES >> 20}", f"-artifact_prefix={found}/",
        )  # fmt: skip
        code, text = _run([name, *limits, str(kept), str(CORPUS / name)], log)
        for line in re.findall(r"^FAULT .*", text, re.MULTILINE):
            print(f"  {line}", flush=True)
        if status := _STATUS.findall(text):
            runs += int(status[-1][0])
            reached = [int(number) for number in status[-1][1:]]
        if code == 0:
            break
        print(f"  ended with exit code {code}: see {log}", flush=True)
    new, spent = sorted(set(found.iterdir()) - before), time.monotonic() - began
    edges, features, inputs = reached
    print(
        f"{name}: {runs:,} inputs in {spent:.0f} s, {runs / spent:,.0f} a second; coverage "
        f"{edges:,} edges, {features:,} features, {inputs:,} inputs kept; faults: {len(new)}",
        flush=True,
    )
    for path in new:
        print(f"  {os.path.relpath(path)}", flush=True)
    if not runs:
        print(f"  nothing was run: see {log}", flush=True)
    return len(new) + (not runs)


def _run(arguments: list[str], log: Path) -> tuple[int, str]:
    """Run one process, whose output is added to the log; its exit code and its output."""
    command = [sys.executable, "-m", "fuzzing.instrumented", *arguments]
    memory = _MEMORY if _MEMORY.is_dir() else None
    with open(log, "ab") as out, tempfile.TemporaryDirectory(dir=memory) as place:
        start, env = out.tell(), {**os.environ, "TMPDIR": place}
        done = subprocess.run(command, stdout=out, stderr=out, env=env, check=False)
    return done.returncode, log.read_bytes()[start:].decode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main())
