"""Compiling kernels once, keeping the machine code, and running it without Numba.

Numba turns a program's functions into LLVM code, LLVM into an object file, and that is kept in
the user's cache. Later processes hand the file to LLVM's linker (llvmlite alone, a fifth of Numba's
import) and call it through ctypes, which lets other Python threads run meanwhile.
The file's name carries a digest of the kernels' sources, the versions and the processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import logging
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import CheckpointError
from mygpt.file_access import (
    PRIVATE_FILE,
    is_private,
    make_private_folder,
    not_private,
    open_regular,
    require_regular,
)
from mygpt.storage import remove_abandoned, write_durably

# The files whose words end up in the machine code, besides this one.
_COMPILED = (
    "layout", "simd", "arithmetic", "matmul", "attention", "forward", "sample", "loop",
    "digest", "panels",
)  # fmt: skip
_DIGEST_BYTES = 32  # of SHA-256, before the code
_log = logging.getLogger("mygpt")


Kernel = Callable[[int, int], int]


class Kernels(NamedTuple):
    """The functions that Python calls, as `loop`, `digest` and `panels` define them."""

    run: Kernel
    digest: Kernel
    pack_matrices: Kernel


class KernelLibrary(NamedTuple):
    """Kernels that are compiled and kept together.

    Attributes:
        name: what its files' names begin with.
        purpose: what is being compiled, for the line that says so.
        seconds: about how long that takes.
        sources: modules whose words end up in the machine code.
        exports: the functions that Python calls, each as (module, name).
    """

    name: str
    purpose: str
    seconds: int
    sources: tuple[str, ...]
    exports: tuple[tuple[str, str], ...]


_HERE = "mygpt.engines.cpu"
DECODING = KernelLibrary(
    "kernels",
    "the decoding loop",
    10,
    tuple(f"{_HERE}.{name}" for name in _COMPILED),
    ((f"{_HERE}.loop", "run"), (f"{_HERE}.digest", "digest"), (f"{_HERE}.panels", "pack_matrices")),
)
_alive: list[Any] = []  # the linker owns the code's memory
_linked: set[str] = set()  # names of the programs that this process has


def has_machine_code(program: KernelLibrary = DECODING) -> bool:
    """Whether a program's machine code is at hand, so that it starts at once."""
    if program.name in _linked:
        return True
    path = _object_path(program)
    try:
        status = require_regular(path)
        return status is not None and is_private(status) and not_private(path.parent) is None
    except (OSError, CheckpointError):
        return False


def compile_now(program: KernelLibrary = DECODING) -> None:
    """Compile a program and keep its machine code, unless that was done before."""
    if not has_machine_code(program):
        _keep(_object_path(program), _compile(program))


@functools.cache
def load_kernels() -> Kernels:
    """The decoding loop's functions; compiles them first where need be, and says so."""
    return Kernels(*load_library(DECODING))


@functools.cache
def load_library(program: KernelLibrary) -> tuple[Kernel, ...]:
    """A program's functions, in its order; compiles them first where need be, and says so."""
    path = _object_path(program)
    try:
        return _link(_read(path), program)
    except (OSError, RuntimeError, CheckpointError):
        # The last resort of `logging` shows this on stderr, and whoever minds can silence it.
        often = "once" if (why := unusable_cache()) is None else f"in memory, since {why}"
        _log.warning("compiling %s, %s: about %d seconds", program.purpose, often, program.seconds)
        code = _compile(program)
        _keep(path, code)
        return _link(code, program)


def unusable_cache() -> str | None:
    """Why nothing of the cache is used or kept: who can write machine code there can run it.

    None where only this user can, or the folder is not there yet.
    """
    try:
        why = not_private(cache_folder())
    except OSError:
        return None
    return why and f"{why}; MYGPT_CACHE names another cache folder"


def _read(path: Path) -> bytes:
    """A kept object file; an OSError where it is damaged, or another user can have written it.

    What was checked is what is returned: all goes through one descriptor.
    """
    if not_private(path.parent) is not None:
        raise PermissionError(f"others can write to {path.parent}")
    with open_regular(path) as file:
        if not is_private(os.fstat(file.fileno())):
            raise PermissionError(f"others can write to {path}")
        data: bytes = file.read()
    if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
        raise OSError(f"{path} is damaged")  # the linker would end the process
    return data[_DIGEST_BYTES:]


def cache_folder() -> Path:
    """Where machine code is kept: MYGPT_CACHE, else the user's cache folder."""
    chosen = os.environ.get("MYGPT_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "mygpt"


@functools.cache
def _object_path(program: KernelLibrary = DECODING) -> Path:
    import llvmlite.binding as llvm

    told = hashlib.sha256()
    package = Path(__file__).parents[2]
    compiled = [*program.sources, f"{_HERE}.build", "mygpt.core.random"]
    for module in compiled:
        told.update(package.joinpath(*module.split(".")[1:]).with_suffix(".py").read_bytes())
    features = sorted(name for name, on in llvm.get_host_cpu_features().items() if on)
    for fact in (version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), *features):
        told.update(fact.encode() + b"\n")
    return cache_folder() / f"{program.name}-{told.hexdigest()[:32]}.o"


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


def _compile(program: KernelLibrary = DECODING) -> bytes:
    """The object file of a program, from a process of its own, which a signal can end."""
    from mygpt.engines.cpu.compile_process import compile_in_process

    return compile_in_process(program) or compile_here(program)


def compile_here(program: KernelLibrary) -> bytes:
    """The object file of all kernels, the ones that Python calls under their plain names."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly("")
    for code in _llvm_codes(program):
        module.link_in(llvm.parse_assembly(code))
    module.verify()
    exported = {name for _, name in program.exports}
    for function in module.functions:
        if not function.is_declaration and function.name not in exported:
            function.linkage = "internal"
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.loop_unrolling = tuning.loop_interleaving = True
    machine = _target_machine()
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def _llvm_codes(program: KernelLibrary) -> list[str]:
    """The kernels as Numba sees them, not optimised: we do that once, for all together."""
    import numba

    config: Any = numba.config
    level, config.OPT = config.OPT, type(config.OPT)(0)
    try:
        modules = [importlib.import_module(module) for module, _ in program.exports]
    finally:
        config.OPT = level
    codes = []
    for module, (_, name) in zip(modules, program.exports, strict=True):
        (result,) = getattr(module, name).overloads.values()
        code: str = result.library.get_llvm_str()
        codes.append(code.replace(result.fndesc.llvm_func_name, name))
    return codes


def _keep(path: Path, code: bytes) -> None:
    """Write the object file whole or not at all; no cache is no error."""
    with contextlib.suppress(OSError, CheckpointError):
        make_private_folder(path.parent)
        if not_private(path.parent) is not None:
            return
        if path.is_symlink():
            path.unlink()
        remove_abandoned(path)
        pieces = [hashlib.sha256(code).digest(), code]
        write_durably(path, pieces, inside=True, mode=PRIVATE_FILE)


def _link(code: bytes, program: KernelLibrary = DECODING) -> tuple[Kernel, ...]:
    import llvmlite.binding as llvm

    linker = llvm.create_lljit_compiler(_target_machine())
    parts = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    names = [name for _, name in program.exports]
    for name in names:
        parts.export_symbol(name)
    library = parts.link(linker, f"mygpt-{program.name}")
    _alive.extend([linker, library])
    _linked.add(program.name)
    return tuple(_caller(library[name]) for name in names)


def _caller(address: int) -> Kernel:
    """A function of two int64 that follows Numba's calling convention, for Python."""
    # Room for the result, room for an exception, the arguments.
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
