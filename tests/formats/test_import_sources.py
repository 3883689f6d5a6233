"""The sources of `mygpt import`: paths and names, and the errors for those that are not models."""

from __future__ import annotations

import json
import os
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hugging_face_samples import as_pickles
from mygpt import GPT, save_checkpoint
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.cli import main
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.formats import import_checkpoint, read_foreign
from mygpt.formats.hugging_face import write_hugging_face
from mygpt.formats.tokenizers import fit_tokenizer, named_tokenizer
from mygpt.tokenization import CharTokenizer
from mygpt.training.corpus import choose_tokenizer, read_source
from refusals import refusal
from shell import Shell

TOKENIZER = CharTokenizer("abcdefgh", end_of_text=True)


def make_folder(path: Path) -> Path:
    """A small Llama's folder, exported."""
    torch.manual_seed(0)
    config = GPTConfig(
        9, 8, 2, 1, 16, norm="rms", position="rotary", mlp="swiglu", mlp_bias=False, mlp_dim=16
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.parent / f"{path.name}.safetensors"
    save_checkpoint(file, GPT.from_config(config), TOKENIZER)
    write_hugging_face(read_checkpoint(file), path)
    file.unlink()
    return path


def refused(source: object) -> str:
    return refusal(read_foreign, str(source))


def write(path: Path, content: object = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("base", ["meta-llama/Llama-2-7b", None, 3, ["x"]])
def test_an_adapter_is_recognised_with_the_way_to_merge_it(base, tmp_path):
    write(tmp_path / "adapter_config.json", {"base_model_name_or_path": base})
    weights = write(tmp_path / "adapter_model.safetensors")
    for source in (tmp_path, weights):
        message = refused(source)
        assert "adapter" in message
        assert "merge_and_unload" in message
        assert ("meta-llama/Llama-2-7b" in message) is (base == "meta-llama/Llama-2-7b")


@pytest.mark.parametrize(
    ("name", "said"),
    [("x.gguf", "GGUF"), ("X.GGUF", "GGUF"), ("x.onnx", "ONNX"), ("tf_model.h5", "TensorFlow"),
     ("flax_model.msgpack", "Flax"), ("weights.npz", "NumPy"),
     ("model.zip", "unpack it"), ("model.tar.gz", "unpack it"),
     ("pytorch_model-00001-of-00002.bin", "give its folder"),
     ("pytorch_model.bin", "give its folder"), ("model.safetensors", "give its folder")],
)  # fmt: skip
def test_a_file_of_another_program_is_recognised(name, said, tmp_path):
    message = refused(write(tmp_path / name))
    assert said in message
    assert name in message


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("modules.json", [], "vectors"),
        ("quantize_config.json", {"bits": 4}, "quantized (quantize_config.json)"),
        ("quant_config.json", {"bits": 4}, "quantized (quant_config.json)"),
        ("hf_quant_config.json", {"bits": 4}, "quantized (hf_quant_config.json)"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "_config=gptq)"),
        ("config.json", {"quantization_config": {"quant_method": 3}}, "(quantization_config)"),
        ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "(quantization)"),
    ],
)
def test_quantized_weights_and_models_of_embeddings_are_refused(name, values, said, tmp_path):
    """MLX uses the last setting."""
    folder = make_folder(tmp_path / "m")
    if name == "config.json":
        values = json.loads((folder / "config.json").read_text()) | values
    write(folder / name, values)
    message = refused(folder)
    assert said in message
    assert name == "modules.json" or f"{said}: only weights" in message


def test_files_of_a_cache_are_links_and_are_read(tmp_path):
    """As huggingface_hub stores them: a snapshot's files are links to blobs."""
    folder = make_folder(tmp_path / "m")
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "s").mkdir(parents=True)
    for file in folder.iterdir():
        blob = cache / "blobs" / f"blob-{file.name}"
        file.rename(blob)
        os.symlink(f"../../blobs/{blob.name}", cache / "snapshots" / "s" / file.name)
    found = read_foreign(str(cache / "snapshots" / "s"))
    assert found.tokenizer.to_state() == TOKENIZER.to_state()


def test_a_folder_one_level_too_high_names_the_one_below(tmp_path):
    make_folder(tmp_path / "out" / "checkpoint-500")
    make_folder(tmp_path / "out" / "checkpoint-1000")
    message = refused(tmp_path / "out")
    assert message.index("checkpoint-1000") < message.index("checkpoint-500")
    assert "checkpoint-1000" in refused(tmp_path)  # two levels too high


def test_a_cache_of_hugging_face_names_the_snapshot(tmp_path):
    cache = tmp_path / "models--their--model"
    write(cache / "refs" / "main", "b1b1\n")
    make_folder(cache / "snapshots" / "a0a0")
    snapshot = make_folder(cache / "snapshots" / "b1b1")
    assert str(snapshot) in refused(cache)
    assert "models--their--model" in refused(tmp_path)
    read_foreign(str(snapshot))
    (snapshot / "config.json").unlink()
    assert "a0a0" in refused(cache)


def test_mygpts_own_files_need_no_import(tmp_path):
    folder = imported(tmp_path)
    other = tmp_path / "model.safetensors"
    other.write_bytes((folder / "last.safetensors").read_bytes())
    for source in (folder, folder / "last.safetensors", other):
        assert "needs no import" in refused(source)


def test_one_file_of_a_folder_names_the_folder(tmp_path):
    folder = make_folder(tmp_path / "m")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert "name" in refused(folder / name)
        assert "folder" in refused(folder / name)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["m/trained_gpt.pt"], "give one checkpoint in it"),
        (["m/x-q4.gguf"], "GGUF"),
        (["m/checkpoint-5/adapter_config.json", "m/checkpoint-10/adapter_config.json"],
         "checkpoint-10 is an adapter"),
        (["m/params.json", "m/consolidated.00.pth"], "the original layout of Meta or Mistral"),
        ([], "config.json is missing"),
    ],
)  # fmt: skip
def test_a_folder_without_a_config_is_recognised_by_what_is_in_it(names, said, tmp_path):
    (tmp_path / "m").mkdir()
    for name in names:
        write(tmp_path / name, {})
    assert said in refused(tmp_path / "m")


def test_a_path_that_is_neither_file_nor_folder_is_not_searched_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace())
    os.mkfifo("pipe")
    os.symlink("nowhere", "link")
    for name in ("pipe", "link"):
        assert "neither a folder nor a file" in refused(name)


# --- names on the hub -----------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub with one folder; downloads are recorded."""
    there, here = tmp_path / "hub", tmp_path / "cache"
    here.mkdir()

    def snapshot_download(name, allow_patterns):
        if name != "their/model":
            raise OSError(f"404 Client Error: {name}\nmore")
        for file in there.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                (here / file.name).write_bytes(file.read_bytes())
        return str(here)

    module = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    make_folder(there)
    return SimpleNamespace(there=there, here=here)


def test_only_safetensors_are_downloaded_if_the_hub_has_them(hub):
    write(hub.there / "pytorch_model.bin", "never fetched")
    write(hub.there / "tf_model.h5", "never fetched")
    write(hub.there / "merges.txt", "#version: 0.2")
    found = read_foreign("their/model")
    assert found.tokenizer.kind == "char"
    names = {file.name for file in hub.here.iterdir()}
    assert {"config.json", "generation_config.json", "merges.txt", "model.safetensors"} <= names
    assert not {"pytorch_model.bin", "tf_model.h5"} & names


@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_are_downloaded_if_the_hub_has_nothing_else(shards, hub):
    wanted = read_foreign(str(hub.there)).arrays
    as_pickles(hub.there, shards)
    found = read_foreign("their/model").arrays
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_variant_is_downloaded_if_the_hub_has_nothing_else(hub):
    (hub.there / "model.safetensors").rename(hub.there / "model.fp16.safetensors")
    assert any("fp16" in note for note in read_foreign("their/model").notes)


def test_the_address_of_a_models_page_is_its_name(hub):
    read_foreign("https://huggingface.co/their/model/tree/main")
    read_foreign("https://huggingface.co/their/model")
    assert "other/model" in refused("https://huggingface.co/other/model")


def test_a_name_on_the_hub_without_a_model_is_an_error(hub):
    assert "404" in refused("their/other")
    for file in hub.there.iterdir():
        file.unlink()
    write(hub.there / "x.gguf")
    assert "no config.json" in refused("their/model")
    write(hub.there / "adapter_config.json", {})
    assert "merge_and_unload" in refused("their/model")


# --- where a model of ours is wanted --------------------------------------------------------


WANT_A_MODEL = {
    "generate": ["generate", "-p", "a", "-c"],
    "info": ["info"],
    "serve": ["serve"],
    "train --from": ["train", "text.txt", "--from"],
    "train --resume": ["train", "--resume"],
    "eval": ["eval"],
    "export": ["export", "--to", "hf", "out"],
    "explain": ["explain", "--terminal", "-p", "a"],
    "report": ["report"],
    "reproduce": ["reproduce"],
    "doctor": ["doctor"],
}


@pytest.mark.parametrize("command", WANT_A_MODEL)
def test_a_hugging_face_folder_given_as_a_run_names_the_import(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "their model-0.6B")
    write(tmp_path / "text.txt", "abcabc")
    args = WANT_A_MODEL[command]
    source = "their model-0.6B"
    order = [args[0], source, *args[3:], *args[1:3]] if command == "export" else [*args, source]
    rest = ["text.txt"] if command == "eval" else []
    wanted = "mygpt import 'their model-0.6B' -o 'runs/their model-0.6B'"
    assert wanted in Shell(capsys).refused(*order, *rest)


@pytest.mark.slow
def test_files_of_other_programs_given_as_a_checkpoint_name_the_import(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "theirs")
    torch.save({"a": torch.ones(2)}, "a.pt")
    write(tmp_path / "nano" / "ckpt.pt")
    write(tmp_path / "models--a--b" / "snapshots" / "x" / "y")
    for source, wanted in {
        "theirs/model.safetensors": "mygpt import theirs -o runs/theirs",
        "a.pt": "mygpt import a.pt -o runs/a",
        "nano": "mygpt import nano -o runs/nano",
        "models--a--b": "mygpt import models--a--b",
        "Qwen/Qwen3-0.6B": "mygpt import Qwen/Qwen3-0.6B -o runs/Qwen3-0.6B",
    }.items():
        assert wanted in Shell(capsys).refused("generate", "--seed", 1, "-p", "a", "-c", source)
    assert "import" not in Shell(capsys).refused(
        "generate", "--seed", 1, "-p", "a", "-c", "runs/poems"
    )
    write(tmp_path / "a.gguf", "GGUF and more")
    assert "but not read" in Shell(capsys).refused(
        "generate", "--seed", 1, "-p", "a", "-c", "a.gguf"
    )


def imported(tmp_path: Path) -> Path:
    make_folder(tmp_path / "theirs")
    import_checkpoint(str(tmp_path / "theirs"), tmp_path / "imported")
    return tmp_path / "imported"


def test_resuming_an_imported_model_is_an_error_with_the_remedy(tmp_path, capsys):
    folder = imported(tmp_path)
    for name in (folder, folder / "last.safetensors"):
        message = Shell(capsys).refused("train", "--resume", name)
        assert f"mygpt train FILE --from {name} --output OTHER" in message
    message = Shell(capsys).refused("train", "--resume", tmp_path / "theirs" / "model.safetensors")
    assert f"mygpt import {tmp_path / 'theirs'}" in message


def test_train_accepts_the_same_tokenizers_as_tokenize(tmp_path, monkeypatch):
    """A run, a checkpoint, a store, a Hugging Face folder or a JSON file: all the same ids."""
    monkeypatch.chdir(tmp_path)
    folder = imported(tmp_path)
    write(tmp_path / "text.txt", "abcabcagfedh" * 20)
    CharTokenizer("abcdefgh", end_of_text=True).save(tmp_path / "tokenizer.json")
    for n, name in enumerate(["imported", "imported/last.safetensors", "theirs", "tokenizer.json"]):
        with pytest.raises(SystemExit) as caught:
            main(["tokenize", "text.txt", "--out", f"store{n}", "--tokenizer", name, "-q"])
        assert caught.value.code == 0
        store = named_tokenizer(f"store{n}")
        assert store.to_state() == TOKENIZER.to_state() == named_tokenizer(name).to_state()
        settings = {"files": ["text.txt"], "val_file": None, "encoding": None}
        source = read_source(settings | {"split_documents": False}, 0.1, allow_bytes=False)
        assert choose_tokenizer(name, source, end_of_text=True).to_state() == TOKENIZER.to_state()
    assert folder.is_dir()


@pytest.mark.parametrize(("ids", "rows", "fits"), [(9, 9, True), (9, 64, True), (9, 200, False)])
def test_a_given_tokenizer_may_have_fewer_ids_than_a_padded_model(ids, rows, fits):
    if not fits:
        with pytest.raises(InputError, match="9 ids and the model 200 rows"):
            fit_tokenizer(TOKENIZER, rows)
        return
    found, notes = fit_tokenizer(TOKENIZER, rows)
    assert found.vocab_size == rows
    assert found.encode_array("abc").tolist() == TOKENIZER.encode_array("abc").tolist()
    assert found.end_of_text == TOKENIZER.end_of_text
    assert bool(notes) == (rows > ids)
