"""Files and folders that are recognised but cannot be imported: what they are, and the remedy."""

from __future__ import annotations

import contextlib
import shlex
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from mygpt.data import is_store
from mygpt.json_objects import SETTINGS, read_object

_UNREADABLE = "mygpt cannot read it: import the model's original folder (config.json, safetensors)"
_CONVERT = (
    "load its folder with transformers 4 (from_{}=True), save it with save_pretrained, and import "
    "that folder"
)
_ORIGINAL = (
    "the original layout of Meta or Mistral: convert it with transformers' conversion script, and "
    "import the folder that it writes"
)
_ARCHIVE = "an archive: unpack it, and import the folder or file in it"
_ENDINGS = ("zip", "tar", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar")
# What a file is, by its name in lower case, and the remedy.
_FILES = {
    "adapter_model.*": "an adapter: merge it into its model first",
    "zero_to_fp32.py": "DeepSpeed's script, which gathers the weights of its shards: python "
    "zero_to_fp32.py . pytorch_model.bin",
    "consolidated.*": _ORIGINAL,
    "params.json": _ORIGINAL,
    "*.gguf": f"a GGUF file (llama.cpp), which mygpt can write; {_UNREADABLE}",
    "*.onnx": f"an ONNX file; {_UNREADABLE}",
    "*.tflite": f"a TensorFlow Lite file; {_UNREADABLE}",
    "*.h5": f"a Keras or TensorFlow file: {_CONVERT.format('tf')}",
    "model.ckpt.*": f"a TensorFlow file: {_CONVERT.format('tf')}",
    "*.msgpack": f"a Flax file: {_CONVERT.format('flax')}",
    "*.npz": "a file of NumPy arrays without a model's configuration: save the model with "
    "torch.save, or as a Hugging Face folder",
    **{f"*.{ending}": _ARCHIVE for ending in _ENDINGS},
}
_RENAME = "not named as transformers names it: rename it to {}, if it is the complete model"
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "openvino_model.bin")
_OURS = ("best.safetensors", "last.safetensors", "last.state.safetensors")
_OWN_MARK = b'"format":"mygpt"'  # in the header of a mygpt checkpoint
_QUANTIZED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_EMBEDDING = ("modules.json", "config_sentence_transformers.json")
# Places of models in a folder; the last two are those in the cache of huggingface_hub.
_BELOW = ("*", "*/*", "models--*/snapshots/*", "hub/models--*/snapshots/*")
_MOST_ENTRIES = 64  # subfolders that are searched at most


def file_problem(path: Path) -> str | None:
    """Why a file cannot be imported, and the remedy; None if it is not recognised."""
    name = path.name.lower()
    if name.startswith("adapter_model"):
        return _adapter(path.parent)
    for pattern, what in _FILES.items():
        if fnmatch(name, pattern):
            return f"{path} is {what}"
    if name in _OURS or (path.suffix == ".safetensors" and _is_ours(path)):
        return _no_import(path)
    in_folder = path.suffix == ".json" and (path.parent / "config.json").is_file()
    if in_folder or path.suffix == ".safetensors" or fnmatch(name, "pytorch_model*.bin"):
        return (
            f"{path} is one file of a Hugging Face folder: give its folder, which has a config.json"
        )
    return None


def folder_problem(path: Path) -> str | None:
    """Why a folder cannot be imported, and the remedy; None if no reason is recognised."""

    def first(*names: str) -> str | None:
        return next((name for name in names if (path / name).is_file()), None)

    if first(*_OURS):
        return _no_import(path)
    if is_store(path):
        return (
            f"{path} is a token store, not a model: mygpt train {shlex.quote(str(path))} trains a "
            "model on it"
        )
    if first("adapter_config.json") and not first("config.json"):
        return _adapter(path)
    if first(*_EMBEDDING):
        return (
            f"{path} is a model for sentence-transformers, which turns text into vectors and does "
            "not predict tokens: import a causal language model"
        )
    if name := first(*_QUANTIZED):
        return quantized(path, name)
    return None if first("config.json") else _without_config(path)


def _without_config(path: Path) -> str | None:
    if models := _below(path, "config.json"):
        return f"{path} has no config.json: give the folder that has one ({_listed(models)})"
    if adapters := _below(path, "adapter_config.json"):
        return _adapter(adapters[0])
    found = sorted(file for end in ("pt", "pth", "ckpt") for file in path.glob(f"*.{end}"))
    if other := other_weights(path):
        return f"{path} has no config.json{other}"
    return (
        f"{path} has no config.json: give one checkpoint in it ({_listed(found)})"
        if found
        else None
    )


def other_weights(folder: Path) -> str:
    """The end of the message for a folder without weights: those of another kind, if any."""
    others = {
        "*.safetensors": _RENAME.format("model.safetensors"),
        "*.bin": _RENAME.format("pytorch_model.bin"),
    }
    for pattern, what in {**_FILES, **others}.items():
        found = sorted(file.name for file in folder.glob(pattern) if file.is_file())
        found = [name for name in found if name not in _NO_WEIGHTS]
        if found:
            return f"; {found[0]!r:.80} is {what}"
    return ""


def quantized(path: Path, name: str) -> str:
    """The message for a folder of quantized weights; `name` is the setting or file that says so."""
    return (
        f"{path} is quantized ({name}): only weights in float32, float64, float16 or bfloat16 can "
        "be read: get the model that it was quantized from"
    )


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
        f"{path} is an adapter (PEFT, such as LoRA){of}, not a complete model: merge it first, "
        "with peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(MERGED), save the tokenizer there too, and import MERGED"
    )


def _below(path: Path, name: str) -> list[Path]:
    """Subfolders that have a file of this name; the latest training step first."""
    for place in _BELOW:
        found = islice(path.glob(f"{place}/{name}"), _MOST_ENTRIES)
        if folders := [file.parent for file in found]:
            # "checkpoint-500" of transformers' Trainer is before "checkpoint-1000".
            return sorted(folders, key=lambda f: (len(f.name), str(f)), reverse=True)
    return []


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:5]))
