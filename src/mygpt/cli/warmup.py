"""`mygpt warmup`: compile the machine-code kernels before their first use."""

from __future__ import annotations

import sys
import time

from mygpt.cli.terminal import say


def warmup() -> None:
    """Compile the decoding loop and the training step now, so that their first use is fast.

    Once after installing or upgrading is enough. The machine code is kept in the user's cache
    folder, or in the folder that MYGPT_CACHE names.

    Example: mygpt warmup
    """
    from mygpt.decode.choice import cpu_engine_available
    from mygpt.errors import InputError, StorageError

    if not cpu_engine_available():
        raise InputError("the machine-code engine needs Numba and a POSIX system: install numba")
    from mygpt.cpu.common.build import (
        DECODING,
        TRAINING,
        cache_folder,
        compile_now,
        has_machine_code,
        unusable_cache,
    )

    if (why := unusable_cache()) is not None:
        raise StorageError(f"machine code cannot be kept in the cache: {why}")
    for program in (DECODING, TRAINING):
        if has_machine_code(program):
            say(f"{program.purpose} is already compiled, in {cache_folder()}")
            continue
        say(f"compiling {program.purpose}: about {program.seconds} seconds", file=sys.stderr)
        began = time.monotonic()
        compile_now(program)
        seconds = time.monotonic() - began
        say(f"compiled {program.purpose} in {seconds:.1f} s, kept in {cache_folder()}")
