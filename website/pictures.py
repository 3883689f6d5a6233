"""The README's pictures, from the real programs: a training in a terminal, its model in a browser.

`make pictures` runs `mygpt demo` in a terminal of 96 columns and keeps its screen at three quarters
of the time, then serves the model with `mygpt serve` and takes screenshots of the playground.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
RUN = "build/pictures/demo"
COLUMNS, ROWS = 96, 30
MINUTES = 2
_MYGPT = [sys.executable, "-m", "mygpt"]
_BROWSER = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
_SIZES = {"playground.png": (1200, 760), "playground-narrow.png": (400, 800)}


def main() -> None:
    """Write all pictures into docs/pictures/."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "training.svg").write_text(drawn(training_screen()), encoding="utf-8")
    take_screenshots()
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")


def training_screen() -> pyte.Screen:
    """Run `mygpt demo` to its end; its screen as it was at three quarters of the time."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    command = ["demo", "--minutes", str(MINUTES), "--output", RUN, "--overwrite"]
    stream.feed(f"$ mygpt demo --minutes {MINUTES}\r\n".encode())
    terminal_size = {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    began = time.monotonic()
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe(_MYGPT[0], [*_MYGPT, *command], {**os.environ, **terminal_size})
    while data := read(terminal):
        if time.monotonic() - began < 0.75 * MINUTES * 60:
            stream.feed(data)
    if os.waitpid(process, 0)[1] != 0:
        raise SystemExit("mygpt demo failed: run it in a terminal to see why")
    return screen


def read(terminal: int) -> bytes:
    """What the program has printed; empty at its end, which Linux reports as an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def drawn(screen: pyte.Screen) -> str:
    """A screen as SVG; the fonts are the reader's, since a picture must load nothing."""
    text = Text(no_wrap=True, overflow="crop")
    for row in range(ROWS):
        for column in range(COLUMNS):
            char = screen.buffer[row][column]
            text.append(char.data, Style(color=color_of(char.fg), bold=char.bold))
        text.append("\n")
    text.rstrip()
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(text)
    svg = console.export_svg(title="mygpt demo", unique_id="training")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    # With its size in the file, no page shows it smaller than its text is readable.
    return re.sub(r'(viewBox="0 0 (\S+) (\S+)")', r'width="\2" height="\3" \1', svg, count=1)


def color_of(name: str) -> str | None:
    """Rich's name of pyte's colour, which is a name or six hexadecimal digits."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    name = name.replace("brown", "yellow")
    return name.replace("bright", "bright_")


def take_screenshots() -> None:
    """Let the model of the demo write 40 tokens on its page, and take pictures in two sizes."""
    command = [*_MYGPT, "serve", RUN, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE) as server:
        try:
            found = (re.search(rb"http://[\d.:]+", line) for line in server.stdout)
            url = next(match[0].decode() for match in found if match)
            for name, size in _SIZES.items():
                take_screenshot(url, FOLDER / name, size)
        finally:
            server.terminate()


def take_screenshot(url: str, path: Path, size: tuple[int, int]) -> None:
    """The page of `url`, light, after a prompt and a run of 40 tokens."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    service = webdriver.ChromeService(shutil.which("chromedriver"))  # else one is looked up online
    for argument in _BROWSER:
        options.add_argument(argument)
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get(url)
        wait = WebDriverWait(browser, 60)
        prompt = browser.find_element(By.ID, "prompt")
        wait.until(lambda _: prompt.is_displayed())  # once the model is known
        prompt.send_keys("A list is")
        browser.find_element(By.ID, "run").click()
        written = "#columns .token:not(.is-prompt)"
        wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, written)) == 40)
        wait.until(lambda _: browser.find_element(By.ID, "run").text == "Run")
        browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
        browser.save_screenshot(str(path))


if __name__ == "__main__":
    main()
