"""The page in a real browser."""

from __future__ import annotations

import base64
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from kandinsky_jax.serve.records import encode_image, read_settings
from kandinsky_jax.serve.requests import ImageRequest
from kandinsky_jax.serve.tickets import Cancelled, Failed
from tests.serve.browsers import Visit, chromium, site, visit, wait_until
from tests.serve.servers import encoded

pytestmark = [
    pytest.mark.slow,
    # Gradio's queue uses what pandas has deprecated.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


@pytest.fixture(scope="module")
def server():
    with site() as running:
        wait_until(lambda: running.service.state.ready, 300)
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser, server):
    with visit(browser, server) as found:
        yield found


def picture(seed: int = 0) -> Image.Image:
    """A picture with something in it."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)


def chosen(opened: Visit, name: str, image: Image.Image) -> None:
    """Choose a file in a picture input."""
    box = opened.page.locator(f"#kj-{name}")
    file = {"name": "picture.png", "mimeType": "image/png", "buffer": encoded(image)}
    box.locator("input[type=file]").set_input_files([file])
    box.locator(".kj-filled").wait_for()


def opened_png(opened: Visit, address: str) -> Image.Image:
    return Image.open(io.BytesIO(opened.fetch(address)))


def test_every_tab_generates(opened):
    opened.few_steps()
    opened.prompt("a red circle")
    [first] = opened.generate()
    assert read_settings(opened.fetch(first)) | {"seed": 0} == {
        **{"mode": "generate", "prompt": "a red circle", "seed": 0, "num_images": 1, "height": 64, "width": 64},
        **{"num_inference_steps": 2, "guidance_scale": 2.0, "fast": False},
        **{"prior_num_inference_steps": 2, "prior_guidance_scale": 1.0, "torch_noise": False, "paste_back": False},
    }
    opened.tab("Image to image")
    chosen(opened, "img2img-image", picture())
    opened.settings(Steps="4")
    [second] = opened.generate()
    assert read_settings(opened.fetch(second))["mode"] == "img2img"
    opened.tab("Depth hint")
    chosen(opened, "depth-hint", picture(1))
    [third] = opened.generate()
    assert read_settings(opened.fetch(third))["mode"] == "controlnet"
    opened.page.get_by_role("button", name="Start from a picture").click()
    chosen(opened, "depth-image", picture(2))
    [fourth] = opened.generate()
    assert read_settings(opened.fetch(fourth))["mode"] == "controlnet-img2img"
    opened.tab("Variations")
    chosen(opened, "vary-image", picture(3))
    opened.settings(Prior_steps="4")
    [fifth] = opened.generate()
    assert read_settings(opened.fetch(fifth))["mode"] == "vary"


def test_a_mix_of_a_prompt_and_a_picture(opened):
    opened.few_steps()
    opened.tab("Mix")
    opened.page.get_by_label("Prompt", exact=True).wait_for(state="hidden")
    opened.page.get_by_label("Prompt 1", exact=True).fill("a blue star")
    chosen(opened, "mix-picture-2", picture())
    opened.page.locator("input[type=number][aria-label*='Weight 2']").fill("0.25")
    [made] = opened.generate()
    found = read_settings(opened.fetch(made))
    assert (found["items"], found["weights"]) == (("a blue star", None), (0.5, 0.25))


def test_a_painted_mask_is_repainted_and_the_rest_is_kept(opened):
    opened.few_steps()
    opened.prompt("a red circle")
    [first] = opened.generate()
    before = np.asarray(opened_png(opened, first))
    opened.page.get_by_role("button", name="Repaint this").click()
    mask = opened.page.locator("#kj-inpaint-image .kj-mask")
    mask.wait_for()
    assert opened.page.get_by_role("tab", name="Inpainting").get_attribute("aria-selected") == "true"
    opened.page.locator(".kj-generate:visible").click()
    opened.page.get_by_text("Nothing is painted:").wait_for()
    box = mask.bounding_box()
    assert box is not None
    opened.page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    opened.page.mouse.down()
    opened.page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"], steps=4)
    opened.page.mouse.up()
    opened.prompt("a blue square")
    [made] = opened.generate()
    after = np.asarray(opened_png(opened, made))
    changed = (before != after).any(-1)
    assert changed[12:20, 16:48].mean() > 0.9  # below the brush
    assert not changed[28:].any()
    assert not changed[:4].any()


def test_outpainting_scales_the_picture_to_the_served_canvas_and_keeps_it(opened):
    opened.few_steps()
    opened.prompt("a red circle")
    opened.tab("Outpainting")
    source = picture()
    chosen(opened, "outpaint-image", source)
    [made] = opened.generate()
    assert "scaled from 64 x 64 to 43 x 43 pixels, to fit a canvas of 64 x 64" in opened.page.inner_text("#kj-result")
    result = opened_png(opened, made)
    kept = source.resize((43, 43), Image.Resampling.LANCZOS)
    middle = np.asarray(result.convert("RGB"))[10 + 20 : 10 + 23, 10 + 20 : 10 + 23]
    assert np.abs(middle.astype(int) - np.asarray(kept)[20:23, 20:23]).max() <= 2


@pytest.fixture
def long_run(opened):
    """A run of many steps, that has begun."""
    opened.settings(Steps="200")
    opened.page.locator("input[type=number][aria-label*='Pictures']").fill("10")
    opened.prompt("a red circle")
    opened.page.locator(".kj-generate:visible").click()
    found = lambda: [ticket for one in list(opened.site.context.sessions) for ticket in list(one.tickets)]  # noqa: E731
    wait_until(lambda: bool(found()), 60)
    [ticket] = found()
    opened.page.get_by_text("of 200").first.wait_for()
    return ticket


def test_a_preview_forms_and_escape_stops_the_loop(opened, long_run):
    preview = opened.page.locator("#kj-result .kj-forming img").first
    preview.wait_for()
    assert preview.get_attribute("alt") == "Preview: a red circle"
    assert preview.evaluate("one => one.naturalWidth") >= 8
    assert 0 < opened.page.locator("#kj-result progress").evaluate("one => one.value") < 100
    opened.page.locator("#kj-result .kj-left").filter(has_text=" left").wait_for()
    opened.page.keyboard.press("Escape")
    opened.page.get_by_text("Cancelled").wait_for()
    wait_until(lambda: opened.site.service.state.running == 0, 5)
    assert isinstance(long_run.end, Failed)
    assert isinstance(long_run.end.error, Cancelled)
    opened.few_steps()
    opened.page.locator("input[type=number][aria-label*='Pictures']").fill("1")
    opened.generate()
    assert not opened.page.get_by_text("Settings restored").count()


def test_a_second_click_does_not_disturb_what_runs_and_the_button_stops_it(opened, long_run):
    opened.page.locator(".kj-generate:visible").click()
    opened.page.get_by_role("button", name="Cancel").click()
    opened.page.get_by_text("Cancelled").wait_for()
    opened.page.get_by_role("button", name="Cancel").wait_for(state="hidden")
    wait_until(lambda: long_run.end is not None, 5)
    assert isinstance(long_run.end.error, Cancelled)


def test_a_closed_tab_cancels_what_it_has_left(browser, server):
    with visit(browser, server) as opened:
        opened.settings(Steps="200")
        opened.page.locator("input[type=number][aria-label*='Pictures']").fill("10")
        opened.prompt("a red circle")
        opened.page.locator(".kj-generate:visible").click()
        opened.page.get_by_text("of 200").first.wait_for()
        [session] = [one for one in server.context.sessions if one.tickets]
        [ticket] = session.tickets
        opened.page.close()
        wait_until(lambda: ticket.end is not None, 10)
        assert isinstance(ticket.end.error, Cancelled)
        wait_until(lambda: server.service.state.running == 0, 5)
        wait_until(lambda: session.left is not None, 5)


def test_a_dropped_picture_restores_its_settings(opened):
    request = ImageRequest(
        prompt="a green star",
        **{"seed": 2**62 + 1, "height": 64, "width": 64, "num_inference_steps": 7, "guidance_scale": 3.5},
        **{"prior_num_inference_steps": 5, "prior_guidance_scale": 1.5, "scheduler": "dpm++2m-karras"},
        negative_prompt="blue",
    )
    opened.tab("Mix")
    opened.drop(".kj-restore", encode_image(picture(), request.record("tiny", 0), "png"))
    opened.page.get_by_text("Settings restored into Text to image.").wait_for()
    opened.settings()
    values = {
        name: opened.page.get_by_label(name, exact=True).input_value()
        for name in ("Prompt", "Negative prompt", "Seed", "Steps", "Guidance scale", "Prior steps", "Scheduler")
    }
    assert values == {
        **{"Prompt": "a green star", "Negative prompt": "blue", "Seed": str(2**62 + 1), "Steps": "7"},
        **{"Guidance scale": "3.5", "Prior steps": "5", "Scheduler": "dpm++2m"},
    }
    assert opened.page.get_by_label("Its variant").input_value() == "karras"
    [made] = opened.generate()
    assert read_settings(opened.fetch(made))["scheduler"] == "dpm++2m-karras"


def test_a_picture_of_another_tool_dropped_anywhere_restores_its_settings(opened):
    text = "a red circle\nNegative prompt: blue\nSteps: 9, Sampler: Euler a, CFG scale: 5, Seed: 42, Size: 512x512"
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    facts.add_text("parameters", text)
    data = io.BytesIO()
    picture().save(data, "PNG", pnginfo=facts)
    opened.drop("h1", data.getvalue())
    opened.page.get_by_text("the size 512 x 512").wait_for()
    opened.settings()
    assert opened.page.get_by_label("Steps", exact=True).input_value() == "9"
    assert opened.page.get_by_label("Seed", exact=True).input_value() == "42"


def test_a_picture_without_settings_is_refused_in_words(opened):
    opened.drop(".kj-restore", encoded(picture()))
    opened.page.get_by_text("Not restored: this picture has no settings").wait_for()
    opened.drop("h1", encoded(picture())[:40])
    opened.page.get_by_text("Not restored: this file is no picture of PNG").wait_for()


def test_a_picture_of_the_gallery_is_the_source_of_the_next(opened):
    opened.few_steps()
    opened.prompt("a red circle")
    opened.page.locator("input[type=number][aria-label*='Pictures']").fill("2")
    opened.generate(2)
    opened.page.get_by_role("button", name="Picture 2: a red circle").click()
    opened.page.locator(".kj-selected img[src$='/2.png']").wait_for()
    opened.page.get_by_role("button", name="Use as source").click()
    opened.page.locator("#kj-img2img-image .kj-filled").wait_for()
    assert opened.page.get_by_role("tab", name="Image to image").get_attribute("aria-selected") == "true"
    opened.settings(Steps="4")
    opened.generate(2)
    for title, place in (
        ("Outpainting", "outpaint-image"),
        ("Variations", "vary-image"),
        ("Depth hint", "depth-image"),
        ("Mix", "mix-picture-1"),
    ):
        opened.tab(title)
        opened.page.get_by_role("button", name="Use as source").click()
        opened.page.locator(f"#kj-{place} .kj-filled").wait_for()
        opened.page.locator(f"#kj-{place} canvas.kj-image").wait_for()
        assert opened.page.get_by_role("tab", name=title).get_attribute("aria-selected") == "true"


def test_a_grid_is_one_labelled_picture_and_its_cells_are_in_the_gallery(opened):
    opened.few_steps()
    opened.prompt("a red circle")
    opened.page.get_by_role("button", name="X/Y grid").click()
    opened.page.get_by_label("X: values").fill("2, 3")
    opened.page.get_by_label("Y: values").fill("1, 2.5")
    opened.page.locator(".kj-grid-button:visible").click()
    [made] = opened.finished(0, 5)
    sheet = opened_png(opened, made)
    assert sheet.width > 128
    assert sheet.height > 128
    assert "Steps: 2, Steps: 3" in opened.page.inner_text("#kj-selected")
    cells = [read_settings(opened.fetch(made.replace("/5.png", f"/{number}.png"))) for number in range(1, 5)]
    assert [(cell["num_inference_steps"], cell["guidance_scale"]) for cell in cells] == [
        *((2, 1.0), (3, 1.0), (2, 2.5), (3, 2.5))
    ]
    assert len({cell["seed"] for cell in cells}) == 1


def test_downloads_of_one_and_of_all(opened):
    opened.few_steps()
    opened.prompt("a red circle")
    opened.page.locator("input[type=number][aria-label*='Pictures']").fill("2")
    opened.generate(2)
    with opened.page.expect_download() as started:
        opened.page.get_by_role("link", name="Download", exact=True).click()
    assert started.value.suggested_filename.endswith(".png")
    with opened.page.expect_download() as started:
        opened.page.get_by_role("link", name="Download all").click()
    with zipfile.ZipFile(started.value.path()) as archive:
        assert [Image.open(archive.open(name)).size for name in archive.namelist()] == [(64, 64)] * 2


def test_a_picture_by_keyboard_alone(opened):
    keyboard, page = opened.page.keyboard, opened.page
    for _ in range(10):
        if page.evaluate("document.activeElement?.matches('#kj-prompt textarea')"):
            break
        keyboard.press("Tab")
    keyboard.type("a red circle")
    keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "tab"
    keyboard.press("Control+Enter")
    opened.finished(0)
    mask_by_keyboard(opened)


def mask_by_keyboard(opened: Visit) -> None:
    """Paint a mask by keys on the picture that is there, and repaint."""
    page = opened.page
    page.get_by_role("button", name="Repaint this").focus()
    page.keyboard.press("Enter")
    page.locator("#kj-inpaint-image .kj-mask").wait_for()
    page.locator("#kj-inpaint-image .kj-mask").focus()
    page.keyboard.press("Space")
    for _ in range(6):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Control+Enter")
    opened.finished(1)


def test_the_next_seed(opened):
    opened.few_steps()
    opened.prompt("a red circle")
    opened.page.get_by_label("Seed", exact=True).fill(str(2**60))
    opened.page.get_by_label("next", exact=True).check()
    [made] = opened.generate()
    assert read_settings(opened.fetch(made))["seed"] == 2**60
    wait_until(lambda: opened.page.get_by_label("Seed", exact=True).input_value() == str(2**60 + 1))


def test_errors_are_words(opened):
    opened.page.locator(".kj-generate:visible").click()
    opened.page.get_by_role("alert").get_by_text("Prompt is empty; say what to generate.").wait_for()
    opened.prompt("a red circle")
    opened.page.get_by_label("Seed", exact=True).fill("-1")
    opened.page.locator(".kj-generate:visible").click()
    opened.page.get_by_text("The seed is '-1'; needed is a whole number").wait_for()
    opened.settings(Seed="1", Steps="0")
    opened.page.locator(".kj-generate:visible").click()
    opened.page.get_by_role("alert").get_by_text("Steps ").wait_for()


def test_a_number_beside_a_slider_that_is_cleared_or_too_large_is_told_in_words(opened):
    opened.prompt("a red circle")
    number = opened.page.locator("input[type=number][aria-label*='Pictures']")
    for given, says in (("99", "Pictures is 99; needed is a number from 1 to"), ("", "Pictures is empty")):
        number.fill(given)
        opened.page.keyboard.press("Control+Enter")
        opened.page.locator("#kj-result").get_by_text(says).wait_for()
    assert not opened.page.locator(".toast-body").count()


def test_a_file_that_was_chosen_before_the_script_ran_is_taken(opened):
    """A tab's input can be used a moment before `kandinskyPage.picture` has it."""
    opened.tab("Image to image")
    opened.page.locator("#kj-img2img-image .kj-picture").wait_for()
    data = base64.b64encode(encoded(picture())).decode()
    opened.page.evaluate(
        """(data) => {
            const element = document.createElement("div");
            element.innerHTML = document.querySelector("#kj-img2img-image .kj-picture").outerHTML;
            const chosen = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            chosen.items.add(new File([bytes], "picture.png", { type: "image/png" }));
            element.querySelector("input[type=file]").files = chosen.files;
            window.late = { value: "" };
            kandinskyPage.picture(element, window.late, () => {}, false, 512);
        }""",
        data,
    )
    opened.page.wait_for_function("window.late.value.includes('data:image/png')")


def test_fast_mode_changes_what_is_recommended(opened):
    opened.settings()
    steps = opened.page.get_by_label("Steps", exact=True)
    assert steps.get_attribute("placeholder") == "50 (recommended)"
    steps.fill("30")
    opened.page.get_by_label("Fast mode").check()
    wait_until(lambda: steps.get_attribute("placeholder") == "4 (recommended)")
    wait_until(lambda: steps.input_value() == "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser, server, scheme):
    size = {"width": 360, "height": 740}
    with visit(browser, server, viewport=size, color_scheme=scheme, has_touch=True) as opened:
        opened.few_steps()
        opened.prompt("a red circle")
        opened.generate()
        for title in ("Inpainting", "Outpainting", "Depth hint", "Mix", "Variations", "Image to image"):
            opened.tab(title)
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360, title
            wide = opened.page.evaluate(
                """() => Array.from(document.querySelectorAll("button, input, textarea, img, canvas"))
                    .filter((one) => one.offsetParent !== null && one.getBoundingClientRect().right > 361)
                    .map((one) => one.outerHTML.slice(0, 120))"""
            )
            assert wide == [], title
        background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")


UNLABELLED = """() => {
  const name = (one) => {
    const ids = (one.getAttribute("aria-labelledby") ?? "").split(" ").filter(Boolean);
    const parts = [
      one.getAttribute("aria-label"), ...ids.map((id) => document.getElementById(id)?.textContent),
      ...Array.from(one.labels ?? []).map((label) => label.textContent), one.getAttribute("title"),
      ["BUTTON", "A"].includes(one.tagName) ? one.textContent : "", one.querySelector("img")?.alt,
    ];
    return parts.filter(Boolean).join("").trim();
  };
  const shown = Array.from(document.querySelectorAll("input, textarea, select, button, a, [role=application]"))
    .filter((one) => one.offsetParent !== null);
  const images = Array.from(document.images).filter((one) => !one.hasAttribute("alt"));
  const ids = Array.from(document.querySelectorAll("[id]")).map((one) => one.id);
  const double = ids.filter((id, at) => id.startsWith("kj-") && ids.indexOf(id) !== at);
  return [...shown.filter((one) => !name(one)), ...images].map((one) => one.outerHTML.slice(0, 200)).concat(double);
}"""


def test_everything_has_a_name_for_a_screen_reader(opened):
    page = opened.page
    opened.few_steps()
    opened.prompt("a red circle")
    opened.generate()
    page.get_by_role("button", name="X/Y grid").click()
    for title in ("Text to image", "Image to image", "Inpainting", "Outpainting", "Depth hint", "Mix", "Variations"):
        opened.tab(title)
        assert page.evaluate(UNLABELLED) == [], title
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("#kj-result [aria-live=polite]").inner_text().startswith("1 picture")
    assert page.locator("#kj-result .kj-frame img").get_attribute("alt") == "a red circle"
    assert page.locator("h1").count() == 1


def test_text_and_background_differ_enough(opened):
    """The least ratios of WCAG 2, for text of the page's own and of Gradio's."""
    for dark in (False, True):
        opened.page.evaluate("(dark) => document.body.classList.toggle('dark', dark)", dark)
        assert opened.page.evaluate(LOW_CONTRAST) == []


LOW_CONTRAST = """() => {
  const numbers = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3)
      .map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const rgb = numbers(getComputedStyle(one).backgroundColor);
      if (rgb.length < 4 || rgb[3] > 0.5) return rgb;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const one of document.querySelectorAll("label, span, p, button, legend, h1, h2, a")) {
    const text = Array.from(one.childNodes).filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    if (!text || one.offsetParent === null || one.closest("[aria-hidden=true]:not(label)")) continue;
    const [a, b] = [light(numbers(getComputedStyle(one).color)), light(ground(one))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${text}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


def test_two_tabs_have_galleries_of_their_own(browser, server):
    with visit(browser, server) as first, visit(browser, server) as second:
        first.few_steps()
        first.prompt("a red circle")
        [made] = first.generate()
        assert second.page.locator(".kj-thumb").count() == 0
        key = made.split("/")[1]
        assert second.page.request.get(f"{server.url}/ui/session/{key[::-1]}/1.png").status == 404
        first.page.reload()
        first.page.locator(".kj-generate").first.wait_for()
        first.prompt("a red circle")
        first.page.keyboard.press("Control+Enter")  # Gradio may not listen yet
        first.page.locator(".kj-thumb[data-number='2']").wait_for()
        assert first.fetch(f"session/{key}/1.png").startswith(b"\x89PNG")
        assert not first.faults
        with first.page.expect_request("**/queue/join*"):  # the gallery is asked for
            first.page.reload(wait_until="commit")
        first.page.reload()
        first.faults.clear()  # of the page that was left before it had its scripts
        first.page.locator(".kj-thumb[data-number='2']").wait_for()
