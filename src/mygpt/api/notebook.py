"""A notebook's output that shows a training in one place.

What a model or a file says is text: it is escaped, and there is no script.
"""

from __future__ import annotations

import time
from html import escape
from typing import Any

from mygpt.api.messages import in_python
from mygpt.training.events import Event, Finished, Note, Started, StepDone
from mygpt.views.live import LiveReport

_EVERY_S = 0.5  # between two changes of the output that are only of a step
_MOST_NOTES = 3
_LONGEST_SAMPLE = 600  # characters
_WIDTH, _HEIGHT = 600, 150  # of the curve, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 20  # for the labels


class NotebookDisplay:
    """A listener that shows a training in one output, which changes in place.

    It is a context; at its end the output has its last state.
    """

    def __init__(self) -> None:
        self._report = LiveReport()
        self._started: Started | None = None
        self._step: StepDone | None = None
        self._finished: Finished | None = None
        self._notes: list[str] = []
        self._handle: Any = None
        self._shown_s = 0.0

    def __enter__(self) -> NotebookDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        if self._started is not None and self._finished is None:
            self._report.stop()
            self._show()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._report.add(event)
        if isinstance(event, Note):
            self._notes.append(event.text)
        elif isinstance(event, Started):
            self._started = event
        elif isinstance(event, StepDone):
            self._step = event
        elif isinstance(event, Finished):
            self._finished = event
        if not isinstance(event, StepDone) or time.monotonic() - self._shown_s >= _EVERY_S:
            self._show()

    def _show(self) -> None:
        """Put the present state into the output, which the first call makes."""
        from IPython.display import display

        self._shown_s = time.monotonic()
        data = self._report.data()
        bundle = {"text/html": self._html(data), "text/plain": data["progress"]}
        if self._handle is None:
            show: Any = display  # IPython has no types for it
            self._handle = show(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def _html(self, data: dict[str, Any]) -> str:
        parts = [f"<div><strong>{escape(data['progress'])}</strong></div>", self._bar()]
        parts += [_small(f"{name}: {value}") for name, value in data["facts"][:3]]
        parts.append(_curve(data["curves"]))
        if data["samples"]:
            last = data["samples"][-1]
            parts += [_small(f"sample at step {last['step']:,}"), _text(last["text"])]
        parts += [_small(note) for note in self._notes[-_MOST_NOTES:]]
        if self._finished is not None:
            parts.append(_text(in_python(str(self._finished))))
        return f'<div style="max-width: {_WIDTH}px">{"".join(parts)}</div>'

    def _bar(self) -> str:
        started, step, done = self._started, self._step, self._finished is not None
        share = float(done)
        if started is not None and step is not None and not done:
            total_s = step.elapsed_s + step.remaining_s
            if started.total_steps:
                share = step.step / started.total_steps
            elif total_s:
                share = step.elapsed_s / total_s
        return (
            f'<progress value="{share:.4f}" max="1" style="width: 100%" '
            f'aria-label="training">{share:.0%}</progress>'
        )


def _small(text: str) -> str:
    return f'<div style="font-size: 85%">{escape(text)}</div>'


def _text(text: str) -> str:
    shown = text.strip()[:_LONGEST_SAMPLE] if len(text) > 2 * _LONGEST_SAMPLE else text.strip()
    style = "white-space: pre-wrap; font-family: monospace; font-size: 85%; margin: 0.5em 0"
    return f'<pre style="{style}">{escape(shown)}</pre>'


def _curve(curves: dict[str, Any]) -> str:
    """Training loss as a line and validation losses as dots, by step, as SVG; empty without any."""
    training = [(step, loss) for step, _, loss in curves["training"]]
    validation = [(step, loss) for step, _, loss in curves["validation"]]
    points = training + validation
    if len(points) < 2:
        return ""
    last = max(step for step, _ in points) or 1
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    height = (high - low) or 1.0

    def place(step: int, loss: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last
        return x, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / height

    line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in training)
    dots = "".join(
        '<circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="#d9730d"/>'.format(*place(*point))
        for point in validation
    )
    labels = "".join(
        f'<text x="{x}" y="{y}" text-anchor="end" font-size="11" fill="currentColor">{text}</text>'
        for x, y, text in (
            (_LEFT - 4, _TOP + 8, f"{high:.2f}"),
            (_LEFT - 4, _HEIGHT - _BOTTOM, f"{low:.2f}"),
            (_WIDTH - _RIGHT, _HEIGHT - 4, f"step {last:,}; line: training, dots: validation"),
        )
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" '
        f'aria-label="losses in nats per token, from {high:.2f} to {low:.2f}">'
        f'<polyline points="{line}" fill="none" stroke="#2a78b8" stroke-width="1.5"/>'
        f"{dots}{labels}</svg>"
    )
