"""`mygpt tokenize` is killed: the same command resumes it, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mygpt.tokenization import BPETokenizer
from torture import Tally

_KILL_WITHIN_S = 3.0


def _write_texts(folder: Path) -> list[Path]:
    """A long document, many short ones, and a tokenizer trained on the long one."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeéf日", k=rng.randint(1, 9))) for _ in range(5000)]
    plain, lines = folder / "long.txt", folder / "short.jsonl"
    plain.write_text(" ".join(rng.choices(words, k=200_000)), encoding="utf-8")
    with open(lines, "w", encoding="utf-8") as file:
        for number in range(4000):
            text = " ".join([f"{number}:", *rng.choices(words, k=rng.randint(0, 60))])
            file.write(json.dumps({"text": text}) + "\n")
    BPETokenizer.train([plain.read_text("utf-8")[:200_000]], 1000).save(folder / "bpe.json")
    return [plain, lines]


def _command(folder: Path, store: Path) -> list[str]:
    files = [str(folder / name) for name in ("long.txt", "short.jsonl")]
    options = ["--tokenizer", str(folder / "bpe.json"), "--shard-tokens", "20000", "--workers", "2"]
    return [sys.executable, "-m", "mygpt", "tokenize", *files, "--out", str(store), *options]


def digests(store: Path) -> dict[str, str]:
    """The digest of every file of a store, except the lock."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def kill_tokenizing(count: int, folder: Path) -> Tally:
    """SIGKILL at random moments of `mygpt tokenize`, one store each; then the same command."""
    tally = Tally("killed while tokenizing, resumed, same bytes in every file")
    _write_texts(folder)
    environment = {**os.environ, "MYGPT_TOKEN_CACHE": "off"}
    began = time.monotonic()
    subprocess.run(_command(folder, folder / "undisturbed"), check=True, capture_output=True)
    undisturbed_s = time.monotonic() - began
    reference = digests(folder / "undisturbed")
    rng, part_way = random.Random(0), 0
    for trial in range(count):
        store = folder / f"store-{trial}"
        child = subprocess.Popen(
            _command(folder, store),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        if trial % 2:  # any moment
            time.sleep(rng.random() * min(undisturbed_s, _KILL_WITHIN_S))
        else:  # while shards are written
            _wait_for_shards(child, store, rng.randrange(1, len(reference) // 2 - 1))
            time.sleep(rng.random() * 0.02)
        child.kill()
        child.wait()
        part_way += (store / "shards").exists() and digests(store) != reference
        done = subprocess.run(_command(folder, store), capture_output=True, text=True, check=False)
        same = done.returncode == 0 and digests(store) == reference
        tally.count(same, f"trial {trial}: ended with {done.returncode} {done.stderr[-200:]}")
        shutil.rmtree(store, ignore_errors=True)
    tally.note = f"{part_way} of them with some of the shards written"
    return tally


def _wait_for_shards(child: subprocess.Popen[bytes], store: Path, number: int) -> None:
    path = store / "shards" / f"{number - 1:06d}.tokens"
    while child.poll() is None and not path.exists():
        time.sleep(0.001)
