"""Messages for files and folders that are recognised but cannot be imported, with the remedy.

Examples: a folder one level too high, a download cache, an adapter, an embedding model, weights of
other frameworks.
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from mygpt.data import is_store
from mygpt.json_objects import SETTINGS, read_object

_FILES = {
    ".gguf": "is a GGUF file (llama.cpp), which mygpt can write but not read: import the "
    "model's original folder (config.json, safetensors)",
    ".onnx": "is an ONNX file, which mygpt cannot read: import the model's original folder "
    "(config.json, safetensors)",
    ".h5": "is a Keras or TensorFlow file, which mygpt cannot read: load its folder with "
    "transformers 4 (from_tf=True), save it with save_pretrained, and import that folder",
    ".msgpack": "is a Flax file, which mygpt cannot read: load its folder with transformers 4 "
    "(from_flax=True), save it with save_pretrained, and import that folder",
    ".tflite": "is a TensorFlow Lite file, which mygpt cannot read: import the model's original "
    "folder",
    ".npz": "holds NumPy arrays without a model's configuration: save the model with torch.save, "
    "or as a Hugging Face folder",
}
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_OURS = ("best.safetensors", "last.safetensors", "last.state.safetensors")
_OWN_MARK = b'"format":"mygpt"'  # in the header of a mygpt checkpoint
_QUANTIZED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_MOST_ENTRIES = 64  # subfolders that are searched at most


def file_problem(path: Path) -> str | None:
    """Why a file cannot be imported, and the remedy; None if it is not recognised."""
    name = path.name.lower()
    if path.suffix.lower() in _FILES:
        return f"{path} {_FILES[path.suffix.lower()]}"
    if path.suffix.lower() in _ARCHIVES:
        return f"{path} is an archive: unpack it, and import the folder or file in it"
    if name.startswith("adapter_model"):
        return _adapter(path.parent)
    if name in _OURS or (path.suffix == ".safetensors" and _is_ours(path)):
        return _no_import(path)
    if path.suffix == ".json" and (path.parent / "config.json").is_file():
        return f"{path} is one file of a Hugging Face folder: give the folder, {path.parent}"
    if name in ("pytorch_model.bin", "model.safetensors") or name.startswith("pytorch_model-"):
        return f"{path} holds weights only: give its folder, which has a config.json"
    return None


def folder_problem(path: Path) -> str | None:
    """Why a folder cannot be imported, and the remedy; None if no reason is recognised."""
    if any((path / name).is_file() for name in _OURS):
        return _no_import(path)
    if is_store(path):
        return (
            f"{path} is a token store, not a model: mygpt train {shlex.quote(str(path))} trains a "
            "model on it"
        )
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return _adapter(path)
    if (path / "modules.json").is_file() or (path / "config_sentence_transformers.json").is_file():
        return (
            f"{path} is a model for sentence-transformers, which turns text into vectors and does "
            "not predict tokens: import a causal language model"
        )
    for name in _QUANTIZED:
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
        return f"{path} has no config.json: give the folder that has one ({names})"
    adapters = sorted(file.parent for file in path.glob("*/adapter_config.json"))
    if adapters:
        return _adapter(max(adapters, key=_step))
    cached = sorted(path.glob("models--*"))[:5] + sorted(path.glob("hub/models--*"))[:5]
    if cached:
        names = ", ".join(str(folder) for folder in cached[:5])
        return f"{path} is a Hugging Face cache: give the folder of one model in it ({names})"
    for pattern in ("*.gguf", "*.onnx", "*.h5", "*.msgpack"):
        found = sorted(path.glob(pattern))
        if found:
            return file_problem(found[0])
    found = sorted(file for end in ("pt", "pth", "ckpt") for file in path.glob(f"*.{end}"))
    if found:
        names = ", ".join(str(file) for file in found[:5])
        return f"{path} has no config.json: give one checkpoint in it ({names})"
    if (path / "params.json").is_file():
        return (
            f"{path} is in the original layout of Meta or Mistral (params.json): convert it with "
            "transformers' conversion script, and import the folder that it writes"
        )
    return None


def _no_import(path: Path) -> str:
    return (
        f"{path} is a mygpt checkpoint, and needs no import: generate -c, info, eval, export and "
        "train --from read it directly"
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
        f"{path} is an adapter (PEFT, such as LoRA){of}, not a whole model: merge it first, with "
        "peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(MERGED), save the tokenizer there too, and import MERGED"
    )


def _cache(path: Path) -> str:
    """The message for a model's folder in the Hugging Face cache: names its current snapshot."""
    found = [folder for folder in sorted((path / "snapshots").iterdir()) if folder.is_dir()]
    snapshots = [folder for folder in found if (folder / "config.json").is_file()]
    if not snapshots:
        return (
            f"{path} is a model's folder in the Hugging Face cache, and none of its snapshots has "
            "a config.json: download the model again"
        )
    main = path / "refs" / "main"
    if main.is_file() and main.stat().st_size < 200:
        name = main.read_text(encoding="utf-8", errors="replace").strip()
        snapshots.sort(key=lambda folder: folder.name != name)
    return (
        f"{path} is a model's folder in the Hugging Face cache: give its snapshot, {snapshots[0]}"
    )


def _models_inside(path: Path) -> list[Path]:
    """Subfolders, at most two levels below, that have a config.json; the latest step first."""
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
    """The step in the name of a folder of transformers' Trainer, "checkpoint-500"; or else 0."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() and len(number) < 16 else 0
