"""Run the commands of the installed package, as a user would, and print the seconds of each.

    python tests/installed.py [NAME...]

Each is a process of its own in a temporary folder. Without a NAME all run, in the order of `STEPS`;
`demo` and `play` need no other, the rest need `train`. A step that made something prints the
beginning of its SHA-256: with the same machine and releases it is the same, also under
`PYTHONOPTIMIZE=1`. Exit code 1 if a command fails. `make test-wheel` runs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = shutil.which("mygpt", path=str(Path(sys.executable).parent)) or "mygpt"
LIMIT_S = 1200.0  # compiling the machine code is the longest part, once for each environment
TEXT = "".join(f"{n} times {n} is {n * n}, as far as anybody knows.\n" for n in range(400))
SHAPE = "--preset nano --embed-dim 32 --num-layers 2 --max-seq-len 32"
PROMPT = "12 times 12"


class Failed(Exception):
    """A command did not do what it is for."""


def run(arguments: str) -> str:
    """What `mygpt ARGUMENTS` prints on standard output."""
    done = subprocess.run(
        [COMMAND, *arguments.split()],
        capture_output=True, encoding="utf-8", timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise Failed(f"mygpt {arguments}: exit code {done.returncode}\n{done.stderr.rstrip()}")
    return done.stdout


@contextmanager
def serving(arguments: str) -> Iterator[str]:
    """The URL of `mygpt ARGUMENTS` while it serves; afterwards it is ended.

    By SIGTERM: where this runs in the background of a shell, Ctrl-C's signal is ignored.
    """
    log = Path("log.txt")
    with log.open("w") as file:
        process = subprocess.Popen([COMMAND, *arguments.split()], stderr=file)
    try:
        until = time.monotonic() + LIMIT_S
        while not (found := re.search(r" at (http://\S+) ", log.read_text(encoding="utf-8"))):
            if process.poll() is not None or time.monotonic() > until:
                raise Failed(f"mygpt {arguments}: does not serve\n{log.read_text().rstrip()}")
            time.sleep(0.05)
        yield found[1]
        process.terminate()
        if process.wait(LIMIT_S) != 128 + signal.SIGTERM or "Traceback" in log.read_text():
            raise Failed(f"mygpt {arguments}: exit code {process.returncode} after SIGTERM")
    finally:
        process.kill()
        process.wait()


def fetch(url: str, body: dict[str, object] | None = None) -> bytes:
    """The answer to a GET request, or with a body to a POST request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def demo() -> bytes:
    """Train for a minute on the built-in text; the result depends on the machine's speed."""
    if "--- temperature 0.8 ---" not in run("demo"):
        raise Failed("mygpt demo: no samples")
    return b""


def train() -> bytes:
    """Train for 40 steps; the weights."""
    Path("squares.txt").write_text(TEXT, encoding="utf-8")
    run(f"train squares.txt --steps 40 {SHAPE} --output runs/squares")
    run("export runs/squares weights.gguf --to gguf")
    return Path("weights.gguf").read_bytes()


def generate() -> bytes:
    """Generate with each engine; all texts."""
    texts = [
        run(f"generate -c runs/squares -p 12 -n 80 --seed 1 --engine {engine}")
        for engine in ("numpy", "cpu", "torch")
    ]
    return "\n".join(texts).encode()


def serve() -> bytes:
    """Answer one request of the completions API, and deliver the page; the text."""
    with serving("serve runs/squares --port 0") as url:
        if b"<!doctype html>" not in fetch(url).lower():
            raise Failed("mygpt serve: no page")
        body = {"model": "squares", "prompt": PROMPT, "max_tokens": 40, "seed": 1}
        return json.loads(fetch(f"{url}/v1/completions", body))["choices"][0]["text"].encode()


def export() -> bytes:
    """Export to a Hugging Face folder; its weights."""
    run("export runs/squares squares-hf --to hf")
    return Path("squares-hf/model.safetensors").read_bytes()


def import_() -> bytes:
    """Import the exported folder; a text of the imported model."""
    run("import squares-hf --output runs/imported")
    return run("generate -c runs/imported -p 12 -n 80 --seed 1 --engine numpy").encode()


def report() -> bytes:
    """Write the report again; it has times in it."""
    run("report runs/squares --overwrite")
    if "</html>" not in Path("runs/squares/report.html").read_text(encoding="utf-8"):
        raise Failed("mygpt report: the page is cut")
    return b""


def play() -> bytes:
    """Train the chapter's model and deliver the tour; the text that experiment 33 shows."""
    with serving("play --no-open") as url:
        body = {"model": "chapter-15", "prompt": "I", "max_tokens": 12, "top_k": 1}
        text = json.loads(fetch(f"{url}/v1/completions", body))["choices"][0]["text"]
        if text != " love AI ! I love AI ! I AI ! ! love":
            raise Failed(f"mygpt play: wrote {text!r}")
        return text.encode()


STEPS: dict[str, Callable[[], bytes]] = {
    "demo": demo, "train": train, "generate": generate, "serve": serve, "export": export,
    "import": import_, "report": report, "play": play,
}  # fmt: skip


def main() -> None:
    """Run the steps that the command line names."""
    with tempfile.TemporaryDirectory(prefix="mygpt-installed-") as folder:
        os.chdir(folder)
        failed = False
        for name in sys.argv[1:] or STEPS:
            began, found = time.monotonic(), ""
            try:
                made = STEPS[name]()
                found = hashlib.sha256(made).hexdigest()[:16] if made else "done"
            except (Failed, OSError, subprocess.TimeoutExpired) as error:
                failed, found = True, f"FAILED {error}"
            print(f"{name:9} {time.monotonic() - began:6.1f} s  {found}", flush=True)
        os.chdir("/")
    sys.exit(failed)


if __name__ == "__main__":
    main()
