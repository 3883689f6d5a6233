"""Checkpoint files: bitwise round trips, damage of every kind, foreign files, and full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from mygpt import (
    GPT,
    ByteTokenizer,
    CharTokenizer,
    GPTConfig,
    load_checkpoint,
    resume,
    save_checkpoint,
    train,
)
from mygpt.checkpoint import container
from mygpt.checkpoint.container import read_arrays, write_arrays
from mygpt.checkpoint.durable import write_durably
from mygpt.checkpoint.model_file import (
    config_from_json,
    model_arrays,
    read_checkpoint,
    resolve,
)
from mygpt.cli import main
from mygpt.errors import CheckpointError, InputError, StorageError
from mygpt.json_objects import Limits
from refusals import Malice
from shapes import CONFIGS, TUTORIAL, build

CHARS = CharTokenizer('aé"\\\n', end_of_text=False)
PROVENANCE = {"step": 7, "losses": [1.5, 0.25], "command": 'train "é" \\ {}', "sha256": "0" * 64}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint's path."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build(GPTConfig(5, 4, 1, 1, max_seq_len=4)), CHARS, PROVENANCE)
    return path


def refused(path, match=".") -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, InputError)
    return message


def split(data: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header and the rest."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict, rest: bytes, *, digest: bool = True) -> bytes:
    """A file with that header; with a correct digest if wanted, as a forger would compute it."""
    if digest:
        header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + rest
    if digest:
        place = data.index(b'"sha256":"') + 10
        digits = hashlib.sha256(data).hexdigest().encode()
        data = data[:place] + digits + data[place + 64 :]
    return data


# --- round trips ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer", [CHARS, CharTokenizer("ab", end_of_text=True), ByteTokenizer()], ids="cwb"
)
@every_config
def test_round_trip_is_bitwise(tmp_path, config, tokenizer):
    """Weights, shape, tokenizer and provenance; the loaded model is in eval mode and predicts."""
    path = tmp_path / "x.safetensors"
    model = build(config).train()
    save_checkpoint(path, model, tokenizer, PROVENANCE)
    loaded, its_tokenizer = load_checkpoint(path)
    assert isinstance(loaded, GPT)
    assert not loaded.training
    assert loaded.config == config
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert its_tokenizer.to_state() == tokenizer.to_state()
    assert read_checkpoint(path).provenance == PROVENANCE
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model.eval()(ids)[0])


def test_extreme_values_round_trip(tmp_path):
    """Signed zero, the smallest and largest floats, infinities and NaN, bit for bit."""
    model = build(GPTConfig(5, 4, 1, 1, max_seq_len=4))
    edges = [0.0, -0.0, 1e-45, -1e-45, 3.4028235e38, torch.inf, -torch.inf, torch.nan]
    with torch.no_grad():
        model.token_embedding.weight.view(-1)[: len(edges)] = torch.tensor(edges)
    save_checkpoint(tmp_path / "x", model, CHARS)
    found = load_checkpoint(tmp_path / "x")[0].token_embedding.weight
    assert found.view(torch.int32).equal(model.token_embedding.weight.view(torch.int32))


def test_changing_a_loaded_model_does_not_change_its_file(saved):
    before = saved.read_bytes()
    model, _ = load_checkpoint(saved)
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    assert saved.read_bytes() == before
    assert load_checkpoint(saved)[0].token_embedding.weight.any()


def test_half_precision_weights_are_written_as_float32(tmp_path):
    model = build(TUTORIAL).to(torch.bfloat16)
    arrays = model_arrays(model)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    save_checkpoint(tmp_path / "x", model, CHARS)
    found = load_checkpoint(tmp_path / "x")[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor.float()), name


def test_loading_draws_no_random_numbers(saved):
    """`set_seed`, load, generate: the text is the same as without loading."""
    state = torch.get_rng_state()
    load_checkpoint(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_programs_read_it(saved):
    """safetensors' own reader finds the tensors and, as JSON, what the model is."""
    from safetensors import safe_open

    model, _ = load_checkpoint(saved)
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert metadata["format"] == "mygpt"
    assert config_from_json(json.loads(metadata["config"])) == model.config
    assert json.loads(metadata["tokenizer"]) == CHARS.to_state()
    assert json.loads(metadata["provenance"]) == PROVENANCE


# --- damage --------------------------------------------------------------------------------


def test_any_damage_is_detected(saved):
    """Flipped bits all over the file, truncations, appended bytes, zeroed and swapped blocks."""
    whole, sample = saved.read_bytes(), random.Random(0).sample
    damaged = [whole[:length] for length in [*range(20), *sample(range(20, len(whole)), 100)]]
    damaged += [whole[:-1], whole + b"\0", whole[:-128] + whole[-64:] + whole[-128:-64]]
    damaged += [
        whole[:start] + b"\0" * 64 + whole[start + 64 :] for start in range(0, len(whole) - 64, 64)
    ]
    for place in [*range(8 * 8), *sample(range(64, 8 * len(whole)), 300)]:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        damaged.append(bytes(data))
    for data in damaged:
        if data != whole:
            saved.write_bytes(data)
            refused(saved)
    saved.write_bytes(whole)
    read_checkpoint(saved)


def test_what_is_damaged_is_named(saved):
    """Each tensor, or the header."""
    whole = saved.read_bytes()
    header, numbers = split(whole)
    del header["__metadata__"]
    assert set(header) == set(load_checkpoint(saved)[0].state_dict())
    for name, entry in header.items():
        data = bytearray(whole)
        data[len(whole) - len(numbers) + entry["data_offsets"][0]] ^= 1
        saved.write_bytes(data)
        assert f"tensor {name!r} does not match its digest" in refused(saved)
    saved.write_bytes(whole.replace(b'\\"step\\":7', b'\\"step\\":8'))
    assert "header does not match its digest" in refused(saved)


def test_every_header_length_is_read(tmp_path):
    """A header of 640 bytes begins the file with 80 02, as a pickle begins.

    A checkpoint whose header had a length of 640, 896, 1152 or 1408 was refused as a pickle. When
    it was damaged, the message was that for a torch file.
    """
    lengths = set()
    for extra in range(0, 1000, 8):
        path = tmp_path / "x.safetensors"
        write_arrays(path, {"a": np.zeros(3, np.float32)}, {"provenance": {"note": "x" * extra}})
        lengths.add(int.from_bytes(path.read_bytes()[:8], "little"))
        arrays, parts = read_arrays(path)
        assert arrays["a"].tolist() == [0, 0, 0]
        assert len(parts["provenance"]["note"]) == extra
        path.write_bytes(path.read_bytes()[:-1])
        assert "truncated" in refused(path)
    assert {640, 896, 1152} <= lengths


# --- strangers -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [*range(pickle.HIGHEST_PROTOCOL + 1), "torch.save"])
def test_a_pickle_is_refused_and_not_run(tmp_path, protocol):
    """Also the pickle inside `torch.save`'s zip file."""
    path, marker = tmp_path / "x.pt", tmp_path / "ran"
    if protocol == "torch.save":
        torch.save({"model": Malice(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Malice(marker), protocol=protocol))
    message = refused(path)
    assert protocol in (0, 1) or "pickle" in message
    assert not marker.exists()
    if protocol != "torch.save":
        pickle.loads(path.read_bytes())
        assert marker.exists(), "the trap works"


def add_values(path, part, values):
    """Add values to one of the JSON parts of a file: names that older versions wrote."""
    header, rest = split(path.read_bytes())
    known = json.loads(header["__metadata__"][part])
    header["__metadata__"][part] = json.dumps(known | values)
    path.write_bytes(joined(header, rest))


def train_one_step(folder):
    """A short run; its folder."""
    options = {"embed_dim": 32, "num_layers": 1, "tokenizer": "byte", "sample_tokens": 0}
    text = folder / "text.txt"
    text.write_text("The quick brown fox. " * 50)
    train(text, output=folder / "run", steps=1, listener=lambda event: None, **options)
    return folder / "run"


@pytest.mark.kernels
@pytest.mark.parametrize("command", ["info", "generate", "resume", "export"])
def test_n_gram_tables_are_refused_in_one_line(tmp_path, capsys, command):
    """Models of version 0.1 could have them; as a model and as a run to resume."""
    run = train_one_step(tmp_path)
    for path in set(run.glob("*.safetensors")) - {run / "drafts.safetensors"}:
        add_values(path, "config", {"ngram_rows": [5, 4]})
    arguments = {
        "info": [run],
        "generate": ["--prompt", "the", "--seed", 1, "--checkpoint", run],
        "resume": ["--resume", run, "--steps", 2],
        "export": [run, tmp_path / "exported", "--to", "hf"],
    }[command]
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["train" if command == "resume" else command, *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert "ngram_rows=[5, 4]: the model has n-gram input tables, which this version does" in err
    assert "train it again" in err


def test_an_empty_list_of_n_gram_tables_is_accepted(saved):
    found = read_checkpoint(saved)
    add_values(saved, "config", {"ngram_rows": []})
    again = read_checkpoint(saved)
    assert again.config == found.config
    assert again.build_model().config.to_dict() == found.config.to_dict()


@pytest.mark.kernels
def test_a_run_without_n_gram_tables_of_version_0_1_resumes(tmp_path):
    """Its training settings have two options of the tables."""
    run = train_one_step(tmp_path)
    for path in run.glob("*.state.safetensors"):
        add_values(path, "config", {"ngram_rows": []})
        add_values(path, "training", {"table_decay": 0.0, "table_dropout": 0.0})
    resume(run, steps=2, listener=lambda event: None)
    assert read_checkpoint(run / "last.safetensors").provenance["step"] == 2


def test_a_tokenizer_too_large_for_the_header_is_stored_as_a_tensor(tmp_path, monkeypatch):
    """One of 260,000 tokens was written, and refused as damaged when it was read."""
    path, plain = tmp_path / "large.safetensors", tmp_path / "small.safetensors"
    large = CharTokenizer(map(chr, range(0x4E00, 0x4E00 + 9000)))
    model = build(GPTConfig(9000, 4, 1, 1, max_seq_len=4))
    save_checkpoint(plain, model, large, PROVENANCE)
    monkeypatch.setattr(container, "_HEADER", Limits(2**16, 2**14))
    save_checkpoint(path, model, large, PROVENANCE)
    header = split(path.read_bytes())[0]
    assert header["json/tokenizer"]["dtype"] == "U8"
    assert header["__metadata__"]["format_version"] == "2", "older versions say: upgrade"
    assert split(plain.read_bytes())[0]["__metadata__"]["format_version"] == "1"
    found = read_checkpoint(path)
    assert found.tokenizer.chars == large.chars
    assert found.provenance == PROVENANCE
    assert "json/tokenizer" not in found.arrays
    assert found.arrays.keys() == model_arrays(model).keys()
    data = bytearray(path.read_bytes())
    data[data.index(b'"chars"') + 20] ^= 1
    path.write_bytes(data)
    assert "tensor 'json/tokenizer' does not match its digest" in refused(path)


@pytest.mark.parametrize(
    ("arrays", "parts", "match"),
    [
        ({"a": np.zeros(1, np.complex64)}, {}, "has the number type complex64"),
        ({"a": np.zeros((1,) * 9, np.float32)}, {}, "9 dimensions: only .* at most 8"),
        ({"__metadata__": np.zeros(1, np.float32)}, {}, "cannot be named"),
        ({"json/a": np.zeros(1, np.uint8)}, {}, "cannot be named"),
        (
            {},
            {"a": json.loads('{"x":' * 101 + "1" + "}" * 101)},
            "nested more than 100 levels deep",
        ),
        ({}, {"a": [1]}, "is not a JSON object"),
        ({}, {"a": {"b": list(range(600))}}, "more than 500 values"),
        ({f"{n:0500}": np.zeros(1, np.uint8) for n in range(99)}, {}, "too many for one file"),
    ],
)
def test_content_that_could_not_be_read_is_not_written(tmp_path, monkeypatch, arrays, parts, match):
    monkeypatch.setattr(container, "STATE", Limits(2**20, 500))
    monkeypatch.setattr(container, "_HEADER", Limits(2**16, 2**12))
    with pytest.raises(InputError, match=match) as caught:
        write_arrays(tmp_path / "a.safetensors", arrays, parts)
    assert len(str(caught.value)) < 300
    assert not any(tmp_path.iterdir())


def test_a_run_whose_state_cannot_be_read_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "STATE", Limits(2**20, 40))
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, range(200, 260))) * 40, encoding="utf-8")
    with pytest.raises(InputError, match="the tokenizer cannot be written to a checkpoint"):
        train([text], output=tmp_path / "run", tokenizer="char", steps=1)
    assert not (tmp_path / "run" / "last.state.safetensors").exists()


HEADERS = (
    "[]", "7", '"__metadata__"', "{}", '{"__metadata__":7}', '{"__metadata__":{"format":7}}', "[",
    '{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
)  # fmt: skip
OTHERS = [
    b"", b"x", b"hello, this is a text file\n" * 50, b"\0" * 500, b"\xff" * 500, b"{}      ",
    *(len(header).to_bytes(8, "little") + header.encode() for header in HEADERS),
]  # fmt: skip


@pytest.mark.parametrize("content", OTHERS)
def test_any_other_file_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    refused(tmp_path / "x", "not a mygpt checkpoint")


def part(name: str, value: str | None):
    """A change of one of the JSON parts; None takes it out."""

    def change(header: dict) -> None:
        header["__metadata__"][name] = value
        if value is None:
            del header["__metadata__"][name]

    return change


def tensor(dtype: str, count: int):
    """As many bytes, of a type or shape that mygpt never writes."""
    return lambda header: header["final_norm.weight"].update(dtype=dtype, shape=[count])


UNREADABLE = {
    "config": [
        None, "{}", '{"vocab_size":5,"embed_dim":5,"num_heads":2,"num_layers":1}',
        '{"vocab_size":"5","embed_dim":4,"num_heads":1,"num_layers":1}', '{"layers":7}',
        '{"a":' * 3000, "no JSON", "{no JSON",
    ],
    "tokenizer": [
        None, "{}", '{"kind":"morse"}', '{"kind":["char"]}', '{"kind":"char","chars":["ab"]}',
        '{"kind":"char"}',
    ],
    "format_version": ["\N{SUPERSCRIPT TWO}", "9" * 5000],
    "provenance": ['{"a":' * 3000 + "1" + "}" * 3000],
}  # fmt: skip
CHANGES = [(part(name, value), ".") for name, values in UNREADABLE.items() for value in values]
CHANGES += [
    (tensor(*of), r"final_norm\.weight|number type|damaged")
    for of in (("F32", 5), ("F99", 4), ("I64", 2), ("F16", 8), ("BF16", 8), ("F8_E4M3", 16))
]
CHANGES += [
    (part("format_version", "3"), "format version 3 and this mygpt reads up to 2: upgrade"),
    (part("sha256", None), "digest is missing"),
]


@pytest.mark.parametrize(("change", "match"), CHANGES)
def test_headers_that_mygpt_does_not_write_are_refused(saved, change, match):
    """With a correct digest: written by another program, or with malicious intent."""
    header, rest = split(saved.read_bytes())
    change(header)
    saved.write_bytes(joined(header, rest, digest="sha256" in header["__metadata__"]))
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(saved)
    assert str(saved) in str(caught.value)


def test_arrays_that_do_not_fit_the_shape_are_named(tmp_path):
    model = build(TUTORIAL)
    state = CHARS.to_state()
    for name, array in [("final_norm.weight", np.zeros(3, np.float32)), ("more", np.zeros(2))]:
        path = tmp_path / "x"
        arrays = {**model_arrays(model), name: array}
        write_arrays(path, arrays, {"config": TUTORIAL.to_dict(), "tokenizer": state})
        with pytest.raises(CheckpointError, match=rf"tensor '{name}' has shape \({len(array)},\)"):
            load_checkpoint(path)
    arrays = model_arrays(model)
    del arrays["token_embedding.weight"]
    write_arrays(path, arrays, {"config": TUTORIAL.to_dict(), "tokenizer": state})
    with pytest.raises(CheckpointError, match=r"token_embedding.weight' is missing.*\(5, 8\)"):
        load_checkpoint(path)


# --- finding it ----------------------------------------------------------------------------


def test_the_error_for_a_missing_checkpoint_names_the_command(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing.safetensors does not exist: `mygpt train"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    refused(tmp_path / "nothing.safetensors", "does not exist")
    refused(tmp_path, "cannot be read: Is a directory")


def test_a_run_folder_gives_its_best_model_or_else_its_last(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"has no best.safetensors and no last.safetensors"):
        load_checkpoint(tmp_path)
    saved.rename(tmp_path / "last.safetensors")
    assert resolve(tmp_path) == tmp_path / "last.safetensors"
    (tmp_path / "best.safetensors").write_bytes((tmp_path / "last.safetensors").read_bytes())
    assert resolve(str(tmp_path)) == tmp_path / "best.safetensors"
    assert load_checkpoint(tmp_path)[0].config.embed_dim == 4


def test_without_a_path_the_newest_run_is_used(tmp_path, saved):
    runs = tmp_path / "runs"
    with pytest.raises(CheckpointError, match=r"no run under .*runs/: train one with"):
        resolve(None, runs=runs)
    for age, name in enumerate(["new", "older", "oldest"]):
        (runs / name).mkdir(parents=True)
        path = runs / name / "last.safetensors"
        path.write_bytes(saved.read_bytes())
        os.utime(path, (10**9 - age, 10**9 - age))
    (runs / "empty").mkdir()
    assert resolve(None, runs=runs) == runs / "new" / "last.safetensors"


# --- writing -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch, call, code):
    """Exit code 3, with the system's reason and the path."""
    before = saved.read_bytes()

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError, match=os.strerror(code)) as caught:
            write_durably(saved, [b"new"])
    assert caught.value.exit_code == 3
    assert isinstance(caught.value, OSError)
    assert str(saved) in str(caught.value)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_disk_that_becomes_full_leaves_the_old_file(saved):
    """A real failure of the write itself: the system refuses files past 1,000 bytes."""
    resource = pytest.importorskip("resource")
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            save_checkpoint(saved, build(TUTORIAL), CHARS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_the_data_is_synced_before_the_rename_and_the_folder_after(saved, monkeypatch):
    """In this order a crash cannot leave an empty file under the new name."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(*args):
        calls.append("rename")
        replace(*args)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_durably(saved, [b"new"])
    assert calls == ["file", "rename", "folder"]
    assert saved.read_bytes() == b"new"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027, 0o000])
def test_the_files_mode_follows_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        save_checkpoint(tmp_path / "x", build(TUTORIAL), CHARS)
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    """Over two links and from another folder."""
    (tmp_path / "far").mkdir()
    target, link, other = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "other"
    target.write_bytes(b"old")
    link.symlink_to("far/target")
    other.symlink_to(link)
    write_durably(other, [b"new"])
    assert link.is_symlink()
    assert other.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["far", "link", "other"]
    assert os.listdir(tmp_path / "far") == ["target"]


def test_paths_that_cannot_be_written_to_are_named(tmp_path):
    """A file where a folder should be, a folder where the file should be, too long a name.

    The first and the last once ended in the error of the clearing up, not in a StorageError.
    """
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="cannot write") as caught:
            write_durably(path, [b"new"])
        assert str(path) in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_missing_folders_are_created_and_names_as_long_as_the_system_allows_written(tmp_path):
    """The temporary file's name must not be longer than the system allows."""
    path = tmp_path / "a" / "b" / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    write_durably(path, [b"new"])
    assert path.read_bytes() == b"new"


# --- what reading costs --------------------------------------------------------------------


def test_reading_a_checkpoint_imports_no_torch_and_building_its_model_no_compiler(saved):
    """The command line shows a checkpoint, and the NumPy engine starts, without torch's seconds."""
    code = (
        "import sys\n"
        "from mygpt.checkpoint.model_file import read_checkpoint\n"
        "checkpoint = read_checkpoint(sys.argv[1])\n"
        "assert checkpoint.arrays['final_norm.bias'].shape == (4,)\n"
        "assert 'torch' not in sys.modules\n"
        # torch's compiler took a second of each command that loads a model
        "checkpoint.build_model()\n"
        "assert 'torch' in sys.modules and 'sympy' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_format_version_is_the_tested_one():
    """A new format needs a test that the old one is still read."""
    assert container.FORMAT_VERSION == 1
