"""The page in a real browser, while its server stops, goes and comes back."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, Page

from tests.serve.browsers import PATIENCE, chromium

pytestmark = pytest.mark.campaign
LOADED = "() => Array.from(document.querySelectorAll('#kj-result .kj-frame img')).every((one) => one.naturalWidth > 8)"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@dataclass
class Command:
    """`kandinsky-jax serve`, as a process."""

    process: subprocess.Popen[str]
    url: str


@contextlib.contextmanager
def command(port: int = 0) -> Iterator[Command]:
    """Run the command with its page."""
    line = [sys.executable, "-m", "kandinsky_jax.cli", "serve", "--model", "tiny", "--batch-size", "1"]
    with subprocess.Popen([*line, "--port", str(port)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert address is not None
            assert any(line.startswith("ready: ") for line in process.stdout)  # before it, what is compiled
            yield Command(process, address[0])
        finally:
            process.kill()


@contextlib.contextmanager
def opened(browser: Browser, url: str, pictures: int, steps: int) -> Iterator[Page]:
    """Open the page, with its settings filled in."""
    page = browser.new_context(reduced_motion="reduce").new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.locator(".kj-restore").wait_for()
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_role("button", name="More settings").click()
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.locator("input[type=number][aria-label*='Pictures']").fill(str(pictures))
    try:
        yield page
    finally:
        page.context.close()


def test_a_server_that_stops_finishes_what_a_page_has_running_and_shows_it(browser):
    with command() as server, opened(browser, server.url, 10, 200) as page, opened(browser, server.url, 1, 2) as other:
        page.locator(".kj-generate:visible").click()
        page.get_by_text("of 200").first.wait_for()
        server.process.send_signal(signal.SIGTERM)
        page.get_by_text("The server is stopping. It finishes what runs").wait_for()
        other.locator(".kj-generate:visible").click()
        other.locator("#kj-result").get_by_text("The server is stopping.").wait_for()
        assert not other.get_by_text("currently busy").count()
        page.get_by_text("10 pictures in").wait_for()
        page.wait_for_function(LOADED)
        assert page.locator(".kj-thumb").count() == 10
        assert server.process.wait(30) == 0
        page.get_by_text("The connection to the server is lost").wait_for()
        assert page.evaluate(LOADED)
        page.wait_for_function(LOADED.replace("#kj-result .kj-frame", ".kj-thumb"))


def test_the_page_says_that_its_server_is_gone(browser):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with contextlib.ExitStack() as servers:
        server = servers.enter_context(command(port))
        page = servers.enter_context(opened(browser, server.url, 4, 200))
        page.get_by_label("Seed", exact=True).fill("77")
        page.locator(".kj-generate:visible").click()
        page.get_by_text("of 200").first.wait_for()
        server.process.kill()
        page.get_by_text("The connection to the server is lost").wait_for()
        page.locator("#kj-result [data-running=false]").wait_for()
        assert "The connection was lost." in page.inner_text("#kj-result")
        page.locator(".kj-generate:visible").click()
        assert not page.get_by_text("errored out").count()
        servers.enter_context(command(port))
        page.get_by_text("The connection to the server was lost. What ran then is lost").wait_for()
        page.get_by_label("Prompt", exact=True).fill("a red circle")
        page.get_by_role("button", name="More settings").click()
        page.get_by_label("Steps", exact=True).fill("2")
        page.locator(".kj-generate:visible").click()
        page.get_by_text("picture in").or_(page.get_by_text("pictures in")).first.wait_for()
