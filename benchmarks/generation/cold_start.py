"""Time of a process from start to end: `mygpt generate`, and a program with the chapter's loop.

Run as a module, it is the second one: a minimal program that loads model S and writes N characters.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LENGTHS = (50, 2000)


def prepare(work: Path) -> None:
    """Write model S as a mygpt checkpoint and with torch.save."""
    import torch
    from benchmarks.generation.models import build

    from mygpt import CharTokenizer, save_checkpoint

    model = build("S")
    save_checkpoint(work / "s.safetensors", model, CharTokenizer(CHARACTERS))
    torch.save(model.state_dict(), work / "s.pt")


def commands(work: Path, length: int) -> dict[str, list[str]]:
    """The two programs, by name."""
    mine = ["mygpt", "generate", "-c", str(work / "s.safetensors"), "-p", "A", "--seed", "0"]
    mine += ["--temperature", "1"]
    return {
        "mygpt": [sys.executable, "-m", *mine, "-n", str(length)],
        "chapter": [sys.executable, "-m", __name__, str(work / "s.pt"), str(length)],
    }


# The peak memory of a process includes that of the process it was forked from. So it is started by
# a small one, not by the benchmark, which has imported torch.
_LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - began
print(json.dumps([code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def run(command: list[str], env: dict[str, str], folder: Path) -> tuple[float, float]:
    """Wall time in seconds and peak memory in MB of one process."""
    launch = [sys.executable, "-S", "-c", _LAUNCHER, *command]
    output = subprocess.run(launch, env=env, cwd=folder, check=True, capture_output=True).stdout
    code, seconds, peak_kb = json.loads(output)
    assert code == 0, f"{command} ended with {code}"
    return seconds, peak_kb / 1024


def chapter_program(path: str, length: int) -> None:
    """Load the weights and generate with the chapter's loop."""
    import torch
    from benchmarks.generation.torch_peers import chapter_generate

    from mygpt import GPT

    model = GPT(65, 64, 4, 4, 64)
    model.load_state_dict(torch.load(path))
    torch.manual_seed(0)
    ids = chapter_generate(model, torch.tensor([[13]]), length)
    print("".join(CHARACTERS[i] for i in ids[0].tolist()))


if __name__ == "__main__":
    chapter_program(sys.argv[1], int(sys.argv[2]))
