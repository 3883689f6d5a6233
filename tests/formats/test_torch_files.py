"""Untrusted torch files and pickles: no code of them runs, and none takes for ever."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mygpt.errors import CheckpointError, InputError
from mygpt.formats.pickles import NotAllowed, check_pickle
from mygpt.formats.torch_files import read_plain_pickle, read_torch_file
from mygpt.training.distributed.shards import read_metadata
from refusals import Malice, refusal

KEYS = st.text(max_size=5) | st.integers(-(2**70), 2**70) | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=15,
)

# Tuples that hold the one before twice, forty deep: 2**40 values to hash, in 200 bytes.
NESTED_TUPLES = b"(t" + b"q\x00h\x00\x86" * 40
KEY = b"\x80\x02}" + NESTED_TUPLES + b"K\x01s."
NESTED_LISTS = b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 60 + b"."
BOTTOM_UP = b"\x80\x02" + b"".join(b"]q" + bytes([n]) for n in range(60)) + b"0" * 59
BOTTOM_UP += b"".join(b"h%ch%cah%ca0" % (n, n - 1, n - 1) for n in range(59, 0, -1)) + b"h\x3b."
BOMBS = {
    "a key of tuples": KEY,
    "lists that repeat each other": NESTED_LISTS,
    "lists that are filled after they were used": BOTTOM_UP,
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "deep lists": b"\x80\x02" + b"]" * 500 + b"a" * 499 + b".",
    "a place far away": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "a long number": b"\x80\x02\x8b\x00\x10\x00\x00" + b"\x01" * 4096 + b".",
    "text that repeats": b"\x80\x02X\x00\x00\x10\x00" + b"x" * 2**20 + b"q\x00(" + b"h\x00" * 999,
    "a set of tuples": b"\x80\x02c__builtin__\nset\n]" + NESTED_TUPLES + b"a\x85R.",
    "zeros of any number": b"\x80\x02c__builtin__\nbytearray\n\x8a\x08" + b"\0" * 7 + b"\1\x85R.",
    "a storage of any size": b"\x80\x02ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.",
}
BOMBS["text that repeats"] += b"l."
bombs = pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)


@given(VALUES, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_ordinary_values_pass(value, protocol):
    stream = io.BytesIO(pickle.dumps(value, protocol) + b"more")
    check_pickle(stream)
    assert stream.read() == b"more", "it stands behind the pickle"


@given(st.binary(max_size=60), st.integers(0, 2**16), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_any_bytes_pass_or_give_a_short_error(data, place, byte):
    changed = bytearray(KEY[:40] + KEY[-5:])
    changed[place % len(changed)] = byte
    for content in (b"\x80\x02" + data + b".", bytes(changed)):
        message = ""
        try:
            check_pickle(io.BytesIO(content))
        except ValueError as error:
            message = str(error)
        assert len(message) < 300


@bombs
def test_small_pickles_that_take_for_ever_are_refused(data, tmp_path: Path):
    """A meta.pkl of 300 bytes was hashed for ever."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"\w") as caught:
        check_pickle(io.BytesIO(data))
    assert not isinstance(caught.value, NotAllowed)
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(InputError, match=r"meta\.pkl") as refused:
        read_plain_pickle(tmp_path / "meta.pkl")
    assert len(str(refused.value)) < 400
    with pytest.raises(CheckpointError, match="is not loaded"):
        read_metadata(tmp_path, data)
    assert time.monotonic() - began < 20


def test_too_many_objects_or_instructions_are_refused(tmp_path: Path):
    """64 MB of empty dicts took 36 s and 5.9 GB."""
    with pytest.raises(ValueError, match="more than 500 objects"):
        check_pickle(io.BytesIO(b"}" * 501 + b"."), most_containers=500)
    with pytest.raises(ValueError, match="more than 500 instructions"):
        check_pickle(io.BytesIO(b"N" * 501 + b"."), most_steps=500)
    (tmp_path / "meta.pkl").write_bytes(b"}" * 2**21 + b".")
    with pytest.raises(InputError, match="more than 1,024 objects"):
        read_plain_pickle(tmp_path / "meta.pkl")


@bombs
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_torch_files_with_such_pickles_are_refused(tmp_path: Path, data: bytes, old: bool):
    path = tmp_path / "ckpt.pt"
    torch.save({"x": 1}, path, _use_new_zipfile_serialization=not old)
    if old:  # the fourth of its pickles is what it holds
        stream = io.BytesIO(path.read_bytes())
        for _ in range(3):
            check_pickle(stream)
        path.write_bytes(path.read_bytes()[: stream.tell()] + data + pickle.dumps([], 2))
    else:
        replace_record(path, "data.pkl", data)
    with pytest.raises(InputError, match=r"ckpt\.pt"):
        read_torch_file(path)


def replace_record(path: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(path) as file:
        records = {r.filename: file.read(r) for r in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for full, content in records.items():
            file.writestr(full, data if full.endswith(name) else content)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_torch_files_with_many_kinds_of_values_pass(tmp_path: Path, old: bool):
    """Tied weights, an optimizer's state, empty and half-precision tensors, settings, sets."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(40)))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "parameter": model[0].weight,
        "optimizer": optimizer.state_dict(),
        "half": torch.zeros(0, 3).half(),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "settings": OrderedDict({"betas": (0.9, 0.95), "names": {"a", "b"}, 5: None, "z": 1j}),
        "bytes": b"\x00\xff" * 9,
        "array": bytearray(b"abc"),
    }
    content["twice"] = [content["settings"]] * 2
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    found = read_torch_file(tmp_path / "a.pt")
    assert found["twice"] == content["twice"]
    assert torch.equal(found["model"]["1.weight"], model[0].weight)


def damaged(path: Path, how: str) -> bytes:
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    (begin,) = struct.unpack_from("<L", data, end + 16)
    if how == "two names in one place":
        second = data.index(b"PK\x01\x02", begin + 4)
        data[second + 42 : second + 46] = data[begin + 42 : begin + 46]
        size = data[begin + 16 : begin + 28]
        data[second + 16 : second + 28] = size
    elif how == "a comment":
        data[end + 20 : end + 22] = b"\x01\x00"
        data += b"x"
    elif how == "bytes before":
        return b"PK\x03\x04" + bytes(data)
    elif how == "bytes behind":
        data += b"\0" * 30
    return bytes(data)


@pytest.mark.parametrize(
    "how", ["two names in one place", "a comment", "bytes before", "bytes behind"]
)
def test_zip_files_that_programs_read_differently_are_refused(tmp_path: Path, how: str):
    path = tmp_path / "ckpt.pt"
    torch.save({"x": torch.zeros(9), "y": torch.zeros(9)}, path)
    path.write_bytes(damaged(path, how))
    with pytest.raises(InputError, match="is damaged or truncated"):
        read_torch_file(path)


def test_records_with_the_same_name_are_refused(tmp_path: Path):
    """Torch finds names whatever their case is, so the second would be the one that is loaded."""
    path = tmp_path / "ckpt.pt"
    torch.save({"x": 1}, path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("ckpt/DATA.PKL", KEY)
    with pytest.raises(InputError, match="two of its records have the same name"):
        read_torch_file(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("inside", [True, False])
def test_a_malicious_vocabulary_runs_nothing(tmp_path, protocol, inside):
    evil = Malice(tmp_path / "ran")
    hostile = pickle.dumps({"itos": {0: "a"}, "extra": evil} if inside else evil, protocol)
    (tmp_path / "meta.pkl").write_bytes(hostile)
    message = refusal(read_plain_pickle, tmp_path / "meta.pkl")
    assert "was not loaded, since it could run code" in message
    assert not (tmp_path / "ran").exists()
    pickle.loads(hostile)
    assert (tmp_path / "ran").exists()  # so the test could have failed


def test_the_second_check_of_a_vocabulary_is_sufficient_alone(tmp_path, monkeypatch):
    """If a pickle passes the first check, it still cannot load any class or function."""
    monkeypatch.setattr("mygpt.formats.torch_files.check_pickle", lambda *a, **k: None)
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(Malice(tmp_path / "ran")))
    assert "it would load posix.mkdir" in refusal(read_plain_pickle, path)
    assert not (tmp_path / "ran").exists()


PICKLES = {
    "pickle's STACK_GLOBAL": pickle.dumps(OrderedDict(a=1)),
    "pickle's GLOBAL": pickle.dumps(os.system, 0),
    "pickle's PERSID": b"Pname\n.",
    "pickle's INST": b"(ios\nsystem\n.",
    "pickle's EXT1": b"\x80\x02\x82\x01.",
    "pickle's BINFLOAT": pickle.dumps({0.5: "a"}),
    "is damaged (expected 1099511627776 bytes": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little"),
    "is damaged (it has a memo index that is out of range)": b"\x80\x02}r\xff\xff\xff\x7f.",
    "is damaged (": b"\x80\x04}(X\x01",
    "is damaged (u": b"\x80\x02}]K\x01s.",
}


@pytest.mark.parametrize("expected", PICKLES)
def test_only_plain_values_are_unpickled(tmp_path, expected):
    path = tmp_path / "meta.pkl"
    path.write_bytes(PICKLES[expected])
    assert expected in refusal(read_plain_pickle, path)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.text(), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_of_every_protocol_are_read(tmp_path_factory, value, protocol):
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(path) == value


def test_a_damaged_vocabulary_ends_in_one_line(tmp_path):
    path, draw, read = tmp_path / "meta.pkl", random.Random(1), 0
    data = pickle.dumps({"itos": dict(enumerate("abcé")), "vocab_size": 4})
    for place in range(len(data)):
        path.write_bytes(data[:place])
        refusal(read_plain_pickle, path)
    for _ in range(400):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read_plain_pickle(path)
            read += 1
        except InputError as error:
            assert str(error).isprintable()  # noqa: PT017
    assert 0 < read < 400


@pytest.mark.parametrize("way", ["zip", "old", "plain", "inside", "object"])
def test_a_malicious_file_runs_nothing(tmp_path, way):
    marker, path = tmp_path / "ran", tmp_path / "shakespeare_gpt.pt"
    if way == "plain":
        path.write_bytes(pickle.dumps(Malice(marker)))
    elif way == "object":
        torch.save(torch.nn.Linear(2, 2), path)  # a module is code too
    else:
        content = {"model": {"a": torch.ones(2)}, "notes": Malice(marker)}
        torch.save(
            content if way == "inside" else Malice(marker),
            path,
            _use_new_zipfile_serialization=way != "old",
        )
    message = refusal(read_torch_file, path)
    said = {"plain": "Unsupported operand", "object": "Linear, code that"}
    assert said.get(way, "mkdir, code that a model does not need, and was not loaded") in message
    assert not marker.exists()


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    for content in (b"", b"x", b"cos\nsystem\n", b"hello, world", b"GGUF1234"):
        path.write_bytes(content)
        assert "is not a torch file" in refusal(read_torch_file, path)
    assert "Is a directory" in refusal(read_torch_file, tmp_path)
    assert "No such file" in refusal(read_torch_file, tmp_path / "none.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    assert "a device or a pipe" in refusal(read_torch_file, tmp_path / "pipe.pt")


def test_a_compressed_file_is_not_unpacked(tmp_path):
    """A few kilobytes could become any number of gigabytes."""
    import zipfile

    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(10**6))
    assert "compressed record, 'a/data.pkl'" in refusal(read_torch_file, path)


CONTENT = {"model": {"a": torch.arange(60.0).view(6, 10)}, "config": {"heads": 4, "kind": "x"}}


@pytest.mark.parametrize("new", [True, False])
def test_every_truncation_is_detected(tmp_path, new):
    path = tmp_path / "x"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=new)
    data = path.read_bytes()
    for place in [*range(2, 40), *range(40, len(data) - 1, len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:place])
        refusal(read_torch_file, path)


def test_no_damage_ends_in_a_traceback(tmp_path):
    """A flipped bit gives a short error, unless it is in a part that is not read."""
    path, draw, refusals = tmp_path / "x", random.Random(3), []
    torch.save(CONTENT, path)
    data = path.read_bytes()
    for _ in range(120):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found = None
        try:
            found = read_torch_file(path)
        except InputError as error:
            refusals.append(str(error))
        if found is not None:
            assert torch.equal(found["model"]["a"], CONTENT["model"]["a"])
    assert len(refusals) > 60
    assert all(message.isprintable() for message in refusals)
