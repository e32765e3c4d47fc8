"""A server with its page, and a browser that uses it."""

from __future__ import annotations

import base64
import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from kandinsky_jax.serve import api
from kandinsky_jax.serve.page import mount_page
from kandinsky_jax.serve.page.context import PageContext
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service
from tests.serve.servers import tiny

PATIENCE = 60_000  # ms until what is waited for is given up


@dataclass(frozen=True)
class Site:
    """A server with its page."""

    url: str
    service: Service
    context: PageContext
    blocks: gr.Blocks


@contextlib.contextmanager
def site(generates: bool = True, **given: Any) -> Iterator[Site]:
    """Run a server with its page; without `generates` its requests wait for ever."""
    api.no_telemetry()
    settings = ServerSettings(**({"port": 0, "batch_sizes": (1,), "grace": 1.0} | given))
    service = Service(tiny(), settings)
    app = api.make_app(service, settings, mount_page)
    if generates:
        service.start()
    with api.ServerThread(service, settings, app) as thread:
        yield Site(thread.url, service, app.state.page, app.state.blocks)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run Debian's Chromium."""
    path = shutil.which("chromium")
    assert path is not None, "there is no chromium; apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """A tab of the browser that shows the page, and what it should not have done."""

    page: Page
    site: Site
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def tab(self, title: str) -> None:
        """Show a tab of the page."""
        self.page.get_by_role("tab", name=title, exact=True).click()
        self.page.locator(".kj-generate:visible").wait_for()

    def settings(self, **values: str) -> None:
        """Fill in settings, by parts of their element's label."""
        more = self.page.get_by_role("button", name="More settings")
        if not self.page.get_by_label("Negative prompt").is_visible():
            more.click()
        for label, value in values.items():
            self.page.get_by_label(label.replace("_", " "), exact=True).fill(value)

    def few_steps(self) -> None:
        """Ask for few steps."""
        self.settings(Steps="2", Prior_steps="2")

    def prompt(self, text: str) -> None:
        """Fill in the prompt."""
        self.page.get_by_label("Prompt", exact=True).fill(text)

    def generate(self, count: int = 1) -> list[str]:
        """Press "Generate"; return the addresses of the pictures that appear."""
        before = self.newest()
        self.page.evaluate("document.querySelectorAll('.kj-error').forEach((one) => (one.dataset.old = 'true'))")
        self.page.locator(".kj-generate:visible").click()
        return self.finished(before, count)

    def newest(self) -> int:
        """The number of the newest picture in the gallery, 0 without one."""
        thumbs = self.page.locator(".kj-thumb")
        return int(thumbs.first.get_attribute("data-number") or 0) if thumbs.count() else 0

    def finished(self, before: int, count: int = 1) -> list[str]:
        """Wait until there are more pictures than before; return their addresses, the newest last."""
        wanted = f".kj-thumb[data-number='{before + count}']"
        errors = self.page.locator("#kj-result .kj-error:not([data-old])")
        self.page.locator(wanted).or_(errors).first.wait_for(timeout=PATIENCE)
        assert not errors.count(), errors.first.inner_text()
        frames = self.page.locator("#kj-result [data-running=false] .kj-frame img")
        frames.first.wait_for(timeout=PATIENCE)
        return [str(frame.get_attribute("src")) for frame in frames.all()]

    def fetch(self, address: str) -> bytes:
        """Fetch something of the page."""
        return self.page.request.get(f"{self.site.url}/ui/{address}").body()

    def drop(self, selector: str, data: bytes, name: str = "picture.png") -> None:
        """Drop a file on an element."""
        transfer = self.page.evaluate_handle(
            """([text, name]) => {
                const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], name, {type: "image/png"}));
                return transfer;
            }""",
            [base64.b64encode(data).decode(), name],
        )
        self.page.dispatch_event(selector, "drop", {"dataTransfer": transfer})


@contextlib.contextmanager
def visit(browser: Browser, server: Site, **given: Any) -> Iterator[Visit]:
    """Open the page; at the end nothing is in its console, and no request has left for elsewhere."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | given))
    page = context.new_page()
    page.set_default_timeout(40_000)  # beside other tests, programs may still be compiled
    found = Visit(page, server)
    page.on("console", lambda message: found.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.faults.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(f"{server.url}/")
    page.wait_for_function("() => window.kandinskyPage !== undefined", timeout=PATIENCE)
    page.locator(".kj-generate:visible").wait_for(timeout=PATIENCE)
    page.locator(".kj-restore").wait_for(timeout=PATIENCE)
    try:
        yield found
        assert not found.faults, found.faults
        own = (f"{server.url}/", "data:", f"blob:{server.url}/")
        assert [url for url in found.requests if not url.startswith(own)] == []
    finally:
        context.close()


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            pytest.fail(f"it did not come about in {seconds:g} seconds")
        time.sleep(0.02)
