"""Compiling the loop once, keeping the machine code, and running it without Numba.

Numba turns `loop.run` into LLVM code, LLVM into an object file, and that is kept in the user's
cache. Later processes hand the file to LLVM's linker (llvmlite alone, a fifth of Numba's
import) and call it through ctypes, which lets other Python threads run meanwhile.
The file's name carries a digest of the kernels' sources, the versions and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SYMBOL = "mygpt_run"
Run = Callable[[int, int], None]
_alive: list[Any] = []  # the linker owns the code's memory


def available() -> bool:
    """Whether this machine has what the compiled engine needs."""
    return (
        find_spec("numba") is not None
        and find_spec("llvmlite") is not None
        and os.name == "posix"
        and sys.maxsize > 2**32
    )


def is_compiled() -> bool:
    """Whether the loop's machine code is at hand, so that it starts at once."""
    return bool(_alive) or _object_path().is_file()


def compile_now() -> None:
    """Compile the loop and keep its machine code, unless that was done before."""
    if not is_compiled():
        _keep(_object_path(), _compile())


@functools.cache
def load_run() -> Run:
    """The compiled `run(job_address, thread)`; compiles it first where need be."""
    path = _object_path()
    try:
        code = path.read_bytes()
        return _link(code)
    except (OSError, RuntimeError):
        code = _compile()
        _keep(path, code)
        return _link(code)


def cache_folder() -> Path:
    """Where machine code is kept: MYGPT_CACHE, else the user's cache folder."""
    chosen = os.environ.get("MYGPT_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "mygpt"


@functools.cache
def _object_path() -> Path:
    import llvmlite.binding as llvm

    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for source in [*sorted(folder.glob("*.py")), folder.parents[1] / "randomness.py"]:
        digest.update(source.read_bytes())
    features = sorted(name for name, on in llvm.get_host_cpu_features().items() if on)
    for told in (version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), *features):
        digest.update(told.encode() + b"\n")
    return cache_folder() / f"run-{digest.hexdigest()[:32]}.o"


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


def _compile() -> bytes:
    """The object file of `loop.run` under its plain name."""
    import llvmlite.binding as llvm

    code = _llvm_code()
    module = llvm.parse_assembly(code)
    module.verify()
    machine = _target_machine()
    for function in module.functions:
        if not function.is_declaration and function.name != _SYMBOL:
            function.linkage = "internal"
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.loop_unrolling = tuning.loop_interleaving = True
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def _llvm_code() -> str:
    """`loop.run` as Numba sees it, not optimised: we do that once, for all of it together."""
    import numba

    config: Any = numba.config
    level, config.OPT = config.OPT, type(config.OPT)(0)
    try:
        from mygpt.engines.cpu.loop import run
    finally:
        config.OPT = level
    (result,) = run.overloads.values()
    code: str = result.library.get_llvm_str()
    return code.replace(result.fndesc.llvm_func_name, _SYMBOL)


def _keep(path: Path, code: bytes) -> None:
    """Write the object file whole or not at all; no cache is no error."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(code)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _link(code: bytes) -> Run:
    import llvmlite.binding as llvm

    linker = llvm.create_lljit_compiler(_target_machine())
    library = (
        llvm.JITLibraryBuilder()
        .add_object_img(code)
        .add_current_process()
        .export_symbol(_SYMBOL)
        .link(linker, "mygpt")
    )
    _alive.extend([linker, library])
    # Numba's calling convention: room for the result, room for an exception, the arguments.
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    )
    function = prototype(library[_SYMBOL])

    def run(job_address: int, thread: int) -> None:
        nothing, error = ctypes.c_void_p(), ctypes.c_void_p()
        function(ctypes.addressof(nothing), ctypes.addressof(error), job_address, thread)

    return run
