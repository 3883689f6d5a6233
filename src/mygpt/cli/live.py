"""`mygpt train --open`: the report of a training as a page, while it grows."""

from __future__ import annotations

import threading
import time
from collections import deque
from types import TracebackType
from typing import Any

from mygpt.cli.browser import has_browser, open_page
from mygpt.server.live import LiveServer
from mygpt.server.problems import to_json
from mygpt.training.events import Evaluated, Event, Finished, Listener, Note, Sampled, Started
from mygpt.views.live import COMPLETE, LiveReport
from mygpt.views.page import served_files

_EVERY_S = 1.0  # between two updates, unless one of these events comes
_SOON = (Started, Evaluated, Sampled, Finished)
# The most time of one core that making updates may take, as a fraction: after an update that took
# t seconds, the next one is made t / _MOST_WORK later or more.
_MOST_WORK = 0.004
_MAKING_S, _SENDING_S = 3.0, 1.0  # the limits of making and of sending the last update


class LivePage:
    """A listener for training's events that shows them on a page.

    Training only appends events to a queue. A daemon thread makes updates of them, if the page has
    a reader, so nothing that happens to a reader delays training. Steps do not wake that thread,
    since each switch of threads takes time.

    Args:
        listener: called with every event too, and with a note that has the address.

    Raises:
        InputError: if no page can be served on this machine.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._report = LiveReport()
        # Events; None for a new reader; the complete report. An empty report is an end without it.
        self._queue: deque[Event | dict[str, Any] | None] = deque()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._server = LiveServer(
            served_files("pages/live.js", title="mygpt train"), lambda: self._put(None)
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.url = self._server.url

    def __enter__(self) -> LivePage:
        self._thread.start()
        return self

    def __call__(self, event: Event) -> None:
        """Show one event; when the steps begin, report the address, and open it in a browser."""
        self._put(event)
        self._listener(event)
        if isinstance(event, Started):
            self._listener(Note(f"the report, while the training runs: {self.url}"))
            if has_browser():
                open_page(self.url)

    def complete(self, data: dict[str, Any]) -> None:
        """Show the run's complete report, the data of `views/report.py`, as the last update."""
        self._end({**data, "live": COMPLETE})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._end({})
        self._thread.join(_MAKING_S)
        self._server.close(_SENDING_S)

    def _put(self, item: Event | None) -> None:
        self._queue.append(item)
        if item is None or isinstance(item, _SOON):
            self._wake.set()

    def _end(self, data: dict[str, Any]) -> None:
        self._queue.append(data)
        self._ended.set()
        self._wake.set()

    def _run(self) -> None:
        """The thread: make updates until the end."""
        changed = False
        while True:
            self._wake.wait(_EVERY_S)
            self._wake.clear()
            while self._queue:
                item = self._queue.popleft()
                if isinstance(item, dict):
                    self._publish_last(item)
                    return
                if item is not None:
                    self._report.add(item)
                changed = True
            if changed and self._server.updates.readers:
                changed = False
                self._ended.wait(self._publish())

    def _publish(self) -> float:
        """Publish an update; return how many seconds the next one has to wait."""
        began = time.thread_time()
        self._server.updates.publish(to_json(self._report.data()))
        return (time.thread_time() - began) / _MOST_WORK

    def _publish_last(self, data: dict[str, Any]) -> None:
        """Publish the complete report, or what there is of an incomplete one."""
        if not data:
            self._report.stop()
        self._server.updates.publish(to_json(data or self._report.data()), last=True)
