"""Shards: 1, 2 or 4 processes load what 1, 2 or 4 saved; nothing else is loaded or executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Replicate, Shard

from mygpt import GPT
from mygpt.errors import CheckpointError, DamagedError, StorageError
from mygpt.training.distributed.shards import check_shards, load_shards, remove_shards, save_shards
from ranks import COUNTS, RankError, common_store, join_group, run_ranks
from refusals import Malice
from training_runs import damage, refusal

pytestmark = pytest.mark.processes


def sharded_model(seed: int) -> GPT:
    """Two blocks, each sharded, and the rest; 65 rows do not divide by 2 or 4."""
    torch.manual_seed(seed)
    model = GPT(65, 6, 2, 2, max_seq_len=5)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def wholes(model: GPT) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}


def live(folder: Path) -> dict[str, Any]:
    """What every process of the three groups does; the tests check what it returns."""
    common, (place, count) = common_store(), join_group()
    model = sharded_model(count)
    digests = save_shards(folder / f"{count}", model.state_dict())
    parts = [tensor.to_local().shape[0] for tensor in model.state_dict().values()]
    torch.distributed.barrier()
    common.set(f"digests {count}", json.dumps(digests))
    common.wait([f"digests {other}" for other in COUNTS])
    loaded = []
    for other in COUNTS:
        fresh = sharded_model(99)
        known = json.loads(common.get(f"digests {other}"))
        load_shards(folder / f"{other}", fresh.state_dict(), known)
        loaded.append(wholes(fresh))
    return {
        "count": count,
        "digests": digests,
        "weights": wholes(model),
        "without a part": 0 in parts,
        "loaded": loaded,
        "mixed": save_and_load_mixed(folder / f"mixed-{count}"),
        "trouble": trouble(folder / "trouble", place) if count == 2 else None,
    }


Lives = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    folder = tmp_path_factory.mktemp("groups")
    return folder, run_ranks(sum(COUNTS), live, folder, group=False)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    pairs = [(np.asarray(found[name]), np.asarray(wanted[name])) for name in wanted]
    return found.keys() == wanted.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs
    )


def read_back(folder: Path, like: dict[str, torch.Tensor], digests: dict[str, str]) -> dict:
    """What one process loads into tensors like these."""
    found = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    load_shards(folder, found, digests)
    return found


def test_what_any_number_of_processes_saved_any_number_loads(lives: Lives) -> None:
    """A checkpoint saved on 1, 2 or 4 loads on 1, 2 or 4 with equal full weights."""
    folder, processes = lives
    saved = {process["count"]: process for process in processes}
    for count, process in saved.items():
        assert len(process["digests"]) == count + 1  # a file of every process, and one index
        assert same(
            read_back(folder / f"{count}", process["weights"], process["digests"]),
            process["weights"],
        )
    for process in processes:
        assert process["digests"] == saved[process["count"]]["digests"]
        found = zip(process["loaded"], (saved[count] for count in COUNTS), strict=True)
        assert [same(weights, other["weights"]) for weights, other in found] == [True] * 3
    assert any(process["without a part"] for process in processes)
    assert not same(saved[1]["weights"], saved[2]["weights"])


def mixed(filled: bool) -> dict[str, torch.Tensor]:
    """Scalars, empty tensors and every number type; whole, replicated, and unevenly divided."""
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    scale = 1 if filled else 0
    plain = {
        "scalar": torch.tensor(2.5) * scale,
        "counter": torch.tensor(2**40) * scale,
        "bytes": torch.arange(256, dtype=torch.uint8) * scale,
        "flags": torch.tensor([True, False]) & filled,
        "empty": torch.empty(0, 3),
        "wide": torch.linspace(0, 1, 7, dtype=torch.float64) * scale,
        "a/b.c d": torch.arange(6).reshape(2, 3) * scale,
    }
    rows = torch.arange(65 * 3, dtype=torch.float32).reshape(65, 3) * scale
    return plain | {
        "uneven": distribute_tensor(rows, mesh, [Shard(0)]),
        "columns": distribute_tensor(rows, mesh, [Shard(1)]),
        "one": distribute_tensor(rows[:1].clone(), mesh, [Shard(0)]),
        "none": distribute_tensor(rows[:0].clone(), mesh, [Shard(0)]),
        "copies": distribute_tensor(rows, mesh, [Replicate()]),
    }


def save_and_load_mixed(folder: Path) -> tuple[bool, dict[str, torch.Tensor], dict[str, str]]:
    tensors, others = mixed(True), mixed(False)
    digests = save_shards(folder, tensors)
    load_shards(folder, others, digests)
    full = [
        {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in held.items()}
        for held in (tensors, others)
    ]
    return same(*full), full[0], digests


def test_tensors_of_all_kinds_are_restored(lives: Lives) -> None:
    folder, processes = lives
    for process in processes:
        equal, whole, digests = process["mixed"]
        assert equal
        assert same(read_back(folder / f"mixed-{process['count']}", whole, digests), whole)


TENSORS = {
    "weights": torch.arange(12.0).reshape(3, 4),
    "step": torch.tensor(7),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


Saved = tuple[Path, dict[str, str]]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    folder = tmp_path / "shards-00000007"
    return folder, save_shards(folder, TENSORS)


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}


def test_one_process_needs_no_group(saved: Saved, capfd: pytest.CaptureFixture[str]) -> None:
    """Also: torch prints nothing, and a parameter is filled in place."""
    folder, digests = saved
    tensors = zeros() | {"weights": torch.nn.Parameter(torch.zeros(3, 4))}
    before = tensors["weights"]._version
    load_shards(folder, tensors, digests)
    assert same({n: t.detach() for n, t in tensors.items()}, TENSORS)
    assert tensors["weights"]._version > before  # packed weights are recognised by it
    assert capfd.readouterr() == ("", "")


def test_equal_tensors_give_equal_files(saved: Saved, tmp_path: Path) -> None:
    """No random name, no time and no path of this machine is written."""
    folder, digests = saved
    assert save_shards(tmp_path / "elsewhere", TENSORS) == digests
    assert str(tmp_path).encode() not in (folder / ".metadata").read_bytes()


def test_an_incomplete_save_is_replaced_and_a_save_is_removed(saved: Saved) -> None:
    folder, digests = saved
    (folder / ".metadata").rename(folder / ".metadata.tmp")
    (folder / "__3_0.distcp").write_bytes(b"half")
    assert save_shards(folder, TENSORS) == digests
    check_shards(folder, digests)
    remove_shards(folder)
    assert not folder.exists()
    remove_shards(folder)  # already gone


def test_a_folder_of_the_users_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(StorageError, match=r"holds thesis\.tex, which no save has written"):
        save_shards(tmp_path, TENSORS)
    assert len(list(tmp_path.iterdir())) == 2


def test_every_file_and_both_folders_are_synced_after_all_is_written(tmp_path, monkeypatch) -> None:
    """torch syncs the index before its last bytes have left a buffer, and folders never."""
    synced: dict[str, int] = {}

    def note(descriptor: int) -> None:
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", note)
    digests = save_shards(tmp_path / "s", TENSORS)
    for name in digests:
        path = tmp_path / "s" / name
        assert synced[str(path)] == path.stat().st_size
    assert {str(tmp_path / "s"), str(tmp_path)} < synced.keys()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: damage(path, 200), "is damaged or cut short"),
        (damage, "is damaged or cut short"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "is damaged or cut short"),
        (lambda path: os.truncate(path, 0), "is damaged or cut short"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
    ],
    ids=["flipped", "last", "cut", "emptied", "removed", "folder"],
)
def test_damage_is_named(saved: Saved, name: str, harm: Any, said: str) -> None:
    folder, digests = saved
    harm(folder / name)
    tensors = zeros()
    for error in (
        refusal(check_shards, folder, digests),
        refusal(load_shards, folder, tensors, digests),
    ):
        assert error.startswith(f"{folder / name} {said}")
    assert same(tensors, zeros())  # nothing was loaded


def test_a_foreign_folder_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder, digests = saved
    with pytest.raises(DamagedError, match="nowhere cannot be read: No such file"):
        check_shards(tmp_path / "nowhere", digests)
    (folder / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds __1_0\.distcp, which was not saved with"):
        check_shards(folder, digests)
    outside = digests | {"../secret": "0" * 64}
    with pytest.raises(CheckpointError, match=r"'\.\./secret' is no name of its files"):
        check_shards(folder, outside)
    with pytest.raises(DamagedError, match=r"\.metadata is missing"):
        check_shards(tmp_path / "shards-00000007" / "..", {})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"weights": torch.zeros(4, 3)},
            r"tensor 'weights' is \(3, 4\) of torch.float32, and \(4",
        ),
        (
            {"step": torch.tensor(1.0)},
            r"step' is \(\) of torch.int64, and \(\) of torch.float32",
        ),
        ({"bias": torch.zeros(4)}, "holds no tensor 'bias'"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(saved: Saved, other: Any, said: str) -> None:
    tensors = zeros()
    with pytest.raises(CheckpointError, match=said):
        load_shards(saved[0], tensors | other, saved[1])
    assert same(tensors, zeros())


def replace_metadata(saved: Saved, data: bytes) -> dict[str, str]:
    """Other metadata, with the digest that belongs to it."""
    (saved[0] / ".metadata").write_bytes(data)
    return saved[1] | {".metadata": hashlib.sha256(data).hexdigest()}


def edited(saved: Saved, edit: Any) -> dict[str, str]:
    metadata = pickle.loads((saved[0] / ".metadata").read_bytes())
    edit(metadata)
    return replace_metadata(saved, pickle.dumps(metadata))


def refused(saved: Saved, digests: dict[str, str]) -> str:
    return refusal(load_shards, saved[0], zeros(), digests)


@pytest.mark.parametrize("place", ["alone", "inside"])
def test_a_pickle_that_runs_something_is_refused(saved: Saved, tmp_path: Path, place: str) -> None:
    """Also if its digest is right: who can write the folder can also write the state."""
    harm = tmp_path / "harm"
    data = pickle.dumps(Malice(harm))
    pickle.loads(data)
    assert harm.exists()  # it does work
    harm.rmdir()
    if place == "alone":
        digests = replace_metadata(saved, data)
    else:
        digests = edited(saved, lambda metadata: setattr(metadata, "planner_data", Malice(harm)))
    said = refused(saved, digests)
    assert "is not loaded: its metadata is a pickle that names posix.mkdir" in said
    assert not harm.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        pickle.dumps({"a": 1}),
        pickle.dumps(OrderedDict()),
        pickle.dumps(Path("x")),
        pickle.dumps(getattr),
        pickle.dumps(BytesStorageMetadata()),  # such an item would be unpickled unchecked
        b"ctorch\nload\n.",
        b"ctorch\nfloat32.__class__\n.",
        b"\x80\x04\x8c\x05torch\x8c\x07Size.__\x93.",
        b"ctorch.serialization\n_get_layout\n(Vnone\ntR.",
    ],
)
def test_invalid_metadata_is_refused(saved: Saved, data: bytes) -> None:
    assert "is not loaded: its metadata is" in refused(saved, replace_metadata(saved, data))


def place_of(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def weights_of(metadata: Any) -> Any:
    return metadata.state_dict_metadata["weights"]


def is_no_tensor(metadata: Any) -> None:
    metadata.state_dict_metadata["weights"] = weights_of(metadata).properties


def repeats_a_part(metadata: Any) -> None:
    entry = weights_of(metadata)
    entry.size, entry.chunks = torch.Size((3000, 4)), entry.chunks * 1000


def takes_more_than_there_is(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, place.length * 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda metadata: setattr(place_of(metadata), "relative_path", "../other/__0_0.distcp"),
        lambda metadata: setattr(place_of(metadata), "offset", 10**9),
        lambda metadata: setattr(place_of(metadata), "transform_descriptors", ["stream.zstd"]),
        lambda metadata: setattr(weights_of(metadata), "size", torch.Size((10**9, 10**9))),
        lambda metadata: setattr(weights_of(metadata).chunks[0], "sizes", torch.Size((4, 3))),
        lambda metadata: setattr(metadata.state_dict_metadata["step"], "chunks", []),
        lambda metadata: setattr(metadata, "storage_data", None),
        is_no_tensor,
        repeats_a_part,
        takes_more_than_there_is,
    ],
)
def test_metadata_that_points_elsewhere_is_refused(saved: Saved, edit: Any) -> None:
    """Sizes are checked before memory is taken; every name is one of the folder's files."""
    said = refused(saved, edited(saved, edit))
    assert "is not loaded: its metadata does not say where tensor" in said


def test_a_shard_is_not_unpickled_either(saved: Saved, tmp_path: Path) -> None:
    """Its digest is right, and it holds a pickle instead of a tensor."""
    folder, digests = saved
    harm = tmp_path / "harm"
    torch.save(Malice(harm), folder / "__0_0.distcp")
    data = (folder / "__0_0.distcp").read_bytes()
    digests = digests | {"__0_0.distcp": hashlib.sha256(data).hexdigest()}

    def point(metadata: Any) -> None:
        name = "bytes"
        metadata.state_dict_metadata = {name: metadata.state_dict_metadata[name]}
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, len(data)

    digests |= {".metadata": edited((folder, digests), point)[".metadata"]}
    like = {"bytes": torch.zeros(5, dtype=torch.uint8)}
    assert "is not loaded: Weights only load failed" in refusal(load_shards, folder, like, digests)
    assert not harm.exists()


def error_of(action: Callable[..., object], *arguments: Any) -> tuple[str, str]:
    """The type and the words."""
    try:
        action(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def trouble(folder: Path, place: int) -> dict[str, Any]:
    """What two processes say when one of them has no space, and when it finds damage."""
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    tensors = {"large": distribute_tensor(torch.zeros(20_000), mesh, [Shard(0)])}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if place == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    no_space = error_of(save_shards, folder, tensors)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = folder.exists()
    digests = save_shards(folder, tensors)
    other = digests | ({".metadata": "0" * 64} if place == 1 else {})
    index = error_of(load_shards, folder, tensors, other)
    if place == 1:
        damage(folder / "__0_0.distcp")  # the second of three, so the second process reads it
    torch.distributed.barrier()
    damaged = error_of(load_shards, folder, tensors, digests)
    return {"no space": no_space, "left": left, "damage": damaged, "index": index}


def test_trouble_of_one_process_is_reported_once_and_stops_both(lives: Lives) -> None:
    """No space, a damaged file (each process reads its share), an index with another digest."""
    folder = lives[0] / "trouble"
    first, second = (process["trouble"] for process in lives[1] if process["count"] == 2)
    assert not first.pop("left"), "nothing is left of a save without space"
    assert set(first.values()) == {("PeerError", "")}
    assert second["no space"] == (
        "StorageError", f"{folder} cannot be written: File too large"
    )  # fmt: skip
    for what, name in (("damage", "__0_0.distcp"), ("index", ".metadata")):
        kind, said = second[what]
        assert kind == "DamagedError"
        assert said.startswith(f"{folder / name} is damaged")


def test_torch_unpickles_nothing_itself(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read the index again, after it was checked."""

    def refuse(*_: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    assert same(read_back(saved[0], TENSORS, saved[1]), TENSORS)


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("no luck")
    torch.distributed.barrier()


def test_a_rank_that_fails_is_named_and_none_is_left() -> None:
    """The harness itself: the other rank waits for ever."""
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*ValueError: no luck"):
        run_ranks(2, fail_on_one)


def test_importing_is_light() -> None:
    module = "mygpt.training.distributed.shards"
    code = f"import sys, {module}; print('torch.distributed.checkpoint' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
