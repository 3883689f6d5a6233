"""What `mygpt.train` shows where the program passes no listener: lines, or a notebook's output."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

from mygpt.api.messages import in_python
from mygpt.training.events import Event, Listener, Sampled


def default_display() -> AbstractContextManager[Listener]:
    """The listener of this place."""
    if not in_notebook():
        return nullcontext(print_event)
    from mygpt.api.notebook import NotebookDisplay

    return NotebookDisplay()


def in_notebook() -> bool:
    """Whether this runs in a notebook's kernel, which shows HTML."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


def print_event(event: Event) -> None:
    """Print an event as `mygpt train` does where its output is not a terminal."""
    print(event if isinstance(event, Sampled) else in_python(str(event)), flush=True)
