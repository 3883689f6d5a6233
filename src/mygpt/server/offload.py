"""Calls in a thread, so that they do not block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mygpt.server.problems import busy


class Offload:
    """One thread that makes calls in the order in which they are submitted.

    Args:
        name: the thread's name.
        max_waiting: how many calls may wait; None is no limit.
    """

    def __init__(self, name: str, max_waiting: int | None = None) -> None:
        self._max_waiting, self._waiting = max_waiting, 0
        self._thread = ThreadPoolExecutor(1, name)

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` in the thread and return its result; a cancelled waiting call is dropped.

        Raises:
            ApiError: 429 if too many calls wait.
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
        """Drop waiting calls, and take no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
