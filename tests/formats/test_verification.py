"""`mygpt info --verify`: what a stranger can check of files and folders; damage is reported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from hugging_face_samples import PROVENANCE, edit
from mutations import forged
from mygpt import CharTokenizer, save_checkpoint
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.formats import export_checkpoint
from mygpt.formats.verification import Verification, verify
from shapes import LLAMA, TUTORIAL, build
from shell import Shell

CHARS = CharTokenizer("abcde")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint with a complete provenance."""
    path = tmp_path / "model.safetensors"
    provenance = {**PROVENANCE, "mygpt": "0.1.0", "training": {"seed": 7}}
    del provenance["imported"]
    save_checkpoint(path, build(TUTORIAL), CHARS, provenance)
    return path


@pytest.fixture
def exported(file: Path) -> Path:
    """The same as a Hugging Face folder."""
    folder = file.parent / "exported"
    export_checkpoint(read_checkpoint(file), "hf", folder)
    return folder


def verdicts(result: Verification) -> dict[str, str]:
    return {check.name: check.verdict for check in result.checks}


def text_of(result: Verification, name: str) -> str:
    (found,) = (check.text for check in result.checks if check.name == name)
    assert found.isprintable()
    return found


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


STATED = {"text": "stated", "version": "stated", "seed": "stated"}


def test_everything_of_a_checkpoint_is_checked(file: Path) -> None:
    result = verify(file)
    assert result.passed
    (stored,) = result.files
    assert stored.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert stored.size == file.stat().st_size
    ok = dict.fromkeys(("no code", "digest", "tensors", "model"), "ok")
    assert verdicts(result) == ok | STATED
    assert text_of(result, "text") == f"poems.txt, 98,765 bytes, sha256 {'ab' * 32}"
    assert text_of(result, "seed") == "7"
    assert text_of(result, "version") == "mygpt 0.1.0"


@pytest.mark.parametrize("place", [3, 20, -1])
def test_any_flipped_bit_of_a_checkpoint_fails(file: Path, place: int) -> None:
    """In the header's length, in the header, in the weights."""
    flip(file, place)
    result = verify(file)
    assert not result.passed
    assert "failed" in verdicts(result).values()
    assert "model" not in verdicts(result)


def test_a_forged_digest_of_a_tensor_fails(file: Path) -> None:
    """The file's own digest is correct, but not that which the header states for a tensor."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    digests = json.loads(header["__metadata__"]["tensors"])
    name = next(iter(digests))
    header["__metadata__"]["tensors"] = json.dumps({**digests, name: "0" * 64})
    file.write_bytes(forged(json.dumps(header, separators=(",", ":")).encode(), data[end:]))
    result = verify(file)
    assert verdicts(result)["digest"] == "ok"
    assert verdicts(result)["tensors"] == "failed"
    assert name in text_of(result, "tensors")


def test_weights_that_cannot_be_used_fail(file: Path) -> None:
    model = build(TUTORIAL)
    model.final_norm.weight.data[0] = np.nan
    save_checkpoint(file, model, CHARS)
    result = verify(file)
    assert verdicts(result)["model"] == "failed"
    assert "infinite or NaN" in text_of(result, "model")
    assert [verdicts(result)[name] for name in STATED] == ["absent"] * 3


def test_a_pickle_fails(tmp_path: Path) -> None:
    import torch

    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pt")
    assert verdicts(verify(tmp_path / "x.pt")) == {"no code": "failed"}


def test_an_exported_folder_is_checked(exported: Path) -> None:
    result = verify(exported)
    assert result.passed
    assert {stored.path.name for stored in result.files} == {p.name for p in exported.iterdir()}
    assert verdicts(result) == dict.fromkeys(("no code", "digests", "model"), "ok") | STATED
    assert text_of(result, "seed") == "7"
    (weights,) = verify(exported / "model.safetensors").files
    assert weights in result.files


def test_a_changed_file_of_a_folder_fails(exported: Path) -> None:
    flip(exported / "model.safetensors", -1)
    (exported / "README.md").unlink()
    result = verify(exported)
    assert verdicts(result)["digests"] == "failed"
    assert "README.md, model.safetensors" in text_of(result, "digests")


@pytest.mark.parametrize(
    "name", ["model.py", "pytorch_model.bin", "x.pkl", "data", "weights.npy", "a.safetensors"]
)
def test_a_file_that_may_hold_code_fails(exported: Path, name: str) -> None:
    exported.joinpath(name).write_bytes(b"\x80\x04N.")
    result = verify(exported)
    assert verdicts(result)["no code"] == "failed"
    assert name in text_of(result, "no code")


def test_a_configuration_that_names_code_fails(exported: Path) -> None:
    edit(exported / "config.json", auto_map={"AutoModel": "model.Model"})
    result = verify(exported)
    assert "auto_map" in text_of(result, "no code")


def test_a_folder_of_another_program_states_nothing(exported: Path) -> None:
    edit(exported / "config.json", mygpt=...)
    result = verify(exported)
    assert result.passed
    assert verdicts(result)["digests"] == "absent"
    assert [verdicts(result)[name] for name in STATED] == ["absent"] * 3


@pytest.mark.parametrize(
    "entry", [[], {"sha256": []}, {"sha256": {"a": 1}, "origin": 3}, {"origin": {"text": "a\nb"}}]
)
def test_odd_entries_are_no_traceback(exported: Path, entry: object) -> None:
    edit(exported / "config.json", mygpt=entry)
    for check in verify(exported).checks:
        assert check.text.isprintable()


def test_stated_facts_cannot_forge_a_line(file: Path) -> None:
    """The provenance may have any text, also a line end and a check that passed."""
    provenance = {"mygpt": "1\ndigest: ok", "training": {"seed": "\x1b[2J"}, "corpus": [1]}
    save_checkpoint(file, build(TUTORIAL), CHARS, provenance)
    result = verify(file)
    assert text_of(result, "version") == "mygpt 1?digest: ok"
    assert text_of(result, "seed") == "?[2J"
    assert verdicts(result)["text"] == "absent"


def test_exporting_a_hostile_provenance_gives_a_folder_that_can_be_read(tmp_path: Path) -> None:
    corpus = {"name": "x" * 10**5, "bytes": 1, "sha256": list(range(10**5))}
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, build(LLAMA), CharTokenizer("abcdef"), {"corpus": corpus})
    export_checkpoint(read_checkpoint(path), "hf", tmp_path / "out")
    assert verify(tmp_path / "out").passed


# --- the command -----------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_check(
    capsys: pytest.CaptureFixture[str], file: Path, exported: Path
) -> None:
    shell = Shell(capsys, "info")
    out = shell.printed(file, "--verify")
    assert out.count(f"  {file} (") == 1
    assert "\ndigest:      ok      the file states" in out
    assert "\nseed:        stated  7\n" in out
    assert "\nno check failed" in out
    printed = json.loads(shell.printed(exported, "--verify", "--json"))
    assert printed["passed"]
    assert printed["files"][0]["path"] == str(exported / "README.md")
    assert {"name": "seed", "verdict": "stated", "text": "7"} in printed["checks"]


def test_a_failed_check_is_exit_code_2(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    flip(file, -1)
    code, out, err = Shell(capsys, "info")(file, "--verify")
    assert (code, err) == (2, "")
    assert "digest:      failed" in out
    assert out.endswith("do not use this model; copy it again\n")
    code, out, _ = Shell(capsys, "info")(file, "--verify", "--json")
    assert code == 2
    assert not json.loads(out)["passed"]


def test_a_path_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in Shell(capsys, "info").refused("nowhere", "--verify")
