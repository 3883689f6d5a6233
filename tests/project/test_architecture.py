"""ARCHITECTURE.md is true: the names in it exist, and its counts are those of real calls."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from paths import PACKAGE, ROOT, TESTS

TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
POEM = "The sea, the sea, the open sea!\nThe blue, the fresh, the ever free!\n\n" * 60
MACHINE_CODE = (
    "cpu/decode/loop.py", "cpu/decode/forward.py", "cpu/decode/sample.py",
    "cpu/train/orthogonal.py",
)  # fmt: skip


def names_defined(path: Path) -> set[str]:
    """Functions and classes, with those inside a class as "Class.name"."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inside = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            found.update(f"{node.name}.{each.name}" for each in inside)
    return found


@pytest.mark.checkout
def test_every_file_and_function_exists() -> None:
    named = set(re.findall(r"`([\w/-]+\.(?:py|js|md|toml))(?::([\w.]+))?`", TEXT))
    missing = []
    for file, name in sorted(named):
        paths = [folder / file for folder in (PACKAGE, ROOT) if (folder / file).exists()]
        if not paths or (name and name not in names_defined(paths[0])):
            missing.append(f"{file}:{name}")
    assert missing == []


def test_the_diagram_has_the_layers_of_the_import_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    diagram = TEXT.partition("```\n")[2].partition("```")[0].splitlines()
    shown = [
        line.strip("| ").split("  ")[0] for line in diagram if not line.startswith(("+", "|  "))
    ]
    assert shown == layers


def journey(number: int) -> str:
    """The text of a journey's section."""
    return TEXT.partition(f"## Journey {number}: ")[2].partition("\n## ")[0]


def test_the_journeys_count_their_files() -> None:
    for number in (1, 2, 3, 4):
        files = re.findall(r"^\| `([\w/]+\.py)", journey(number), re.MULTILINE)
        assert f"These are {len(files)} files." in journey(number)
        assert len(files) == len(set(files))


def traced(*commands: str) -> list[dict[str, Any]]:
    """What `tests/journeys.py` prints of each command that it traces."""
    done = subprocess.run(
        [sys.executable, TESTS / "journeys.py", *" + ".join(commands).split()],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"files": ')]
    assert len(lines) == sum(not command.startswith("-- ") for command in commands), done.stderr
    return [json.loads(line) for line in lines]


def check_counts(number: int, found: dict[str, Any]) -> None:
    """The section's chain is the real one, and its numbers are not below the real ones."""
    text = journey(number)
    (shown,) = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    calls = [line.split()[0] for line in shown.splitlines() if "(machine code)" not in line]
    assert calls == found["chain"]
    listed = re.findall(r"^\| `([\w/]+\.py)", text, re.MULTILINE)
    in_python = [file for file in listed if file not in MACHINE_CODE]
    assert set(in_python) - {"cpu/common/build.py"} <= {
        *found["files"], "cpu/train/network.py", "decode/completion.py",
        "cli/terminal.py",
    }  # fmt: skip
    files, depth = re.findall(r"at most (\d+)\s", text)
    assert len(found["files"]) <= int(files)
    assert len(found["deepest"]) <= int(depth)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.kernels
def test_the_journeys_are_those_of_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes that are forked after torch is imported; the kernels are in the cache."""
    monkeypatch.chdir(tmp_path)
    Path("poems.txt").write_text(POEM)
    train = "train poems.txt --minutes"
    found = traced(
        f"cli/train.py:train training/optimizer.py:Optimizer.step -- {train} 0.1 -o traced",
        "training/checkpointing.py:Checkpointer.save checkpoint/durable.py:sync_folder -- "
        f"{train} 0.1 -o saved",
        f"-- {train} 0.02 -o run --quiet",
        "cli/generate.py:generate cpu/decode/decoding.py:Loop.run -- "
        "generate -c run -p The -n 8 --engine cpu",
        "cli/train.py:train training/progress.py:TrainingBatches.batch -- "
        "train --resume run --minutes 0.2",
    )
    for number, counts in zip((2, 3, 1, 4), found, strict=True):
        check_counts(number, counts)
