"""`mygpt warmup`: compile the decoding loop ahead of its first use."""

from __future__ import annotations

import sys
import time


def warmup() -> None:
    """Compile the decoding loop now, so that the first long text need not wait for it.

    Once after installing or upgrading is enough: the machine code is kept in the user's cache
    folder (or in the one that MYGPT_CACHE names).

    Example: mygpt warmup
    """
    from mygpt.engines.choice import compiled_engine_available
    from mygpt.errors import InputError

    if not compiled_engine_available():
        raise InputError("the compiled engine needs Numba and a POSIX system: install numba")
    from mygpt.engines.cpu.build import cache_folder, compile_now, is_compiled

    if is_compiled():
        print(f"the decoding loop is ready, in {cache_folder()}")
        return
    print("compiling the decoding loop: about ten seconds", file=sys.stderr)
    began = time.monotonic()
    compile_now()
    print(f"compiled in {time.monotonic() - began:.1f} s, kept in {cache_folder()}")
