"""`mygpt train --open`: the page follows a training, and the training does not wait for it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from event_streams import (
    LIMIT_S,
    evaluated,
    finished,
    made_up,
    started,
    step,
    updates_of,
)
from mygpt import training
from mygpt.cli import live
from mygpt.cli.live import LivePage
from mygpt.server import live as live_server
from mygpt.server.live import Updates
from mygpt.training.events import Evaluated, Event, Note, Started
from offline_pages import check_quiet, chromium, injections
from paths import SOURCES
from shell import Shell
from training_runs import TEXT, TINY

ORDER = "return [...document.querySelectorAll('main section')].map((one) => one.id)"


def ignore(event: Event) -> None:
    """A listener."""


@pytest.fixture(autouse=True)
def opened(monkeypatch) -> Iterator[list[str]]:
    """The pages that were opened in the browser, of which there seems to be none."""
    found: list[str] = []
    monkeypatch.setattr(webbrowser, "open", found.append)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    return found


def until(true: Callable[[], Any], seconds: float = LIMIT_S) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def validated(data: dict[str, Any]) -> list[int]:
    """The steps of the validations of an update."""
    return [point[0] for point in data["curves"]["validation"]]


@pytest.mark.kernels
@pytest.mark.slow
def test_a_training_is_followed_from_its_first_step_to_its_end(tmp_path):
    """The listener waits for the reader here, so that it reads each validation."""
    (tmp_path / "times.txt").write_text(TEXT)
    read: list[tuple[str, dict[str, Any]]] = []
    readers: list[threading.Thread] = []

    def follow() -> None:
        with updates_of(page.url) as updates:
            read.extend(updates)

    def listener(event: Event) -> None:
        if isinstance(event, Note) and page.url in event.text:
            readers.append(threading.Thread(target=follow))
            readers[0].start()
            until(lambda: read)
        if isinstance(event, Evaluated):
            until(lambda: event.step in validated(read[-1][1]))

    with LivePage(listener) as page:
        options = TINY | {"output": tmp_path / "run", "sample_tokens": 20}
        training.train(str(tmp_path / "times.txt"), listener=page, **options)
        page.complete({"name": "complete"})
    readers[0].join(LIMIT_S)
    assert read[0][1]["curves"]["training"] == []
    assert {name for name, _ in read[:-1]} == {"message"}
    assert read[-1] == ("end", {"name": "complete", "live": live.COMPLETE})
    assert validated(read[-2][1]) == [4, 8, 12]


@pytest.mark.slow
def test_updates_between_validations_come_once_a_second():
    with LivePage(ignore) as page, updates_of(page.url) as updates:
        next(updates)
        page(started())
        next(updates)
        began = time.monotonic()
        for number in range(1, 50):
            page(step(number))
        _, data = next(updates)
        assert time.monotonic() - began > 0.5
        assert data["curves"]["training"][-1][0] == 49
        page(evaluated(50))
        began = time.monotonic()
        _, data = next(updates)
        assert time.monotonic() - began < 5.0
        assert data["curves"]["validation"][-1][0] == 50


def test_without_a_reader_no_update_is_made(monkeypatch):
    monkeypatch.setattr(LivePage, "_publish", None)
    with LivePage(ignore) as page:
        for event in made_up(30):
            page(event)
        until(lambda: not page._queue)


def test_a_reader_that_does_not_read_does_not_delay_training(monkeypatch):
    """What is sent to it blocks for ever, so whoever waited for it would not end.

    And no update is made in training's own thread.
    """
    makers, make = set(), LivePage._publish

    def recorded(page: LivePage) -> float:
        makers.add(threading.get_ident())
        return make(page)

    monkeypatch.setattr(LivePage, "_publish", recorded)
    monkeypatch.setattr(live_server.Handler, "timeout", None)
    page = LivePage(ignore)

    def train() -> None:
        with page:
            until(lambda: page._server.updates.readers)
            for event in made_up(2000, "x" * 2000):
                page(event)

    training_thread = threading.Thread(target=train, daemon=True)
    with connection_without_buffers(page) as stuck:
        stuck.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        training_thread.start()
        training_thread.join(LIMIT_S)
        assert not training_thread.is_alive()
        assert page._server.updates.readers == 1, "it has not received the last update"
    assert makers
    assert training_thread.ident not in makers


def connection_without_buffers(page: LivePage) -> socket.socket:
    """A connection whose sender is blocked by a few kilobytes that are not read."""
    page._server._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", int(page.url.rpartition(":")[2])))
    return reader


def test_an_error_ends_the_page():
    page = LivePage(ignore)

    def train() -> None:
        with contextlib.suppress(MemoryError), page:
            for event in made_up(20):
                page(event)
            until(lambda: page._server.updates.readers)
            raise MemoryError

    thread = threading.Thread(target=train)
    thread.start()
    with updates_of(page.url) as updates:
        name, data = list(updates)[-1]
    thread.join(LIMIT_S)
    assert (name, data["standing"]) == ("end", "interrupted")
    assert data["progress"] == "Interrupted after step 20"


def test_the_address_is_reported_when_the_steps_begin_and_opened_where_there_is_a_display(
    monkeypatch, opened
):
    """A command that is refused before opens nothing."""
    for display, count in ((None, 0), (":0", 1)):
        if display:
            monkeypatch.setenv("DISPLAY", display)
        heard: list[Event] = []
        with LivePage(heard.append) as page:
            page(Note("a note"))
            assert (len(heard), opened) == (1, [])
            page(started())
        assert isinstance(heard[1], Started)
        assert str(heard[2]) == f"note: the report, while the training runs: {page.url}"
        until(lambda count=count: len(opened) == count)
    assert opened == [page.url]


def test_a_dry_run_has_no_page(capsys):
    message = Shell(capsys, "train").refused("--dry-run", "--open")
    assert message == "mygpt: --dry-run trains nothing that could be shown: omit --open\n"


@pytest.mark.processes
@pytest.mark.parametrize("ends", ["by itself", "by a signal"])
def test_the_command_shows_the_complete_report_or_that_it_was_interrupted(tmp_path, ends):
    (tmp_path / "times.txt").write_text(TEXT)
    steps = "300" if ends == "by itself" else "1000000"
    options = ["--preset", "nano", "--embed-dim", "16", "--max-seq-len", "16", "--batch-size", "4",
               "--num-layers", "1", "--num-heads", "1", "--eval-every", "100", "-o", "run",
               "--print-every", "1000", "--steps", steps, "--open"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "mygpt", "train", "times.txt", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if "DISPLAY" not in k and k != "BROWSER"}
        | {"PYTHONPATH": str(SOURCES)},
    )
    try:
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            found = re.search(r"while the training runs: (http://127\.0\.0\.1:\d+)$", line.rstrip())
        with updates_of(found[1]) as updates:
            assert next(updates)[1]["name"] == "run"
            if ends == "by a signal":
                process.send_signal(signal.SIGINT)
            name, data = list(updates)[-1]
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (name, err) == ("end", "")
    if ends == "by a signal":
        assert process.returncode == 128 + signal.SIGINT
        assert data["standing"] == "interrupted"
        assert "resume with: mygpt train --resume run" in out
    else:
        assert process.returncode == 0
        assert (data["standing"], data["live"]) == ("done", live.COMPLETE)
        assert "this model" in [row[0] for row in data["table"]]
        assert "report: run/report.html" in out.replace(os.sep, "/")


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.browser
def test_the_page_grows_and_becomes_the_complete_report():
    """The chosen axis and the focus stay; sections come in the order of a report."""
    with chromium() as driver, LivePage(ignore) as page:

        def find(selector: str):
            return driver.find_element("css selector", selector)

        def points(kind: str) -> int:
            path = driver.find_elements("css selector", f".curve-{kind}")
            return path[0].get_attribute("d").count(" ") if path else 0

        def text(words: str) -> bool:
            return words in find("main").text

        driver.get(page.url)
        until(lambda: text("In preparation: text, model and recipe."))
        for event in made_up(15):
            page(event)
        until(lambda: points("training") == 15 and points("validation") == 1)
        assert text("This page is updated while the training runs.")
        keys = [key.text for key in driver.find_elements("css selector", ".curves-key > .key")]
        assert keys == ["training", "validation", "best 2.0549"]
        assert driver.execute_script(ORDER) == ["curves", "pace", "samples"]
        find("[data-axis=seconds]").click()
        for number in range(16, 31):
            page(step(number))
        page(evaluated(30))
        until(lambda: points("training") == 30 and points("validation") == 2)
        assert find("[data-axis=seconds]").get_attribute("aria-pressed") == "true"
        focused = "return document.activeElement.dataset.axis"
        assert driver.execute_script(focused) == "seconds"
        assert find("#curves .readout").text.startswith("So far: training")
        page(finished(30))
        until(lambda: text("its complete report is being written."))
        data = page._report.data() | {"table": [["this model", 3.0, 2.0], ["unigram", 4.0, 3.1]]}
        page.complete(data | {"plan": [["seed", "0"]], "notes": ["a note"]})
        until(lambda: text("This is its complete report"))
        order = ["curves", "table", "pace", "samples", "plan", "notes"]
        assert driver.execute_script(ORDER) == order
        assert find("#curves .readout").text.startswith("At the end: training")
        check_quiet(driver)


@pytest.mark.browser
def test_texts_stay_texts_and_a_lost_connection_is_shown(monkeypatch):
    hostile = "".join(injections())
    with chromium() as driver, LivePage(ignore) as page:
        driver.get(page.url)
        page(started(Path("runs") / "<img src=x onerror=window.__ran=1>", corpus=hostile))
        for event in made_up(10, hostile)[1:]:
            page(event)
        shown = "return document.querySelector('#samples')?.textContent.includes(arguments[0])"
        until(lambda: driver.execute_script(shown, "<img src=x onerror=window.__ran=1>"))
        assert driver.find_elements("css selector", "main script, main iframe, main img") == []
        check_quiet(driver)

        def fail(*_: object) -> None:
            raise ConnectionError

        page._server._stop()  # no new connection, and the one that is open ends
        monkeypatch.setattr(Updates, "after", fail)
        page(evaluated(20))
        words = "return document.querySelector('.live').textContent"
        lost = "The connection to the training is lost."
        until(lambda: driver.execute_script(words).startswith(lost))
        assert len(driver.find_elements("css selector", "#curves .curve")) == 2
