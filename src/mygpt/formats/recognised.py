"""What is no model that can be read, but is known: the line that says what it is and what helps.

Folders one level too high, caches, adapters, models of vectors, weights of other programs.
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from mygpt.data import is_store
from mygpt.json_objects import SETTINGS, read_object

_FILES = {
    ".gguf": "is GGUF, llama.cpp's format, which mygpt writes and does not read: import the "
    "model's original folder (config.json, safetensors)",
    ".onnx": "is ONNX, which is not read: import the model's original folder (config.json, "
    "safetensors)",
    ".h5": "is Keras's or TensorFlow's, which is not read: load its folder with transformers 4 "
    "(from_tf=True), save_pretrained it, and import that folder",
    ".msgpack": "is Flax's, which is not read: load its folder with transformers 4 "
    "(from_flax=True), save_pretrained it, and import that folder",
    ".tflite": "is TensorFlow Lite's, which is not read: import the model's original folder",
    ".npz": "holds NumPy's arrays, which do not say what model they are: save the model with "
    "torch.save, or as a Hugging Face folder",
}
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_OURS = ("best.safetensors", "last.safetensors", "last.state.safetensors")
_OWN_MARK = b'"format":"mygpt"'  # in the header of a checkpoint of ours
_QUANTIZED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_MOST_ENTRIES = 64  # of a folder that are named or searched


def file_problem(path: Path) -> str | None:
    """What a file of another program is, and what helps; None where it is not known."""
    name = path.name.lower()
    if path.suffix.lower() in _FILES:
        return f"{path} {_FILES[path.suffix.lower()]}"
    if path.suffix.lower() in _ARCHIVES:
        return f"{path} is an archive: unpack it, and name the folder or file that is in it"
    if name.startswith("adapter_model"):
        return _adapter(path.parent)
    if name in _OURS or (path.suffix == ".safetensors" and _is_ours(path)):
        return _no_import(path)
    if path.suffix == ".json" and (path.parent / "config.json").is_file():
        return f"{path} is one file of a Hugging Face folder: name the folder, {path.parent}"
    if name in ("pytorch_model.bin", "model.safetensors") or name.startswith("pytorch_model-"):
        return f"{path} holds weights alone: name its folder, which has a config.json"
    return None


def folder_problem(path: Path) -> str | None:
    """Why a folder is no model that can be read, and what helps; None where nothing is known."""
    if any((path / name).is_file() for name in _OURS):
        return _no_import(path)
    if is_store(path):
        return f"{path} is a token store, no model: mygpt train {shlex.quote(str(path))} makes one"
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return _adapter(path)
    if (path / "modules.json").is_file() or (path / "config_sentence_transformers.json").is_file():
        return (
            f"{path} is a model of sentence-transformers, which turns text into vectors and "
            "predicts no tokens: there is nothing to write with"
        )
    for name in (
        "quantize_config.json",
        "quant_config.json",
        "hf_quant_config.json",
    ):  # GPTQ's and AWQ's own
        if (path / name).is_file():
            return (
                f"{path} holds quantized weights ({name}): only weights in float32, float64, "
                "float16 or bfloat16 can be read: get the model that it was quantized from"
            )
    if (path / "config.json").exists():
        return None
    if (path / "snapshots").is_dir():
        return _cache(path)
    inside = _models_inside(path)
    if inside:
        names = ", ".join(str(folder) for folder in inside[:5])
        return f"{path} is no model: name the folder that has a config.json in it ({names})"
    adapters = sorted(file.parent for file in path.glob("*/adapter_config.json"))
    if adapters:
        return _adapter(max(adapters, key=_step))
    cached = sorted(path.glob("models--*"))[:5] + sorted(path.glob("hub/models--*"))[:5]
    if cached:
        names = ", ".join(str(folder) for folder in cached[:5])
        return f"{path} is a cache of Hugging Face's: name a model in it ({names})"
    for pattern in ("*.gguf", "*.onnx", "*.h5", "*.msgpack"):
        found = sorted(path.glob(pattern))
        if found:
            return file_problem(found[0])
    found = sorted(file for end in ("pt", "pth", "ckpt") for file in path.glob(f"*.{end}"))
    if found:
        names = ", ".join(str(file) for file in found[:5])
        return f"{path} has no config.json: name the checkpoint in it ({names})"
    if (path / "params.json").is_file():
        return (
            f"{path} is in Meta's or Mistral's own layout (params.json): convert it with "
            "transformers' conversion script, and import the folder that it writes"
        )
    return None


def _no_import(path: Path) -> str:
    return (
        f"{path} is of mygpt itself, and needs no import: generate -c, info, eval, export and "
        "train --from take it as it is"
    )


def _is_ours(path: Path) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return _OWN_MARK in file.read(2**16)
    return False


def _adapter(path: Path) -> str:
    base = None
    if (path / "adapter_config.json").is_file():
        base = read_object(path / "adapter_config.json", SETTINGS).get("base_model_name_or_path")
    of = f" of {base!r:.80}" if isinstance(base, str) and base else ""
    return (
        f"{path} is an adapter (LoRA or another of PEFT's){of}, no model: merge it first, with "
        "peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(MERGED), save the tokenizer there too, and import MERGED"
    )


def _cache(path: Path) -> str:
    """A model's folder in Hugging Face's cache, which keeps each version in a folder."""
    found = [folder for folder in sorted((path / "snapshots").iterdir()) if folder.is_dir()]
    whole = [folder for folder in found if (folder / "config.json").is_file()]
    if not whole:
        return (
            f"{path} is a model's folder in Hugging Face's cache, and none of its snapshots has a "
            "config.json: fetch the model again"
        )
    main = path / "refs" / "main"
    if main.is_file() and main.stat().st_size < 200:
        name = main.read_text(encoding="utf-8", errors="replace").strip()
        whole.sort(key=lambda folder: folder.name != name)
    return f"{path} is a model's folder in Hugging Face's cache: name its snapshot, {whole[0]}"


def _models_inside(path: Path) -> list[Path]:
    """Folders one or two levels below that have a config.json, a checkpoint's latest first."""
    found: list[Path] = []
    for pattern in ("*/config.json", "*/*/config.json"):
        for number, place in enumerate(path.glob(pattern)):
            if number >= _MOST_ENTRIES:
                break
            found.append(place.parent)
        if found:
            return sorted(found, key=lambda folder: (-_step(folder), str(folder)))
    return []


def _step(folder: Path) -> int:
    """The step of a folder that transformers' Trainer wrote, "checkpoint-500"; 0 of another."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() and len(number) < 16 else 0
