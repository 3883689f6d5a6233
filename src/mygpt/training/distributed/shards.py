"""Sharded tensors of several processes, in a folder that all of them write.

The writing, the reading and the new division among another number of processes are torch's own
(torch.distributed.checkpoint). What is added here: files and folders are synced; every file has a
digest, which the run's state holds; nothing is unpickled that has not been checked.

The metadata is a pickle, which could name any function to be called. It is read only once its
digest is right, may name nothing but what torch's own description of tensors needs, and what it
describes is checked against the files before memory is allocated.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mygpt.checkpoint.durable import reason, storage_errors, sync_folder
from mygpt.errors import CheckpointError, DamagedError, MygptError, StorageError
from mygpt.file_access import open_regular, read_inside, require_folder
from mygpt.formats.pickles import check_pickle
from mygpt.training.distributed.process_group import SINGLE_PROCESS, PeerError, ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

Tensors = Mapping[str, torch.Tensor]

_METADATA = ".metadata"
_SHARD = re.compile(r"__(\d{1,9})_\d{1,9}\.distcp")
_HALF_WRITTEN = ".metadata.tmp"
_ALONE = "torch.distributed is (disabled|unavailable)"
_MOST_CONTAINERS, _MOST_STEPS = 2**22, 2**25  # one shard of a tensor needs about 20, and 100
_CHECKPOINT = "torch.distributed.checkpoint"
_NAMES = {
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # finds a layout by its name
    ("torch", "Size"),
}
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_NAMES |= {("torch", str(dtype).removeprefix("torch.")) for dtype in _DTYPES}


def save_shards(folder: Path, tensors: Tensors) -> dict[str, str]:
    """Write tensors, each process its shards; every process calls this with the same names.

    Args:
        folder: what an earlier save left in it is removed first.
        tensors: DTensors, or plain tensors that are equal in all processes.

    Returns:
        The SHA-256 of every file by its name, the same in all processes.

    Raises:
        StorageError: when there is no space, or the place cannot be written to; nothing is left.
        PeerError: when that happened to another process.
    """
    group = _current_group()
    group.run_on_main(lambda: _make_folder(folder))
    group.run_on_all(lambda: _require_here(folder))
    try:
        _write(folder, tensors, group)
        mine = group.run_on_all(lambda: _sync_files(folder, group.rank))
        digests = dict(item for part in group.gather(mine) for item in part.items())
        group.run_on_main(lambda: _sync_folders(folder))
    except MygptError:
        if group.is_main:  # frees the space it used
            with suppress(StorageError):
                remove_shards(folder)
        raise
    return digests


def load_shards(folder: Path, tensors: Tensors, digests: Mapping[str, str]) -> None:
    """Fill tensors in place, whatever the number of processes that wrote them; all call this.

    Args:
        folder: where `save_shards` wrote.
        tensors: of the names, shapes and number types that were saved; others stay unread.
        digests: what `save_shards` returned.

    Raises:
        DamagedError: naming the file that is missing or is not what was written.
        CheckpointError: for a foreign folder, or a tensor that is not in it as it is wanted.
        PeerError: when another process has raised one of these.
    """
    group = _current_group()

    def check() -> Metadata:
        _check_names(folder, digests)
        for name in sorted(digests)[group.rank :: group.size]:
            _check_file(folder / name, digests[name])
        return _read_checked(folder, tensors, digests)

    _read(folder, group.run_on_all(check), tensors, group)


def check_shards(folder: Path, digests: Mapping[str, str]) -> None:
    """Read every file of a save once, in this process.

    Raises:
        DamagedError: naming the file that is missing, cut short or otherwise changed.
        CheckpointError: where the folder is not there, or holds what was not saved.
    """
    _check_names(folder, digests)
    for name, digest in digests.items():
        _check_file(folder / name, digest)


def remove_shards(folder: Path) -> None:
    """Remove a save, complete or not; nothing else.

    Raises:
        StorageError: where the folder holds what no save writes, or cannot be removed.
    """
    with storage_errors(folder, folder), suppress(FileNotFoundError):
        require_folder(folder)
        names = sorted(os.listdir(folder))
        for name in names:
            if name not in (_METADATA, _HALF_WRITTEN) and not _SHARD.fullmatch(name):
                raise StorageError(
                    f"{folder} holds {name:.80}, which no save has written: move that away"
                )
        for name in names:
            (folder / name).unlink()
        folder.rmdir()


def _current_group() -> ProcessGroup:
    """The processes of torch's default group; a single one if there is none."""
    group = torch.distributed
    if not group.is_available() or not group.is_initialized():
        return SINGLE_PROCESS
    return ProcessGroup(group.get_rank(), group.get_world_size())


def _make_folder(folder: Path) -> None:
    remove_shards(folder)
    with storage_errors(folder, folder):
        folder.mkdir(parents=True)


def _require_here(folder: Path) -> None:
    """Raise `StorageError` if process 0's folder is not visible here."""
    if not folder.is_dir():
        raise StorageError(
            f"{folder} was made by process 0 and is not here: --output must be a folder that all "
            "machines share, and --shard needs it"
        )


def _write(folder: Path, tensors: Tensors, group: ProcessGroup) -> None:
    """Write torch's files; they are not durable yet."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(FileSystemWriter):
        """Writes no local path and no random name: equal tensors give equal files."""

        def storage_meta(self) -> None:
            return None

        def write_data(self, plan: Any, planner: Any) -> Any:
            try:
                return super().write_data(plan, planner)
            except Exception as error:
                raise _root(error) from None

    # torch's own sync is incomplete: the metadata's last bytes are still in a buffer then.
    writer = Writer(folder, sync_files=False)
    # Names are not flattened: nothing is nested, and every value is a tensor, never a pickle.
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    parts = {name: tensor.detach() for name, tensor in tensors.items()}
    with _torch_at_work(folder, group, StorageError, "cannot be written"):
        save(parts, storage_writer=writer, planner=planner, no_dist=group.is_single)


def _root(error: BaseException) -> BaseException:
    """The operating system's error, if torch has wrapped it."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def _sync_files(folder: Path, rank: int) -> dict[str, str]:
    """Sync the files that this process wrote; returns their digests."""
    digests = {}
    with storage_errors(folder, folder):
        for name in sorted(os.listdir(folder)):
            shard = _SHARD.fullmatch(name)
            if rank == (int(shard[1]) if shard else 0):
                with open_regular(folder / name, "r+b") as file:  # some systems only sync these
                    digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
    return digests


def _sync_folders(folder: Path) -> None:
    with storage_errors(folder, folder):
        sync_folder(folder)
        sync_folder(folder.parent)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Inside, an error of the operating system is a `DamagedError`."""
    try:
        yield
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None


def _check_names(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise unless the folder holds exactly these files."""
    for name in digests:  # the names come from a file
        if name != _METADATA and not _SHARD.fullmatch(name):
            raise CheckpointError(f"{folder} is not loaded: {name!r:.80} is no name of its files")
    require_folder(folder)
    with _reading(folder):
        found = set(os.listdir(folder))
    for name in sorted({*digests, _METADATA} - found):
        raise DamagedError(f"{folder / name} is missing")
    for name in sorted(found - set(digests)):
        raise CheckpointError(f"{folder} holds {name:.80}, which was not saved with the others")


def _check_file(path: Path, digest: str) -> None:
    with _reading(path), open_regular(path) as file:
        _require_digest(path, hashlib.file_digest(file, "sha256").hexdigest(), digest)


def _require_digest(path: Path, found: str, digest: str) -> None:
    if found != digest:
        raise DamagedError(f"{path} is damaged or cut short: it does not match its digest")


def _read_checked(folder: Path, tensors: Tensors, digests: Mapping[str, str]) -> Metadata:
    """The metadata, after checking its digest and that it has all tensors as wanted."""
    path = folder / _METADATA
    with _reading(folder):
        data = read_inside(path)
        sizes = {name: (folder / name).lstat().st_size for name in digests}
    # Again, since these are the bytes that are unpickled.
    _require_digest(path, hashlib.sha256(data).hexdigest(), digests[_METADATA])
    metadata = read_metadata(folder, data)
    _check_places(folder, metadata, sizes)
    entries: dict[str, Any] = metadata.state_dict_metadata
    for name, tensor in tensors.items():
        if name not in entries:
            raise CheckpointError(f"{folder} holds no tensor {name!r:.80}")
        shape, dtype = entries[name].size, entries[name].properties.dtype
        if shape != tensor.shape or dtype != tensor.dtype:
            raise CheckpointError(
                f"{folder}: tensor {name!r:.80} is {tuple(shape)} of {dtype}, and "
                f"{tuple(tensor.shape)} of {tensor.dtype} is wanted"
            )
    return metadata


def _read(folder: Path, metadata: Metadata, tensors: Tensors, group: ProcessGroup) -> None:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        """Uses metadata that was checked: torch would unpickle the file unchecked."""

        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            return metadata

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    parts = {name: tensor.detach() for name, tensor in tensors.items()}  # with the same memory
    with _torch_at_work(folder, group, CheckpointError, "is not loaded"):
        load(parts, storage_reader=Reader(folder), planner=planner, no_dist=group.is_single)


@contextmanager
def _torch_at_work(
    folder: Path, group: ProcessGroup, kind: type[MygptError], what: str
) -> Iterator[None]:
    """Translate torch's errors into ours: one process reports, the others raise `PeerError`."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _ALONE, UserWarning)
            yield
    except CheckpointException as error:
        first = min(error.failures)
        cause = error.failures[first][0]
        if not isinstance(cause, Exception):  # a signal
            raise cause from None
        if first != group.rank:
            raise PeerError from None
        why = reason(cause, folder, 0) if isinstance(cause, OSError) else str(cause)
        why = why.split("\n")[0] or type(cause).__name__
        raise kind(f"{folder} {what}: {why:.200}") from cause
    except RuntimeError as error:  # a lost connection: other errors are wrapped by torch
        if group.is_single:
            raise
        raise PeerError from error


class _Reader(pickle.Unpickler):
    """An unpickler that only loads a dozen known names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise CheckpointError(f"its metadata is a pickle that names {module}.{name}"[:200])
        return super().find_class(module, name)


def read_metadata(folder: Path, data: bytes) -> Metadata:
    """The contents of a metadata file.

    Raises:
        CheckpointError: when they name what no description of tensors needs, or are none.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        check_pickle(io.BytesIO(data), most_containers=_MOST_CONTAINERS, most_steps=_MOST_STEPS)
        metadata = _Reader(io.BytesIO(data)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is not loaded: {error}") from None
    except Exception as error:  # a pickle can make classes raise anything
        what = f"its metadata is none: {type(error).__name__}: {error}"
        raise CheckpointError(f"{folder} is not loaded: {what:.220}") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{folder} is not loaded: its metadata is none")
    return metadata


def _check_places(folder: Path, metadata: Metadata, sizes: Mapping[str, int]) -> None:
    """Raise `CheckpointError` unless all entries are tensors, complete, and inside the files."""
    name = "?"
    try:
        used: Counter[str] = Counter()
        for name, entry in metadata.state_dict_metadata.items():
            used += _used_bytes(name, entry, metadata.storage_data, sizes)
        if any(used[file] > sizes[file] for file in used):
            raise ValueError
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{folder} is not loaded: its metadata does not say where tensor {name!r:.80} is"
        ) from None


def _used_bytes(
    name: str, entry: Any, places: Mapping[Any, Any], sizes: Mapping[str, int]
) -> Counter[str]:
    """The bytes of one tensor's shards in each file; `ValueError` for inconsistent entries."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    if type(entry) is not TensorStorageMetadata or entry.properties.dtype not in _DTYPES:
        raise ValueError(name)
    used: Counter[str] = Counter()
    begins: set[tuple[int, ...]] = set()
    found = 0
    for part in entry.chunks:
        begin, volume = tuple(part.offsets), math.prod(part.sizes)
        place = places[MetadataIndex(name, begin)]
        spans = zip(begin, part.sizes, entry.size, strict=True)
        inside = all(min(at, size) >= 0 and at + size <= length for at, size, length in spans)
        if not inside or (volume and begin in begins):
            raise ValueError(name)
        if not _is_in_file(place, volume * entry.properties.dtype.itemsize, sizes):
            raise ValueError(name)
        if begin not in begins:  # processes without rows share an empty shard
            used[place.relative_path] += place.length
        begins.add(begin)
        found += volume
    if found != math.prod(entry.size) or not entry.chunks:
        raise ValueError(name)
    return used


def _is_in_file(place: Any, wanted_bytes: int, sizes: Mapping[str, int]) -> bool:
    """Whether a shard is in a known file, with the right length and number format."""
    ends = place.offset + place.length
    plain = getattr(place, "transform_descriptors", None) is None
    inside = min(place.offset, place.length) >= 0 and ends <= sizes[place.relative_path]
    return plain and inside and wanted_bytes <= place.length
