"""From a path to a model of ours: which format it is, and the checkpoint it becomes."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from mygpt.checkpoint import check_finite, write_checkpoint
from mygpt.errors import InputError, StorageError
from mygpt.file_access import require_path, require_regular
from mygpt.formats.imported import Imported
from mygpt.formats.recognised import file_problem, folder_problem
from mygpt.storage import remove_abandoned
from mygpt.tokenization import Tokenizer

_FILES = (
    ".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".gguf", ".json", ".onnx", ".h5", ".msgpack",
)  # fmt: skip
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+(?:/[\w.-]+)?).*")
# What of a model on the hub is needed here, and its weights: the first of these that it has.
_HUB_FILES = ["*.json", "merges.txt", "tokenizer.model"]
_HUB_WEIGHTS = (
    ["model.safetensors", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model-*.bin"],
    ["model.*.safetensors"],  # variants
)


def import_checkpoint(
    source: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    tokenizer: str | None = None,
    num_heads: int | None = None,
    command: str = "mygpt.formats.import_checkpoint(...)",
) -> tuple[Path, list[str]]:
    """Read a model of another program and write it as a checkpoint of ours.

    Args:
        source: a Hugging Face folder, a tutorial's or nanoGPT's file, or a name on the hub.
        output: a folder, whose `last.safetensors` it becomes, or a checkpoint file.
        overwrite: also where something lies already.
        tokenizer: a tokenizer's JSON, or a run or folder that has one, where the model comes
            without one.
        num_heads: of a tutorial's bare weights, which do not say it.
        command: what the checkpoint says it came from.

    Returns:
        The file that was written, and what the user should know.

    Raises:
        InputError: for what is no model that can be held here; nothing was written then.
    """
    from mygpt.formats.tokenizers import named_tokenizer

    require_path("output", output)
    path = _target(Path(output), overwrite=overwrite)
    inside = path != Path(output)  # else the user has named the file itself, a link perhaps
    require_regular(path, inside=inside)
    if path.exists() and os.path.exists(source) and path.samefile(source):
        raise InputError(f"{source} is the file that is read: choose another --output")
    given = None if tokenizer is None else named_tokenizer(tokenizer)
    found = read_foreign(source, tokenizer=given, num_heads=num_heads)
    check_finite(found.arrays, source)
    provenance = {**_here(command), "imported": {"from": source, **found.origin}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    write_checkpoint(path, found.arrays, found.config, found.tokenizer, provenance, inside=inside)
    return path, found.notes


def read_foreign(
    source: str, *, tokenizer: Tokenizer | None = None, num_heads: int | None = None
) -> Imported:
    """The model that a path or a name on the hub means.

    Raises:
        InputError: where it is none that is known.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "ckpt.pt").is_file() and not (path / "config.json").exists():
            return _read_file(path, tokenizer, num_heads)  # nanoGPT's output folder
        return _read_folder(path, tokenizer, num_heads)
    if path.is_file():
        return _read_file(path, tokenizer, num_heads)
    if os.path.lexists(path):
        raise InputError(f"{source} is neither a folder nor a file: name a folder or a file")
    page = _HUB_PAGE.fullmatch(source)
    source = page[1] if page else source
    if _HUB_NAME.fullmatch(source) and path.suffix not in _FILES:
        return _read_folder(_from_hub(source), tokenizer, num_heads)
    raise InputError(f"{source} does not exist: name a folder, a file, or a model on the hub")


def _read_folder(path: Path, tokenizer: Tokenizer | None, num_heads: int | None) -> Imported:
    from mygpt.formats.hugging_face import read_hugging_face

    problem = folder_problem(path)
    if problem is not None:
        raise InputError(problem)
    _require_unsaid(path, num_heads)
    return read_hugging_face(path, tokenizer=tokenizer)


def _require_unsaid(path: Path, num_heads: int | None) -> None:
    if num_heads is not None:
        raise InputError(f"{path} says how many heads its model has: leave out --num-heads")


def _read_file(path: Path, tokenizer: Tokenizer | None, num_heads: int | None) -> Imported:
    from mygpt.formats.nanogpt import read_nanogpt
    from mygpt.formats.own_weights import read_own
    from mygpt.formats.torch_files import detect
    from mygpt.formats.tutorial import read_tutorial

    problem = file_problem(path)
    if problem is not None:
        raise InputError(problem)
    if path.suffix == ".safetensors":
        raise InputError(
            f"{path} holds weights alone: name its folder, which has a config.json (a checkpoint "
            "of ours needs no import)"
        )
    kind = detect(path)
    if kind == "mygpt":
        return read_own(path, num_heads=num_heads, tokenizer=tokenizer)
    if kind == "tutorial":
        return read_tutorial(path, num_heads=num_heads, tokenizer=tokenizer)
    if kind == "nanogpt":
        _require_unsaid(path, num_heads)
        return read_nanogpt(path, tokenizer=tokenizer)
    raise InputError(
        f"{path} is no checkpoint that is known: neither weights of mygpt.GPT, nor a tutorial's "
        "(model_state_dict, or weights alone), nor nanoGPT's (model, model_args); weights alone of "
        "another model do not say its shape: save it as a Hugging Face folder, with its config.json"
    )


def _from_hub(name: str) -> Path:
    """A model's folder, fetched by `huggingface_hub`, which keeps what it fetches.

    PyTorch's files are fetched only where there are no safetensors: most models have both.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{name} is no folder here; to fetch it: pip install huggingface_hub"
        ) from None
    try:
        for weights in _HUB_WEIGHTS:
            patterns = [*_HUB_FILES, *weights]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
            if any(file for pattern in weights for file in folder.glob(pattern)):
                break
    except Exception as error:  # of the library, of the network, of the hub: all end here
        problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name} is no folder here, and was not fetched: {problem:.200}") from None
    if not (folder / "config.json").is_file() and folder_problem(folder) is None:
        raise InputError(
            f"{name} on the hub has no config.json: it is no model of transformers' (perhaps of "
            "GGUF files alone): name the model that it was made from"
        )
    return folder


def _target(output: Path, *, overwrite: bool) -> Path:
    """The file to write; refused where something lies that it would hide or replace."""
    if output.suffix in (".pt", ".pth", ".ckpt", ".safetensors") and not output.is_dir():
        path, lies = output, [output]
    else:
        path = output / "last.safetensors"
        lies = [path, output / "best.safetensors", output / "last.state.safetensors"]
    existing = [file for file in lies if file.exists()]
    if existing and (not overwrite or existing != [path]):
        way = "choose another --output" + " or add --overwrite" * (existing == [path])
        raise InputError(f"{existing[-1]} exists: {way}")
    if output.exists() and not output.is_dir() and path != output:
        raise InputError(f"{output} is a file: choose another --output")
    return path


def _here(command: str) -> dict[str, Any]:
    from mygpt import __version__

    return {"mygpt": __version__, "python": platform.python_version(), "command": command}
