"""`python -m benchmarks.tokenizing`: speed compared with the `tokenizers` library, and memory.

Speed: the same documents and `tokenizer.json`, with the library's `encode_batch` on all cores
(documents in memory, ids discarded) and with `mygpt tokenize` (including the start of the program,
reading the files and writing a store), in turns. Memory: the peak of the resident set of `mygpt
tokenize` and all its processes together, for two lengths of a text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tokenizing.texts import paragraphs, write_text

_BATCH = 1000  # documents of a call of `encode_batch`
_VOCABULARY = 8192
_PAGE_KB = os.sysconf("SC_PAGE_SIZE") // 1024

_THEIRS = """
import json, sys, time
from tokenizers import Tokenizer
library = Tokenizer.from_file(sys.argv[2])
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
began = time.perf_counter()
tokens = sum(
    len(each.ids)
    for start in range(0, len(texts), int(sys.argv[3]))
    for each in library.encode_batch(texts[start:start + int(sys.argv[3])])
)
print(json.dumps([time.perf_counter() - began, tokens]))
"""


def write_documents(path: Path, num_bytes: int) -> int:
    """Write a *.jsonl of paragraphs with about `num_bytes` bytes of text; returns their number."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for some in paragraphs():
            for text in some.split("\n\n"):
                if text:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    written += len(text.encode())
            if written >= num_bytes:
                return written
    return written


def write_tokenizers(folder: Path, text: str) -> dict[str, Path]:
    """Files of a mygpt tokenizer, and of one with GPT-2's pre-tokenization by the library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from mygpt.tokenization import BPETokenizer

    paths = {name: folder / f"{name}.json" for name in ("ours", "gpt2")}
    BPETokenizer.train([text], _VOCABULARY).save(paths["ours"])
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator([text], trainer)
    library.save(str(paths["gpt2"]))
    return paths


def tokenize(*arguments: object) -> tuple[float, float]:
    """Seconds of `mygpt tokenize`, and the peak memory of all its processes in MB."""
    command = [sys.executable, "-m", "mygpt", "tokenize", *map(str, arguments), "--quiet"]
    began = time.perf_counter()
    child = subprocess.Popen(command)
    peak_kb = 0
    while child.poll() is None:
        peak_kb = max(peak_kb, _resident_kb(child.pid))
        time.sleep(0.02)
    assert child.returncode == 0, f"{command} ended with {child.returncode}"
    return time.perf_counter() - began, peak_kb / 1024


def _resident_kb(process: int) -> int:
    """Resident memory of a process and its descendants."""
    try:
        kb = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE_KB
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [(thread / "children").read_text().split() for thread in threads]
    except (OSError, IndexError):  # the process has ended
        return 0
    return kb + sum(_resident_kb(int(child)) for some in children for child in some)


def speed(folder: Path, megabytes: int, rounds: int) -> None:
    """Print the seconds of both, and the ratio of each round."""
    documents = folder / "documents.jsonl"
    num_bytes = write_documents(documents, megabytes * 10**6)
    sample = next(paragraphs(1)) + next(paragraphs(2))
    for name, tokenizer in write_tokenizers(folder, sample).items():
        ratios = []
        for number in range(rounds):
            given = [str(documents), str(tokenizer), str(_BATCH)]
            theirs_s, tokens = json.loads(
                subprocess.run(
                    [sys.executable, "-c", _THEIRS, *given], check=True, capture_output=True
                ).stdout
            )
            out = folder / f"store-{name}"
            mine_s, _ = tokenize(documents, "--out", out, "--tokenizer", tokenizer)
            index = json.loads((out / "index.json").read_text())
            assert index["tokens"] == tokens + index["documents"], "different numbers of ids"
            shutil.rmtree(out)
            ratios.append(theirs_s / mine_s)
            print(
                f"{name} {number}: encode_batch {theirs_s:.1f} s, {num_bytes / theirs_s / 1e6:.2f} "
                f"MB/s; mygpt tokenize {mine_s:.1f} s, {num_bytes / mine_s / 1e6:.2f} MB/s; "
                f"ratio {ratios[-1]:.2f}",
                flush=True,
            )
        print(f"{name}: median ratio {statistics.median(ratios):.2f} of {rounds}", flush=True)


def memory(folder: Path, sizes: list[int], workers: int) -> None:
    """Print the peak memory for each length of a text."""
    for megabytes in sizes:
        text, out = folder / "text.txt", folder / "store"
        write_text(text, megabytes * 10**6)
        seconds, peak_mb = tokenize(text, "--out", out, "--workers", workers)
        print(
            f"{megabytes} MB of text in one document: {peak_mb:.0f} MiB resident at the peak with "
            f"{workers} processes, {seconds:.1f} s, {megabytes / seconds:.2f} MB/s including "
            "training",
            flush=True,
        )
        shutil.rmtree(out)
        text.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--speed-mb", type=int, default=50, help="megabytes of text for the speed; 0: skip"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-mb", type=int, nargs="*", default=[200, 400])
    parser.add_argument("--workers", type=int, default=2, help="processes, for the memory")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenizing-") as folder:
        if given.speed_mb:
            speed(Path(folder), given.speed_mb, given.rounds)
        memory(Path(folder), given.memory_mb, given.workers)


if __name__ == "__main__":
    main()
