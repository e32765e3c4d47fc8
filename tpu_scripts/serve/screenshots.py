"""Take the page's screenshots in docs/: desktop and phone, light and dark. Needs `chromium` and Playwright.

python tpu_scripts/serve/screenshots.py --out docs
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from kandinsky_jax.serve import api
from kandinsky_jax.serve.page import mount_page
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service

DESKTOP, PHONE = {"width": 1180, "height": 860}, {"width": 360, "height": 740}
SHOTS = {  # name: size, scheme, what is shown
    "serve-desktop-light": (DESKTOP, "light", "generate"),
    "serve-desktop-dark": (DESKTOP, "dark", "inpaint"),
    "serve-phone-light": (PHONE, "light", "generate"),
    "serve-phone-dark": (PHONE, "dark", "inpaint"),
}
PATIENCE = 120_000  # ms


def main() -> None:
    """Read the command line, serve a model and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help='"tiny", a folder or a Hub repository')
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    parser.add_argument("--prompt", default="red apple")
    parser.add_argument("--repaint", default="purple heart")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    api.no_telemetry()
    settings = ServerSettings(port=0, batch_sizes=(1,))
    service = Service(ServedModel.load(given.model), settings)
    app = api.make_app(service, settings, mount_page)
    service.start()
    with api.ServerThread(service, settings, app) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (size, scheme, what) in SHOTS.items():
            shot = take(browser, server.url, size, scheme, given.repaint if what == "inpaint" else "", given.prompt)
            save(shot, given.out / f"{name}.webp")
        browser.close()


def take(browser: Browser, url: str, size: dict[str, int], scheme: str, repaint: str, prompt: str) -> bytes:
    """Use the page as a person would, and return a PNG of it.

    Args:
        browser: of Playwright.
        url: of the server.
        size: of the window.
        scheme: "light" or "dark".
        repaint: prompt of what is painted over; "" for a page of text to image.
        prompt: of the pictures.
    """
    context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(url)
    page.wait_for_function("() => window.kandinskyPage !== undefined", timeout=PATIENCE)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Seed", exact=True).fill("7")
    page.locator("input[type=number][aria-label*='Pictures']").fill("4")
    generate(page, 4)
    if repaint:
        page.get_by_role("button", name="Repaint this").click()
        paint(page)
        page.locator("input[type=number][aria-label*='Pictures']").fill("1")
        page.get_by_label("Prompt", exact=True).fill(repaint)
        if size is DESKTOP:
            generate(page, 5)
        page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    shot = page.screenshot()
    context.close()
    return shot


def generate(page: Page, newest: int) -> None:
    """Press "Generate", and wait for the picture of a number and all that is to be shown."""
    page.locator(".kj-generate:visible").click()
    page.locator(f".kj-thumb[data-number='{newest}']").wait_for(timeout=PATIENCE)
    page.wait_for_function("() => Array.from(document.images).every((one) => one.complete)", timeout=PATIENCE)


def paint(page: Page) -> None:
    """Paint a stroke on the picture."""
    mask = page.locator("#kj-inpaint-image .kj-mask")
    mask.wait_for()
    mask.scroll_into_view_if_needed()
    box = mask.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.35 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.4 * box["height"], steps=8)
    page.mouse.up()


def save(shot: bytes, path: Path) -> None:
    """Write a screenshot as a small WebP."""
    Image.open(io.BytesIO(shot)).convert("RGB").save(path, quality=80, method=6)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
