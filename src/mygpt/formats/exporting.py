"""From a checkpoint of ours to what other programs read."""

from __future__ import annotations

import os
from pathlib import Path

from mygpt.checkpoint import Checkpoint, check_finite
from mygpt.core.config import require_choice
from mygpt.errors import InputError
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
        to: "hf", a folder that transformers and vLLM load, or "gguf", a file for llama.cpp.
        output: the folder or file.
        number_type: of a gguf's matrices: "f32", "f16" or "q8_0"; None is f32.
        overwrite: also where something lies already.

    Returns:
        What the user should know.

    Raises:
        InputError: for a model that the format cannot hold; nothing was written then.
    """
    require_choice("to", to, KINDS)
    require_path("output", output)
    checkpoint.check_shapes()
    check_finite(checkpoint.arrays, str(checkpoint.path))
    if os.path.exists(output) and os.path.samefile(output, checkpoint.path):
        raise InputError(f"{output} is the checkpoint itself: choose another name")
    if to == "hf":
        if number_type is not None:
            raise InputError("--type is for --to gguf: a Hugging Face folder holds float32")
        from mygpt.formats.hugging_face import write_hugging_face

        return write_hugging_face(checkpoint, Path(output), overwrite=overwrite)
    require_choice("type", number_type or "f32", GGUF_TYPES)
    from mygpt.formats.gguf import write_gguf

    return write_gguf(checkpoint, Path(output), kind=number_type or "f32", overwrite=overwrite)
