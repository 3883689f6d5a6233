"""Import and export: which format a model has, and which one is written.

A new format is a new module, and an entry of `_read`, or of `export_checkpoint` and `KINDS`.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import mygpt
from mygpt.checkpoint.durable import remove_abandoned
from mygpt.checkpoint.model_file import Checkpoint, check_finite, write_checkpoint
from mygpt.errors import InputError, require_choice
from mygpt.file_access import require_path, require_regular
from mygpt.formats.tensors import Imported
from mygpt.formats.unsupported import file_problem, folder_problem
from mygpt.tokenization import Tokenizer

KINDS = ("hf", "gguf")
_FILES = (
    ".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".gguf", ".json", ".onnx", ".h5", ".msgpack",
)  # fmt: skip
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+(?:/[\w.-]+)?).*")
# The files to download from the hub, and the weights: the first of these patterns that exists.
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
    """Read a model of another program and write it as a mygpt checkpoint.

    Args:
        source: a Hugging Face folder, a file of the tutorial or of nanoGPT, or a model's name on
            the Hugging Face hub.
        output: a checkpoint file, or a folder, in which `last.safetensors` is written.
        overwrite: whether an earlier import may be replaced.
        tokenizer: a tokenizer's JSON file, or a run or folder that has one, for a model that
            comes without a tokenizer.
        num_heads: the number of heads, for a state dict without a configuration.
        command: the command to record in the checkpoint's provenance.

    Returns:
        The file that was written, and notes for the user, one line each.

    Raises:
        InputError: if the model cannot be imported; nothing is written then.
        StorageError: if there is no space, or the folder cannot be written to.
    """
    from mygpt.formats.tokenizers import named_tokenizer

    require_path("output", output)
    path = _target(Path(output), overwrite=overwrite)
    inside = path != Path(output)  # a file that the user names may be a link
    require_regular(path, inside=inside)
    if path.exists() and os.path.exists(source) and path.samefile(source):
        raise InputError(f"--output is {source}, the file to read: choose another --output")
    given = None if tokenizer is None else named_tokenizer(tokenizer)
    found = read_foreign(source, tokenizer=given, num_heads=num_heads)
    check_finite(found.arrays, source)
    provenance = {
        "mygpt": mygpt.__version__,
        "python": platform.python_version(),
        "command": command,
        "imported": {"from": source, **found.origin},
    }
    remove_abandoned(path)
    write_checkpoint(path, found.arrays, found.config, found.tokenizer, provenance, inside=inside)
    return path, found.notes


def read_foreign(
    source: str, *, tokenizer: Tokenizer | None = None, num_heads: int | None = None
) -> Imported:
    """Read a model of another program; arguments as `import_checkpoint`.

    Raises:
        InputError: if it does not exist, or is of no known format.
        OutOfMemoryError: if its weights need more memory than is free.
    """
    path = Path(source)
    if (path / "ckpt.pt").is_file() and not (path / "config.json").exists():
        path = path / "ckpt.pt"  # in nanoGPT's output folder
    if path.is_file() or path.is_dir():
        return _read(path, tokenizer, num_heads)
    if os.path.lexists(path):
        raise InputError(f"{source} is neither a folder nor a file: give a folder or a file")
    page = _HUB_PAGE.fullmatch(source)
    source = page[1] if page else source
    if _HUB_NAME.fullmatch(source) and path.suffix not in _FILES:
        return _read(_from_hub(source), tokenizer, num_heads)
    raise InputError(
        f"{source} does not exist: give a folder, a file, or a model on the Hugging Face hub "
        "(owner/name)"
    )


def _read(path: Path, tokenizer: Tokenizer | None, num_heads: int | None) -> Imported:
    from mygpt.formats.hugging_face import read_hugging_face
    from mygpt.formats.state_dicts import read_state_dict

    problem = folder_problem(path) if path.is_dir() else file_problem(path)
    if problem is not None:
        raise InputError(problem)
    if not path.is_dir():
        return read_state_dict(path, num_heads=num_heads, tokenizer=tokenizer)
    if num_heads is not None:
        raise InputError(f"{path} states its number of heads: remove --num-heads {num_heads}")
    return read_hugging_face(path, tokenizer=tokenizer)


def _from_hub(name: str) -> Path:
    """The folder of a model on the hub, downloaded into the cache of `huggingface_hub`.

    PyTorch's files are downloaded only if there are no safetensors files: most models have both.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"there is no folder {name}; to download it from the Hugging Face hub: pip install "
            "huggingface_hub"
        ) from None
    try:
        for weights in _HUB_WEIGHTS:
            patterns = [*_HUB_FILES, *weights]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
            if any(file for pattern in weights for file in folder.glob(pattern)):
                break
    except Exception as error:  # the library raises many kinds, of its own and of the network
        problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"there is no folder {name}, and it cannot be downloaded from the Hugging Face hub: "
            f"{problem:.200}"
        ) from None
    if not (folder / "config.json").is_file() and folder_problem(folder) is None:
        raise InputError(
            f"{name} on the hub has no config.json, so it is not a model for transformers (it may "
            "have GGUF files only): give the model that it was made from"
        )
    return folder


def _target(output: Path, *, overwrite: bool) -> Path:
    """The file to write; `InputError` if that would replace or hide an existing model."""
    if output.suffix in (".pt", ".pth", ".ckpt", ".safetensors") and not output.is_dir():
        path, conflicts = output, [output]
    else:
        path = output / "last.safetensors"
        conflicts = [path, output / "best.safetensors", output / "last.state.safetensors"]
    existing = [file for file in conflicts if file.exists()]
    if existing and (not overwrite or existing != [path]):
        remedy = "choose another --output" + " or add --overwrite" * (existing == [path])
        raise InputError(f"{existing[-1]} exists: {remedy}")
    if output.exists() and not output.is_dir() and path != output:
        raise InputError(f"{output} is a file: choose another --output")
    return path


def export_checkpoint(
    checkpoint: Checkpoint,
    to: str,
    output: str | Path,
    *,
    number_type: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a model for other programs.

    Args:
        checkpoint: the model.
        to: "hf" writes a folder that transformers and vLLM load, "gguf" a file for llama.cpp.
        output: the folder or file to write.
        number_type: of the matrices in a GGUF file: "f32", "f16" or "q8_0"; None is "f32".
        overwrite: whether an earlier export may be replaced.

    Returns:
        Notes for the user, one line each.

    Raises:
        InputError: if the format cannot represent the model; nothing is written then.
        StorageError: if there is no space, or the folder cannot be written to.
    """
    from mygpt.formats.gguf import write_gguf
    from mygpt.formats.hugging_face import write_hugging_face

    require_choice("to", to, KINDS)
    require_path("output", output)
    checkpoint.check_shapes()
    check_finite(checkpoint.arrays, str(checkpoint.path))
    if os.path.exists(output) and os.path.samefile(output, checkpoint.path):
        raise InputError(f"{output} is the checkpoint itself: choose another --output")
    if to == "hf":
        if number_type is not None:
            raise InputError(
                f"--type {number_type} is for --to gguf only: a Hugging Face folder is written in "
                "float32; leave --type out"
            )
        return write_hugging_face(checkpoint, Path(output), overwrite=overwrite)
    return write_gguf(checkpoint, Path(output), kind=number_type or "f32", overwrite=overwrite)
