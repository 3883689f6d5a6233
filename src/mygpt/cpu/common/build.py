"""Compiles kernels once, stores their machine code, and runs it without Numba.

Numba turns a library's functions into LLVM code, LLVM turns that into an object file, and the file
is stored in the user's cache folder. Later processes link it by llvmlite alone, whose import takes
a fifth of Numba's, and call it through ctypes, which lets other Python threads run meanwhile.
The file's name contains a digest of the kernels' sources, the versions and the processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.checkpoint.durable import remove_abandoned, write_durably
from mygpt.compat import numba_functions_apart, numba_modules
from mygpt.errors import CheckpointError, OutOfMemoryError
from mygpt.file_access import (
    PRIVATE_FILE,
    cache_folder,
    is_private,
    make_private_folder,
    not_private,
    open_regular,
    require_regular,
)
from mygpt.signals import Abandonable

_DIGEST_BYTES = 32  # of SHA-256, before the code
_log = logging.getLogger("mygpt")


Kernel = Callable[[int, int], int]


class KernelLibrary(NamedTuple):
    """Kernels that are compiled into one object file.

    Attributes:
        name: the first part of the file's name.
        purpose: what is being compiled, for the message about it.
        seconds: about how long compiling takes.
        sources: modules that the machine code is made from.
        exports: the functions that Python calls, each as (module, name).
    """

    name: str
    purpose: str
    seconds: int
    sources: tuple[str, ...]
    exports: tuple[tuple[str, str], ...]


_COMMON, _DECODE, _TRAIN = (f"mygpt.cpu.{part}" for part in ("common", "decode", "train"))
_SHARED = tuple(
    f"{_COMMON}.{name}" for name in ("layout", "simd", "tile", "arithmetic", "matmul", "weights")
)
_INT4 = tuple(f"{_COMMON}.{name}" for name in ("int4_format", "int4", "int4_quantizing"))
_DECODE_SOURCES = ("layout", "attention", "forward", "sample", "draft", "loop")
DECODING = KernelLibrary(
    "kernels",
    "the decoding loop",
    15,
    (*_SHARED, *_INT4, *(f"{_DECODE}.{name}" for name in _DECODE_SOURCES)),
    (
        (f"{_DECODE}.loop", "run"),
        (f"{_COMMON}.weights", "digest"),
        (f"{_COMMON}.weights", "pack_matrices"),
        (f"{_COMMON}.int4_quantizing", "quantize_int4"),
    ),
)
_TRAIN_SOURCES = (
    "layout", "vectors", "amx", "packing", "bfloat16", "products", "arithmetic", "activations",
    "attention", "columns", "attention_bfloat16", "block", "network", "ngram_layout", "ngram",
    "orthogonal",
)  # fmt: skip
TRAINING = KernelLibrary(
    "training",
    "the training step",
    30,
    (*_SHARED, *(f"{_TRAIN}.{name}" for name in _TRAIN_SOURCES)),
    (
        (f"{_TRAIN}.network", "pack_weights"),
        (f"{_TRAIN}.network", "losses_and_gradients"),
        (f"{_TRAIN}.ngram", "predict_by_ngrams"),
        (f"{_TRAIN}.network", "sum_gradients"),
        (f"{_TRAIN}.orthogonal", "update_matrices"),
    ),
)
# Objects that must not be collected: the linker owns the memory of the machine code.
_alive: list[Any] = []
_linked: set[str] = set()  # names of the libraries that this process has linked


def has_machine_code(library: KernelLibrary = DECODING) -> bool:
    """Whether a library's machine code is linked or in the cache, so that it starts at once."""
    if library.name in _linked:
        return True
    path = _object_path(library)
    try:
        status = require_regular(path)
        return status is not None and is_private(status) and not_private(path.parent) is None
    except (OSError, CheckpointError):
        return False


def compile_now(library: KernelLibrary = DECODING) -> None:
    """Compile a library and store its machine code, unless that was done before."""
    if not has_machine_code(library):
        _store(_object_path(library), _compile(library))


@functools.cache
def load_library(library: KernelLibrary = DECODING) -> dict[str, Kernel]:
    """The functions of `exports` by name; compiled first where needed, which the log reports."""
    path = _object_path(library)
    try:
        return _link(_read(path), library)
    except (OSError, RuntimeError, CheckpointError):
        # Without a handler `logging` prints warnings on stderr; a program can set another level.
        often = "once" if (why := unusable_cache()) is None else f"in memory, since {why}"
        _log.warning("compiling %s, %s: about %d seconds", library.purpose, often, library.seconds)
        code = _compile(library)
        _store(path, code)
        return _link(code, library)


def unusable_cache() -> str | None:
    """Why the cache is neither read nor written: another user could put machine code into it.

    None where only this user can write to it, or the folder does not exist yet.
    """
    try:
        why = not_private(cache_folder())
    except OSError:
        return None
    return why and f"{why}; MYGPT_CACHE names another cache folder"


def _read(path: Path) -> bytes:
    """A stored object file; an OSError where it is damaged, or another user may have written it.

    All checks and the read go through one descriptor, so the file that was checked is the one read.
    """
    if not_private(path.parent) is not None:
        raise PermissionError(f"others can write to {path.parent}")
    with open_regular(path) as file:
        if not is_private(os.fstat(file.fileno())):
            raise PermissionError(f"others can write to {path}")
        data: bytes = file.read()
    if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
        raise OSError(f"{path} is damaged")  # the linker would abort the process
    return data[_DIGEST_BYTES:]


@functools.cache
def _object_path(library: KernelLibrary = DECODING) -> Path:
    import llvmlite.binding as llvm

    digest = hashlib.sha256()
    package = Path(__file__).parents[2]
    # `sample` takes a constant from `core.random`. Any change of a source, even of a comment, gives
    # another name: comparing more cleverly would save little and could be wrong.
    sources = [*library.sources, f"{_COMMON}.build", "mygpt.core.random"]
    for module in sources:
        digest.update(package.joinpath(*module.split(".")[1:]).with_suffix(".py").read_bytes())
    features = sorted(name for name, on in llvm.get_host_cpu_features().items() if on)
    for fact in (version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), *features):
        digest.update(fact.encode() + b"\n")
    return cache_folder() / f"{library.name}-{digest.hexdigest()[:32]}.o"


def _target_machine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        jit=True,
    )


def _compile(library: KernelLibrary) -> bytes:
    """The object file of a library, compiled in another process if that can be started.

    Compiling takes many seconds. A signal that arrives inside a callback of LLVM would be lost;
    another process can be waited for and killed. Numba and LLVM's compiler also stay out of the
    caller's memory.

    Raises:
        Abandoned: on a signal that elsewhere lets the work in progress finish.
        OutOfMemoryError: where the system has killed the process.
    """
    from mygpt.processes import start  # `subprocess` is needed for nothing else

    with Abandonable():
        try:
            process = start(__name__, json.dumps(library))
        except (OSError, TypeError):  # TypeError: this Python does not know its own path
            return _compile_here(library)
        with process:
            try:
                assert process.stdout is not None
                code = process.stdout.read()
            except BaseException:
                process.kill()
                raise
    if process.returncode == -signal.SIGKILL:
        raise OutOfMemoryError(
            f"the process that compiles {library.purpose} was killed: memory may be short"
        )
    return code if process.returncode == 0 else _compile_here(library)


def main() -> None:
    """The process that compiles: write the object file, unless standard input is closed first.

    The library's description is an argument. Standard input closes when the caller dies.
    """
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that some library prints must not get into the object file
    threading.Thread(target=_end_with_input, daemon=True).start()
    name, purpose, seconds, sources, exports = json.loads(sys.argv[2])
    exported = tuple((module, function) for module, function in exports)
    try:
        library = KernelLibrary(name, purpose, seconds, tuple(sources), exported)
        code = _compile_here(library, alone=True)
    except Exception:  # the caller then compiles by itself and raises the same error
        os._exit(1)
    answer.write(code)
    answer.flush()
    os._exit(0)  # without LLVM's cleaning up, which takes time


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _compile_here(library: KernelLibrary, *, alone: bool = False) -> bytes:
    """The object file of all kernels; those that Python calls have their plain names.

    Args:
        library: what to compile.
        alone: whether this process does nothing else with Numba.
    """
    import llvmlite.binding as llvm

    module = llvm.parse_assembly("")
    for code in _llvm_codes(library, alone=alone):
        module.link_in(llvm.parse_assembly(code))
    module.verify()
    # Functions that are not exported become internal: LLVM may then inline them everywhere and
    # drop them. Then one pass over all kernels together, with the vectorisers on.
    exported = {name for _, name in library.exports}
    for function in module.functions:
        if function.is_declaration:
            assert not function.name.startswith("_ZN"), f"{function.name} has no code"
        elif function.name not in exported:
            function.linkage = "internal"
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.loop_unrolling = tuning.loop_interleaving = True
    machine = _target_machine()
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def _llvm_codes(library: KernelLibrary, *, alone: bool) -> list[str]:
    """LLVM code of the kernels, not optimised: that is done once, for all together."""
    # Numba would optimise each function at its definition: 37 s of CPU instead of 10 in all. It
    # would also link into each what that calls, and make machine code of it: a third of the time.
    import numba

    config: Any = numba.config
    level, config.OPT = config.OPT, type(config.OPT)(0)
    try:
        with numba_functions_apart() if alone else contextlib.nullcontext():
            modules = [importlib.import_module(module) for module, _ in library.exports]
    finally:
        config.OPT = level
    libraries, names = [], {}
    for module, (_, name) in zip(modules, library.exports, strict=True):
        (result,) = getattr(module, name).overloads.values()
        libraries.append(result.library)
        names[result.fndesc.llvm_func_name] = name
    codes = numba_modules(libraries) if alone else [one.get_llvm_str() for one in libraries]
    return [_renamed(code, names) for code in codes]


def _renamed(code: str, names: dict[str, str]) -> str:
    for before, after in names.items():
        code = code.replace(before, after)
    return code


def _store(path: Path, code: bytes) -> None:
    """Write the object file completely or not at all; a failure is ignored: the code still runs."""
    with contextlib.suppress(OSError, CheckpointError):
        make_private_folder(path.parent)
        if not_private(path.parent) is not None:
            return
        if path.is_symlink():
            path.unlink()
        remove_abandoned(path)
        pieces = [hashlib.sha256(code).digest(), code]
        write_durably(path, pieces, inside=True, mode=PRIVATE_FILE)


def _link(code: bytes, library: KernelLibrary) -> dict[str, Kernel]:
    """Put an object file's code into memory and return the exported functions."""
    import llvmlite.binding as llvm

    # JITLink puts code and constants into one piece of memory. LLVM's other linker takes memory for
    # each wherever some is free; beside the libraries of a torch for CUDA that was more than 2 GiB
    # apart, and a jump table of LLVM 15 (llvmlite 0.44) then leads nowhere. For Windows' object
    # files JITLink is younger, and not used.
    linker = llvm.create_lljit_compiler(_target_machine(), use_jit_link=sys.platform != "win32")
    parts = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    names = [name for _, name in library.exports]
    for name in names:
        parts.export_symbol(name)
    linked = parts.link(linker, f"mygpt-{library.name}")
    _alive.extend([linker, linked])
    _linked.add(library.name)
    return {name: _caller(linked[name]) for name in names}


def _caller(address: int) -> Kernel:
    """A function of two int64 that follows Numba's calling convention, for Python."""
    # int32 status f(int64 *result, void **exception, int64 first, int64 second)
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    )
    function = prototype(address)

    error = ctypes.c_void_p()
    error_address = ctypes.addressof(error)
    _alive.append(error)

    def call(first: int, second: int) -> int:
        result = ctypes.c_int64(0)
        function(ctypes.addressof(result), error_address, first, second)
        return result.value

    return call
