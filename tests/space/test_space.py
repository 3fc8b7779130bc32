"""The Space in headless Chromium: a document is read, questions are answered, and what is shown is what happened.

`make test-space` installs what this needs. With HF_SPARSE_CACHE_PICTURES=docs/pictures it keeps the screenshots.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("gradio", reason="make test-space installs it")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-space installs it")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PICTURES = os.environ.get("HF_SPARSE_CACHE_PICTURES")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The app as a process of its own."""
    port = free_port()
    own = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    app = subprocess.Popen([sys.executable, str(ROOT / "examples" / "space" / "app.py")], env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert app.poll() is None, "the app ended"
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        app.terminate()
        app.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(**({"executable_path": CHROMIUM} if CHROMIUM else {}))
        yield chromium
        chromium.close()


class Page:
    """The Space as a visitor sees it."""

    def __init__(self, browser: Any, address: str, width: int) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.failed: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.failed.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_function(
            "document.querySelector('#document textarea')?.value.length > 1000", timeout=60_000
        )

    def ask(self, question: str | None = None) -> list[str]:
        """Ask, and give the newest row of the table."""
        before = len(self.rows())
        if question is not None:
            box = self.page.locator("#question input")
            box.fill(question)
            box.press("Enter")
        self.page.locator("#ask").click()
        for _ in range(600):
            if len(self.rows()) > before:
                return self.rows()[0]
            self.page.wait_for_timeout(100)
        raise AssertionError("no answer came")

    def rows(self) -> list[list[str]]:
        found: list[list[str]] = self.page.evaluate(
            "[...document.querySelectorAll('#rows tr')].map(r => [...r.querySelectorAll('td')]"
            ".map(c => c.innerText.trim())).filter(r => r.length)"
        )
        return found

    def text(self, name: str) -> str:
        text: str = self.page.locator(f"#{name}").inner_text()
        return text

    def keep(self, name: str) -> None:
        if PICTURES:
            Path(PICTURES).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)


def test_a_visitor_reads_and_asks(address: str, browser: Any) -> None:
    seen = Page(browser, address, 880)
    first = seen.ask()
    assert first[3] == "right" and first[4] == "0"
    rooms = re.findall(r"The code of room (\d+) is", seen.page.locator("#document textarea").input_value())
    others = [f"The code of room {room} is" for room in dict.fromkeys(rooms)]
    rows = [seen.ask(question) for question in others[:4]]
    assert sum(row[3] == "right" for row in rows) >= 3
    last = rows[-1]
    resumed, computed = (int(figure.replace(",", "")) for figure in last[4:6])
    assert resumed > 1000 and computed < 64 and last[1] == last[2]
    assert float(last[8].rstrip("×")) > 2
    assert "with the cache" in seen.text("times") and "checkpoint at" in seen.text("tree")
    assert "would be resumed" in seen.text("reuse")
    seen.keep("space")
    assert seen.failed == []
    assert [url for url in seen.asked if not url.startswith((address, "data:", "blob:"))] == []


def test_less_memory_leaves_less_and_forgetting_leaves_nothing(address: str, browser: Any) -> None:
    seen = Page(browser, address, 480)
    seen.ask()
    held = seen.text("tree").count("checkpoint at")
    slider = seen.page.locator("#memory input[type=number]")
    slider.fill("64")
    slider.press("Enter")
    seen.page.locator("#memory input[type=range]").dispatch_event("pointerup")
    for _ in range(100):
        if seen.text("tree").count("checkpoint at") < held:
            break
        seen.page.wait_for_timeout(100)
    assert seen.text("tree").count("checkpoint at") < held
    seen.page.locator("#forget").click()
    seen.page.wait_for_function("document.querySelector('#tree').innerText.includes('Nothing is stored')")
    assert seen.rows() == []
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 480


def test_visitors_share_nothing_and_strange_words_are_refused(address: str, browser: Any) -> None:
    one, other = Page(browser, address, 880), Page(browser, address, 880)
    one.ask()
    assert other.ask()[4] == "0"  # the same document, but the other's own first question
    one.page.locator("#document textarea").fill("A philosopher walks into the mill. " * 20)
    one.page.locator("#ask").click()
    one.page.get_by_text("are not in the vocabulary").first.wait_for(timeout=30_000)
