"""Reading the updates of a training's page, and events of a training that is made up."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mygpt.evaluation.losses import Evaluation
from mygpt.training.events import Evaluated, Event, Finished, Sampled, Started, StepDone

LIMIT_S = 20.0


@contextmanager
def updates_of(url: str) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
    """The updates of a page: (event's name, data) until the stream ends."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LIMIT_S)
    connection.request("GET", "/events")
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["content-type"] == "text/event-stream"
    try:
        yield _events(response)
    finally:
        response.close()
        connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    name = "message"
    for line in response:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)
            name = "message"


def started(run: Path = Path("runs/poems"), **fields: Any) -> Started:
    known: dict[str, Any] = {
        "run": run, "step": 0, "parameters": 12345, "corpus": "poems", "train_tokens": 9000,
        "val_tokens": 1000, "tokenizer": "char", "vocab_size": 50, "windows": (16,),
        "uniform": math.log(50), "unigram": 3.1, "device": "cpu", "total_steps": 1000,
        "budget_s": None,
    }  # fmt: skip
    return Started(**(known | fields))


def step(number: int) -> StepDone:
    return StepDone(number, 4 / number**0.3, 0.01, 64 * number, 0.5 * number, 128.0, 60.0)


def evaluated(number: int) -> Evaluated:
    loss = 4.1 / number**0.3
    return Evaluated(number, Evaluation(loss, 999, loss / math.log(2)), True, 0.5 * number)


def finished(number: int, run: Path = Path("runs/poems"), signal: int | None = None) -> Finished:
    return Finished(
        run, run / "best.safetensors", number, 2.0, 2.1, number, 3.9, 3.1, 0.5 * number, signal,
        verdict="the loss has stopped falling",
    )  # fmt: skip


def made_up(steps: int, text: str = "a sample") -> list[Event]:
    """Reports of each step, a validation and a sample at every tenth."""
    events: list[Event] = [started()]
    for number in range(1, steps + 1):
        events.append(step(number))
        if number % 10 == 0:
            events += [evaluated(number), Sampled(number, text)]
    return events
