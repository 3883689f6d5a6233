"""The README is true: its table names every package, its snippets and commands run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import mygpt
from mygpt.cli import main
from paths import PACKAGE, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
POEM = "The sea, the sea, the open sea!\nThe blue, the fresh, the ever free!\n\n" * 30


def test_the_table_names_every_package_and_no_other() -> None:
    named = set(re.findall(r"^\| `([a-z_]+(?:\.py|/))` \|", README, re.MULTILINE))
    present = {p.name + "/" if p.is_dir() else p.name for p in PACKAGE.iterdir()}
    assert named == {name for name in present if not name.startswith("_") and name != "py.typed"}


@pytest.mark.kernels
def test_the_python_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a shorter training than the README's five minutes."""
    monkeypatch.chdir(tmp_path)
    Path("poems.txt").write_text(POEM)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    quick = "steps=3, embed_dim=16, num_layers=1, max_seq_len=16"
    for snippet in snippets:
        exec(compile(snippet.replace("minutes=5", quick), "README.md", "exec"), {})
    assert "The sea" in capsys.readouterr().out


@pytest.mark.kernels
def test_the_commands_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each `mygpt` line of the tour, with small numbers where it would take minutes."""
    monkeypatch.chdir(tmp_path)
    Path("poems.txt").write_text(POEM)
    Path("more.txt").write_text(POEM)
    tiny = "--steps 3 --embed-dim 16 --num-layers 1 --max-seq-len 16"
    blocks = [b for b in re.findall(r"```\n(.*?)```", README, re.DOTALL) if "poems.txt" in b]
    assert len(blocks) == 2
    for line in "".join(blocks).splitlines():
        command = line.split("#")[0].strip()
        if "--from" in command:
            command = command.replace("--minutes 5", "--steps 3")
        command = command.replace("--minutes 5", tiny).replace("--minutes 10", "--steps 4")
        with pytest.raises(SystemExit) as left:
            main(shlex.split(command)[1:])
        assert left.value.code == 0, capsys.readouterr().err
    assert mygpt.load("runs/poems").provenance["step"] >= 3
