"""`mygpt serve` and llama.cpp's server with the same exported model, measured in turns.

Usage: python -m benchmarks.serving LLAMA_SERVER [--rounds 3] [--seconds 8] [--out docs/benchmarks]
in the folder above `benchmarks`, on a machine that does nothing else. LLAMA_SERVER is the program
`llama-server`, built from the sources in llama-cpp-python. 1, 8 and 32 clients stream greedy
completions of characters, each one request after the other; all clients are in one thread.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.generation.models import CONFIGS
from benchmarks.generation.rounds import QUIET_WAIT_S, ROOT, await_quiet, environment
from benchmarks.serving.clients import Load, body, load
from benchmarks.training.report import describe_machine

from mygpt import GPT, CharTokenizer, save_checkpoint
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.formats import export_checkpoint

CLIENTS = (1, 8, 32)
SIZES = {"S": 40, "M": 200}  # new tokens per request; with the prompt they fit the window
PROMPT = 16
CHARACTERS = "".join(chr(33 + n) for n in range(65))


def make_model(size: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint and a GGUF file with the same random float32 weights, which never end a text."""
    config = replace(CONFIGS[size], vocab_size=66, mlp="gelu_tanh", attention_bias=True)
    torch.manual_seed(0)
    model = GPT.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embedding" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    checkpoint, gguf = folder / f"{size}.safetensors", folder / f"{size}.gguf"
    save_checkpoint(checkpoint, model, CharTokenizer(CHARACTERS, end_of_text=True))
    export_checkpoint(read_checkpoint(checkpoint), "gguf", gguf, number_type="f32")
    return checkpoint, gguf


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """Start a server process, and wait until its /health responds."""
    process = subprocess.Popen(
        command, env=environment(None), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def commands(size: str, checkpoint: Path, gguf: Path, llama: Path, port: int) -> dict[str, Any]:
    window = CONFIGS[size].max_seq_len
    ours = [sys.executable, "-m", "mygpt", "serve", str(checkpoint), "--quiet"]
    theirs = [str(llama), "-m", str(gguf), "-c", str(32 * window), "-np", "32", "-t", "2"]
    return {
        "mygpt": [*ours, "--port", str(port)],
        "llama.cpp": [*theirs, "--port", str(port), "--host", "127.0.0.1"],
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Results of all servers and numbers of clients, measured in turns, as plain values."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, tokens in SIZES.items():
            files = make_model(size, Path(folder))
            texts = [(CHARACTERS * 2)[n : n + PROMPT] for n in range(len(CHARACTERS))]
            requests = [body(size, text, tokens) for text in texts]
            for _ in range(options.rounds):
                for name in ("mygpt", "llama.cpp"):
                    port = free_port()
                    command = commands(size, *files, options.llama_server, port)[name]
                    with running(command, port):
                        load(port, requests, 2, 1.0)  # warm
                        for clients in CLIENTS:
                            await_quiet(QUIET_WAIT_S)
                            result = load(port, requests, clients, options.seconds)
                            row = f"{size}, {clients} clients"
                            found.setdefault(row, {}).setdefault(name, []).append(values_of(result))
                            print(row, name, values_of(result), flush=True)
    return {"machine": describe_machine(), "seconds": options.seconds, "runs": found}


def values_of(result: Load) -> dict[str, float]:
    return {"rate": result.rate, "p99_ms": result.p99_ms, "answers": result.answers}


def page(results: dict[str, Any]) -> str:
    """The results as a table."""
    machine = results["machine"]
    lines = [
        "# Serving, side by side",
        "",
        "`python -m benchmarks.serving`: `mygpt serve` and llama.cpp's `llama-server` (from the "
        "sources in llama-cpp-python 0.3.36) on the same model, float32, 32 slots each, each with "
        "its own defaults otherwise. S is the tutorial's model with tanh GELU, M 10.65 million "
        "parameters; tokens are characters. Clients stream greedy completions (S 40, M 200 tokens "
        "after a prompt of 16), each one after the other; they use the same cores as the server. "
        f"Medians of the rounds, {results['seconds']:g} seconds each. The gap is the time between "
        "two pieces of a stream, which may hold several tokens.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores.",
        "",
        "| model, clients | server | tokens/s (least to most) | ratio | gaps, 99th percentile |",
        "|---|---|---:|---:|---:|",
    ]
    for row, servers in results["runs"].items():
        rates = {name: [run["rate"] for run in runs] for name, runs in servers.items()}
        ratios = [a / b for a, b in zip(rates["mygpt"], rates["llama.cpp"], strict=True)]
        for name, runs in servers.items():
            own = rates[name]
            ratio = f"{statistics.median(ratios):.2f}" if name == "mygpt" else "1"
            gap = statistics.median(run["p99_ms"] for run in runs)
            lines.append(
                f"| {row} | {name} | {statistics.median(own):,.0f} ({min(own):,.0f} to "
                f"{max(own):,.0f}) | {ratio} | {gap:.1f} ms |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("llama_server", type=Path, help="the program llama-server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    results = measure(options)
    (options.out / "serving.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "serving.md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
