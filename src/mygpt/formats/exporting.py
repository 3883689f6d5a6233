"""Export: from a mygpt checkpoint to the files that other programs read."""

from __future__ import annotations

import os
from pathlib import Path

from mygpt.checkpoint.model_file import Checkpoint, check_finite
from mygpt.errors import InputError, require_choice
from mygpt.file_access import require_path

KINDS = ("hf", "gguf")
GGUF_TYPES = ("f32", "f16", "q8_0")


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
        from mygpt.formats.hugging_face import write_hugging_face

        return write_hugging_face(checkpoint, Path(output), overwrite=overwrite)
    require_choice("type", number_type or "f32", GGUF_TYPES)
    from mygpt.formats.gguf import write_gguf

    return write_gguf(checkpoint, Path(output), kind=number_type or "f32", overwrite=overwrite)
