"""Calls in a thread beside the event loop, which must not be held up by any of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mygpt.server.problems import busy


class Offload:
    """One thread; its calls are made in the order in which they are asked for.

    Args:
        name: the thread's.
        max_waiting: how many calls may wait; None where something else limits them.
    """

    def __init__(self, name: str, max_waiting: int | None = None) -> None:
        self._max_waiting, self._waiting = max_waiting, 0
        self._thread = ThreadPoolExecutor(1, name)

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` returns; a cancelled call that has not begun is never made.

        Raises:
            ApiError: 429 when too many wait.
        """
        if self._max_waiting is not None and self._waiting >= self._max_waiting:
            raise busy(self._waiting)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, function, *args)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Make no more calls."""
        self._thread.shutdown(wait=False, cancel_futures=True)
