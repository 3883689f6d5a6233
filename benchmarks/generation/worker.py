"""One contestant in a separate process, since thread settings apply to a process.

Its argument is a JSON object. It writes a line with its first tokens after the warm-up, then one
line of measurements for each line it reads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LOOKED_UP = 10  # drafts of the prompt lookup of others, which have this default


def contestant(spec: dict[str, Any]) -> Any:
    """The function that generates as `spec` says."""
    from benchmarks.generation import models, native_peers, openvino_peer, ours, torch_peers

    prompt = models.prompts(spec["size"], spec["batch"], spec["prompt"])
    name, threads, work = spec["engine"], spec["threads"], Path(spec["work"])
    size, overflow = spec["size"], spec["overflow"]
    makers = {
        "chapter": lambda: torch_peers.chapter(size, prompt),
        "chapter tanh": lambda: torch_peers.chapter(size, prompt, gelu_tanh=True),
        "chapter draw": lambda: torch_peers.chapter_draw(size, prompt),
        "nanoGPT": lambda: torch_peers.nanogpt(size, prompt),
        "transformers": lambda: torch_peers.transformers(size, prompt),
        "transformers lookup": lambda: torch_peers.transformers(
            size, prompt, prompt_lookup_num_tokens=LOOKED_UP
        ),
        "transformers prefill": lambda: torch_peers.transformers_prefill(size, prompt),
        "CTranslate2": lambda: native_peers.ctranslate2(size, prompt, work=work, threads=threads),
        "CTranslate2 int8": lambda: native_peers.ctranslate2(
            size, prompt, work=work, threads=threads, compute="int8"
        ),
        "llama.cpp lookup": lambda: native_peers.llama_cpp_lookup(
            size, prompt, work=work, threads=threads, drafts=LOOKED_UP
        ),
        "mygpt": lambda: ours.cpu(size, prompt, threads=threads, overflow=overflow),
        "mygpt drafts": lambda: ours.cpu(size, prompt, threads=threads, drafts=True),
        "mygpt int8": lambda: ours.cpu(size, prompt, threads=threads, weights="int8"),
        "mygpt int4": lambda: ours.cpu(size, prompt, threads=threads, weights="int4"),
        "mygpt draw": lambda: ours.generate_draw(size, prompt),
    }
    if name in makers:
        return makers[name]()
    program, _, kind = name.partition(" ")
    by_kind = {
        "llama.cpp": native_peers.llama_cpp,
        "ik_llama.cpp": native_peers.ik_llama_cpp,
        "onnxruntime-genai": native_peers.onnxruntime_genai,
        "OpenVINO": openvino_peer.openvino,
    }
    options = {"kind": kind} if kind else {}
    return by_kind[program](size, prompt, work=work, threads=threads, **options)


def main() -> None:
    spec = json.loads(sys.argv[1])
    # Output of libraries goes to stderr, so that stdout has only the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if spec["engine"].split()[0] not in (
        "CTranslate2",
        "llama.cpp",
        "ik_llama.cpp",
        "onnxruntime-genai",
        "OpenVINO",
    ):
        import torch

        if spec["threads"]:
            torch.set_num_threads(spec["threads"])
    run = contestant(spec)
    ids = run(spec["checked"])
    print(json.dumps({"ids": ids}), file=answers)
    for line in sys.stdin:
        tokens_per_run = spec["tokens"] * spec["batch"] if not spec["prefill"] else spec["prompt"]
        least_s, runs = float(line), 0
        began = time.perf_counter()
        while not runs or time.perf_counter() - began < least_s:
            run(spec["tokens"])
            runs += 1
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": runs * tokens_per_run}), file=answers)


if __name__ == "__main__":
    main()
