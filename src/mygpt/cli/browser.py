"""Open pages in the user's browser."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser


def has_browser() -> bool:
    """Whether a browser has a display; a browser for the terminal would take the terminal over."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, names))


def open_page(url: str) -> None:
    """Open a page in the browser, in a thread: starting one takes time."""
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
