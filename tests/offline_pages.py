"""Helpers of the tests of offline pages: strings that inject scripts, a parser, and a browser."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip
SIZE = (1280, 900)  # of a window

# The elements of a page, the same for all data.
MARKUP = [
    "html", "head", "meta", "meta", "meta", "meta", "meta", "link", "title", "style",
    "body", "noscript", "main", "script", "script",
]  # fmt: skip

# Each shape is text that runs code if a page takes it for markup, or for a part of a script.
_SHAPES = (
    "<script>{}</script>",
    "</script><script>{}</script>",
    "</SCRIPT ><svg/onload={}>",
    "<img src=x onerror={}>",
    '<img src=x onerror="{}">',
    "<svg onload={}></svg>",
    "<svg><script>{}</script></svg>",
    '<svg><animate onbegin="{}" attributeName=x dur=1s>',
    '<body onload="{}">',
    "<iframe srcdoc='<script>parent.{}</script>'></iframe>",
    '<iframe src="javascript:{}"></iframe>',
    "<a href='javascript:{}' autofocus onfocus={}>x</a>",
    '<input autofocus onfocus="{}">',
    "<details open ontoggle={}>",
    '<video><source onerror="{}"></video>',
    '<math><mtext><img src onerror="{}"></mtext></math>',
    "<style>*{{background:url(javascript:{})}}</style>",
    "<style>@import 'javascript:{}';</style>",
    '<style onload="{}"></style>',
    "</style><script>{}</script>",
    "</title><script>{}</script>",
    "</textarea><script>{}</script>",
    "</svg><script>{}</script>",
    "</code></dd></main><script>{}</script>",
    "<!--<script>{}//",
    "--><script>{}</script>",
    "]]><script>{}</script>",
    "javascript:{}",
    '"><script>{}</script>',
    '\'><img src=x onerror="{}">',
    '" onfocus="{}" autofocus x="',
    "' onmouseover='{}' x='",
    "'-({})-'",
    "`;{};`",
    "';{};'",
    '";{};//',
    "\\u003cscript>{}</script>",
    "&lt;script&gt;{}&lt;/script&gt;",
    "{{{{constructor.constructor(`{}`)()}}}}",
    "${{{}}}",
    "\u2028{}\u2029",
    "<scr\0ipt>{}</script>",
    "<ScRiPt>{}</sCrIpT>",
    "<template><script>{}</script></template>",
    '<object data="javascript:{}"></object>',
    '<marquee onstart="{}">',
    "\u202e<script>{}</script>",
    "<meta http-equiv=refresh content='0;url=javascript:{}'>",
)
_ODD = ("__proto__", "constructor", "\x00\x1b[31m\u202e", "\ud800")
_CALLS = (
    "window.__ran=1;alert(1)", "window.__ran=1//", "window['__ran']=1", "top.__ran=1",
    "eval('window.__ran=1')",
)  # fmt: skip


def injections() -> list[str]:
    """Strings that set `window.__ran` if any part of them is interpreted as code."""
    return [*(shape.replace("{}", "window.__ran=1") for shape in _SHAPES), *_ODD]


def many_injections() -> list[str]:
    """Each shape with each way to call."""
    return [shape.replace("{}", call).replace("{{", "{") for shape in _SHAPES for call in _CALLS]


class Page(HTMLParser):
    """A parsed page: its elements in order, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.open = False  # whether text belongs to the last element
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open = True

    def handle_data(self, data: str) -> None:
        if self.open:
            place = len(self.elements) - 1
            self.texts[place] = self.texts.get(place, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.open = False

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of the elements with this tag."""
        return [
            (attrs, self.texts.get(n, ""))
            for n, (name, attrs) in enumerate(self.elements)
            if name == tag
        ]

    @property
    def data(self) -> Any:
        """The page's JSON, decoded."""
        return json.loads(next(text for attrs, text in self.of("script") if attrs))

    def check(self) -> None:
        """Check that no markup is foreign, and that the policy names the script and the style."""
        names = [name for name, _ in self.elements]
        assert names == MARKUP
        assert not [a for _, attrs in self.elements for a in attrs if a.startswith("on")]
        policy = next(
            attrs["content"] or ""
            for attrs, _ in self.of("meta")
            if attrs.get("http-equiv") == "Content-Security-Policy"
        )
        (_, data), (_, script) = self.of("script")
        ((_, style),) = self.of("style")
        assert "default-src 'none'" in policy
        assert f"script-src {digest(script)};" in policy
        assert f"style-src {digest(style)};" in policy
        assert not set("<>&\u2028\u2029") & set(data)


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class Chromium:
    """A headless Chromium that the tests of a process share, since starting one takes seconds.

    It is started when a test first needs it, and again after it has crashed.
    """

    def __init__(self) -> None:
        self._driver: Any = None
        self._profile: tempfile.TemporaryDirectory[str] | None = None

    @contextmanager
    def window(self) -> Iterator[Any]:
        """A new window: what a test sets for its window, such as a colour scheme, ends with it."""
        driver = self._running()
        outer = driver.current_window_handle
        driver.switch_to.new_window("window")
        driver.set_window_size(*SIZE)
        driver.get_log("browser")  # messages of the last page
        try:
            yield driver
            driver.close()
            driver.switch_to.window(outer)
        except BaseException:
            self.end()  # it may have crashed, or show a dialog
            raise

    def _running(self) -> Any:
        if self._driver is None:
            from selenium import webdriver
            from selenium.webdriver.chrome.service import Service

            self._profile = tempfile.TemporaryDirectory(
                prefix="mygpt-tests-", ignore_cleanup_errors=True
            )
            options = webdriver.ChromeOptions()
            for flag in (*FLAGS, f"--user-data-dir={self._profile.name}"):
                options.add_argument(flag)
            options.binary_location = CHROMIUM
            options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
            self._driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        return self._driver

    def end(self) -> None:
        """End it; the next test that needs one starts another."""
        if self._driver is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # selenium's own connections
                self._driver.quit()
                self._driver = None
                gc.collect()
        if self._profile is not None:
            self._profile.cleanup()
            self._profile = None


_SHARED = Chromium()


@contextmanager
def chromium() -> Iterator[Any]:
    """A window of the shared Chromium; skips the test where it is not installed."""
    pytest.importorskip("selenium")
    if not (os.path.exists(CHROMIUM) and os.path.exists(DRIVER)):
        pytest.skip("no chromium and chromedriver here")
    with _SHARED.window() as driver:
        yield driver


def end_chromium() -> None:
    """End the shared Chromium, if one runs."""
    _SHARED.end()


def open_page(driver: Any, page: Path) -> None:
    """Open a page from its file; check that the console is empty and no injection has run."""
    driver.get(page.resolve().as_uri())
    check_quiet(driver)


def check_shown_as_text(page: Path, clicked: str = "") -> None:
    """Open a page of `injections`: they are shown in its `main`, and none runs.

    Args:
        page: its file.
        clicked: a selector of elements, of which every fifth is clicked.
    """
    with chromium() as driver:
        open_page(driver, page)
        for element in driver.find_elements("css selector", clicked)[::5] if clicked else ():
            element.click()
        assert driver.find_elements("css selector", "main script, main iframe, main img") == []
        shown = "return document.querySelector('main').textContent.includes(arguments[0])"
        assert driver.execute_script(shown, "<img src=x onerror=window.__ran=1>")
        check_quiet(driver)


def check_quiet(driver: Any) -> None:
    assert driver.get_log("browser") == []
    assert driver.execute_script("return window.__ran === undefined")


def node() -> str:
    """The path of node; skips the test where it is not installed."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node here")
    return found
