"""What a stranger can check of a model's files: digests, the absence of code, the stated origin.

A digest that the files state is recomputed, and their structure is read. What they state about
their origin cannot be checked here: whoever writes a file can state anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mygpt.checkpoint.container import read_arrays, tensor_digest
from mygpt.checkpoint.model_file import Checkpoint, check_finite
from mygpt.checkpoint.safetensors import SIZES, Header, read_header
from mygpt.errors import CheckpointError, InputError
from mygpt.file_access import open_regular
from mygpt.formats.hugging_face import EXPORT_ENTRY, read_hugging_face
from mygpt.formats.origin import FACTS, origin_of, shown
from mygpt.json_objects import SETTINGS, STATE, TOKENIZER, Limits, read_object

# "stated": by the files, and not checkable here; "absent": they do not state it.
Verdict = Literal["ok", "failed", "stated", "absent"]

_HEADER = Limits(2**26, STATE.most_values)  # of any safetensors file that mygpt reads
_DATA = (".json", ".md", ".safetensors", ".txt")  # endings of files that hold no code
_TEXTS = ("LICENSE", "NOTICE", ".gitattributes")  # files of text without an ending
_NO_CODE = "safetensors: a JSON header, and numbers that fill the file; no pickle"
_COMPARE = "compare the SHA-256 above with the one that its author gives"


@dataclass(frozen=True)
class StoredFile:
    """One file of a model."""

    path: Path
    size: int  # bytes
    sha256: str  # of all its bytes, in hexadecimal digits


@dataclass(frozen=True)
class Check:
    """One line of the result."""

    name: str
    verdict: Verdict
    text: str  # on one line


@dataclass(frozen=True)
class Verification:
    """The result for one model."""

    files: list[StoredFile]
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.verdict != "failed" for check in self.checks)


def is_exported(path: Path) -> bool:
    """Whether a path is a folder with a `config.json`, as `mygpt export --to hf` writes it."""
    return (path / "config.json").is_file()


def verify(path: Path) -> Verification:
    """Check a safetensors file, of mygpt or of another program, or a Hugging Face folder.

    Raises:
        CheckpointError: if it cannot be read, or is not a regular file.
        OutOfMemoryError: if its weights need more memory than is free.
    """
    if is_exported(path):
        files = [_stored(each) for each in sorted(path.iterdir()) if each.is_file()]
        return Verification(files, list(_check_folder(path, files)))
    return Verification([_stored(path)], list(_check_file(path)))


def _stored(path: Path) -> StoredFile:
    try:
        with open_regular(path, inside=False) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return StoredFile(path, file.tell(), digest)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _header(path: Path) -> Header:
    """The header of a safetensors file; `ValueError` if it is not one, or has unknown types."""
    with open_regular(path, inside=False) as file:
        header = read_header(file, _HEADER)
    for name, entry in header.entries.items():
        if entry.dtype not in SIZES:
            raise ValueError(f"tensor {name[:80]!r} has the unknown type {entry.dtype!r:.20}")
    return header


# --- one file --------------------------------------------------------------------------------


def _check_file(path: Path) -> Iterator[Check]:
    try:
        header = _header(path)
    except (ValueError, OSError) as error:
        text = f"it is not a safetensors file, so it may hold code: {error}"
        yield Check("no code", "failed", shown(text))
        return
    yield Check("no code", "ok", _NO_CODE)
    if header.metadata.get("format") != "mygpt":
        yield Check("digest", "absent", f"the file states none: {_COMPARE}")
        yield from _stated({})
        return
    try:
        arrays, parts = read_arrays(path)
    except CheckpointError as error:
        yield Check("digest", "failed", shown(error))
        return
    yield Check("digest", "ok", "the file states the SHA-256 of its bytes, and they have it")
    stated = parts.get("tensors", {})
    wrong = [name for name, array in arrays.items() if tensor_digest(array) != stated.get(name)]
    if wrong:
        text = f"{len(wrong)} of {len(arrays)} do not match, the first is {wrong[0]:.80}"
        yield Check("tensors", "failed", shown(text))
    else:
        yield Check("tensors", "ok", f"all {len(arrays)} match the SHA-256 that the file states")
    yield _check_model(path, arrays, parts)
    yield from _stated(origin_of(parts.get("provenance", {})))


def _check_model(path: Path, arrays: Any, parts: dict[str, Any]) -> Check:
    try:
        checkpoint = Checkpoint.from_parts(path, arrays, parts)
        checkpoint.check()
    except InputError as error:
        return Check("model", "failed", shown(error))
    return _usable(checkpoint.config.num_parameters(), checkpoint.tokenizer.vocab_size)


def _usable(parameters: int, tokens: int) -> Check:
    text = f"{parameters:,} parameters, all finite, of the shapes that its configuration gives; "
    return Check("model", "ok", f"{text}a tokenizer of {tokens:,} tokens")


def _stated(origin: dict[str, Any]) -> Iterator[Check]:
    """What the files state about the origin."""
    for name in FACTS:
        if name in origin:
            yield Check(name, "stated", shown(origin[name]))
        elif name != "imported":
            yield Check(name, "absent", "the file does not state it")


# --- a folder --------------------------------------------------------------------------------


def _check_folder(folder: Path, files: list[StoredFile]) -> Iterator[Check]:
    problems = list(_code_in(folder))
    if problems:
        yield Check("no code", "failed", shown("; ".join(problems)))
    else:
        yield Check("no code", "ok", "only JSON, texts and safetensors; no pickle, no program")
    try:
        values = read_object(folder / "config.json", SETTINGS)
    except InputError as error:
        yield Check("model", "failed", shown(error))
        return
    ours = values.get(EXPORT_ENTRY)
    ours = ours if isinstance(ours, dict) else {}
    yield _check_digests(ours.get("sha256"), files)
    try:
        found = read_hugging_face(folder)
        check_finite(found.arrays, str(folder))
        yield _usable(found.config.num_parameters(), found.tokenizer.vocab_size)
    except InputError as error:
        yield Check("model", "failed", shown(error))
    origin = ours.get("origin")
    yield from _stated(origin if isinstance(origin, dict) else {})


def _code_in(folder: Path) -> Iterator[str]:
    """What is in a folder besides data, one phrase each."""
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            yield f"{path.name} is not a file"
        elif path.name not in _TEXTS and path.suffix not in _DATA:
            yield f"{path.name} may be code or a pickle"
        elif path.suffix == ".safetensors":
            try:
                _header(path)
            except (ValueError, OSError) as error:
                yield f"{path.name} is not a safetensors file: {error}"
        elif path.suffix == ".json":
            try:
                if "auto_map" in read_object(path, TOKENIZER):
                    yield f"{path.name} names code that some programs would load (auto_map)"
            except InputError as error:
                yield str(error)


def _check_digests(stated: Any, files: list[StoredFile]) -> Check:
    """Compare the digests that the export stored in config.json."""
    if not isinstance(stated, dict) or not stated:
        return Check("digests", "absent", f"config.json states none: {_COMPARE}")
    found = {file.path.name: file.sha256 for file in files}
    wrong = sorted(name for name, digest in stated.items() if found.get(name) != digest)
    if wrong:
        text = f"not as exported, by the SHA-256 in config.json: {', '.join(wrong[:5])}"
        return Check("digests", "failed", shown(text))
    return Check("digests", "ok", f"{len(stated)} files have the SHA-256 that config.json states")
