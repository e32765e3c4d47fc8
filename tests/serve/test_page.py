"""The page's parts by themselves, and what is open of Gradio's routes."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kandinsky_jax.serve.page import views
from kandinsky_jax.serve.page.context import Job
from kandinsky_jax.serve.page.grids import NO_GRID, GridPlan, label_grid, plan_grid, read_values, shown_grid
from kandinsky_jax.serve.page.restore import read_record
from kandinsky_jax.serve.page.runs import Done, events, shown, waiting
from kandinsky_jax.serve.page.sessions import MAX_PICTURES, MAX_SESSIONS, Session, Sessions
from kandinsky_jax.serve.page.settings_panel import SettingsPanel, read_number, read_seed, read_size, split_scheduler
from kandinsky_jax.serve.page.tabs.outpainting import OutpaintingTab, fitting_canvas, lay_out
from kandinsky_jax.serve.page.widgets import decode, encode_value
from kandinsky_jax.serve.requests import ImageRequest, RequestError
from kandinsky_jax.serve.service import ServiceState
from kandinsky_jax.serve.tickets import Cancelled, Failed, Finished, GeneratedImage, Ticket, TimedOut, Waiting
from tests.serve.browsers import site

PLAIN = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def server():
    with site(generates=False) as running:
        yield running


# Gradio's routes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=http://127.0.0.1:1/",
        "gradio_api/file%3D/etc/passwd",
        "gradio_api/file/etc/passwd",
        "gradio_api/proxy=http://127.0.0.1:1/",
        "gradio_api/info",
        "gradio_api/openapi.json",
        "gradio_api/runs",
        "gradio_api/upload_progress?upload_id=1",
        "gradio_api/vibe-code/",
        "gradio_api/deep_link?session_hash=1",
        "gradio_api/stream/a/b/1/playlist-file",
        "gradio_api/custom_component/1/client/component/style.css",
        "gradio_api/mcp/sse",
        "monitoring",
        "login",
        "?deep_link=..%2Fx",
        "config?deep_link=x",
        "static/../../../../etc/passwd",
        "static/%2e%2e/%2e%2e/theme.css",
        "assets/..%2f..%2fgradio.js",
        "svelte/x.js",
        "own/../gate.py",
        "own/gate.py",
        "session/x/1.png",
        "session/%2e%2e/1.png",
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(server, path):
    with httpx.Client(base_url=server.url) as client:
        assert client.get(f"/ui/{path}").status_code == 404


@pytest.mark.parametrize(
    "path",
    ["upload", "component_server", "run/predict", "api/predict", "call/generate", "process_recording", "vibe-edit/"],
)
def test_nothing_is_uploaded_or_called_beside_the_page(server, path):
    files = {"files": ("x.png", b"x", "image/png")}
    assert httpx.post(f"{server.url}/ui/gradio_api/{path}", files=files).status_code == 404
    assert httpx.post(f"{server.url}/ui/gradio_api/{path}", json={"data": []}).status_code == 404
    assert httpx.put(f"{server.url}/ui/gradio_api/{path}", json={"data": []}).status_code == 404


def test_the_page_is_there_and_names_no_other_host(server):
    first = httpx.get(f"{server.url}/")
    assert (first.status_code, first.headers["location"]) == (307, "ui/")
    page = httpx.get(f"{server.url}/ui/")
    assert page.status_code == 200
    assert "fonts.googleapis" not in page.text
    assert json.loads(httpx.get(f"{server.url}/ui/config").text)["analytics_enabled"] is False
    assert httpx.get(f"{server.url}/ui/own/page.js").headers["content-type"].startswith("text/javascript")
    assert httpx.get(f"{server.url}/favicon.ico").status_code == 200


def test_the_page_needs_the_servers_key():
    with site(generates=False, api_key="a key of the tests") as running:
        for path in ("ui/", "ui/own/page.js", "ui/config", "ui/session/a/1.png"):
            assert httpx.get(f"{running.url}/{path}").status_code == 401, path
        assert (
            httpx.get(f"{running.url}/ui/config", headers={"authorization": "Bearer a key of the tests"}).status_code
            == 200
        )


# Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["/etc/passwd", "http://127.0.0.1/x.png", "{}", '{"picture": 1}', 7, '{"picture": "x"}']
)
def test_a_picture_is_never_a_path_or_an_address(value):
    with pytest.raises(RequestError):
        decode(value, "the picture", 10**6)


def test_a_picture_as_text():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8))
    found = decode(encode_value(noise), "the picture", 100)
    assert found is not None
    assert np.array_equal(np.asarray(found.picture), np.asarray(noise))
    assert decode("", "the picture", 100) is None
    with pytest.raises(RequestError, match="9 x 8 pixels"):
        decode(encode_value(noise), "the picture", 71)


def test_settings_are_read():
    assert read_seed(" 9223372036854775807 ") == 2**63 - 1
    assert read_seed("") is None
    assert read_size("768 x 512") == {"height": 512, "width": 768}
    assert read_number("2,5", "Guidance scale", whole=False) == 2.5
    assert split_scheduler("dpm++2m-sde-karras", ("karras",)) == ("dpm++2m-sde", "karras")
    assert split_scheduler("dpm++2m-sde", ("karras",)) == ("dpm++2m-sde", "")
    for read in (read_seed, read_size, lambda text: read_number(text, "Steps", whole=True)):
        for wrong in ("x", "-", "9223372036854775808x", "1e", "²"):
            with pytest.raises(RequestError):
                read(wrong)


def test_values_of_a_grid():
    assert read_values("Steps", "2, 3,", "X") == [2, 3]
    assert read_values("Prompt", "a cat, black | a dog", "X") == ["a cat, black", "a dog"]
    for setting, text in (("Steps", ""), ("Steps", "two"), ("Colour", "1")):
        with pytest.raises(RequestError):
            read_values(setting, text, "X")


def test_an_axis_alone_is_one_row_or_column(server):
    base = Job(ImageRequest(prompt="a red circle"))
    axes = {"x_setting": "Guidance scale", "y_setting": "Guidance scale", "x_values": "1, 2.5", "y_values": " "}
    plan = plan_grid(base, axes, server.context)
    assert (plan.columns, plan.rows) == (("Guidance scale: 1", "Guidance scale: 2.5"), ("",))
    assert [job.request.guidance_scale for job in plan.jobs] == [1.0, 2.5]
    assert label_grid([PLAIN, PLAIN], plan.columns, plan.rows).width == 128
    plan = plan_grid(base, axes | {"x_values": "", "y_values": "1,3"}, server.context)
    assert (plan.columns, plan.rows) == (("",), ("Guidance scale: 1", "Guidance scale: 3"))
    for wrong in ({"x_values": ""}, {"y_values": "1"}, {"x_values": ",".join(["1"] * 37)}):
        with pytest.raises(RequestError):
            plan_grid(base, axes | wrong, server.context)


def test_a_grid_has_its_cells_in_place():
    cells = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue", "white", "black", "yellow")]
    sheet = label_grid(cells, ["Steps: 1", "Steps: 2", "Steps: 3"], ["Seed: 1", "Seed: 2"])
    left, top = sheet.width - 3 * 64, sheet.height - 2 * 64
    assert [
        sheet.getpixel((left + 64 * column + 32, top + 64 * row + 32)) for row in (0, 1) for column in (0, 1, 2)
    ] == [cell.getpixel((0, 0)) for cell in cells]
    labels = np.asarray(sheet.convert("L"))
    assert (labels[:top, left:] < 128).any()
    assert (labels[top:, :left] < 128).any()


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines",
        "a\ttab",
        "nul\x00",
        "\u202eturned",
        "\ud800",
        "שלום עולם",
        "漢字",
        "🦊👩\u200d👧",
        "\n",
        "e\u0301" * 5000,
    ],
)
def test_any_text_is_a_label_of_a_grid(text):
    sheet = label_grid([PLAIN], [f"Prompt: {text}"], [f"Negative prompt: {text}"])
    assert sheet.getpixel((sheet.width - 32, sheet.height - 32)) == (255, 0, 0)
    beside = label_grid([PLAIN], ["Prompt: a b"], ["Seed: 1"])
    assert np.array_equal(np.asarray(label_grid([PLAIN], ["Prompt: a\n\u202eb"], ["Seed: 1"])), np.asarray(beside))


def test_labels_of_any_length_are_cut_at_once():
    began = time.process_time()
    sheet = label_grid([PLAIN] * 4, ["Prompt: " + "a" * 100_000] * 2, ["Prompt: " + "a b " * 100_000] * 2)
    assert time.process_time() - began < 2
    assert sheet.width < 400


def test_a_grid_that_cannot_be_labelled_does_not_lose_its_cells(server):
    job = Job(ImageRequest(prompt="a red circle", height=64, width=64, seed=1))
    plan = GridPlan((job, job), columns=(), rows=("x",))  # no place for the cells
    session = Session()
    *_, last = asyncio.run(generated(plan, session, server.context, PLAIN))
    assert len(session.pictures) == 2
    assert isinstance(last, str)
    assert NO_GRID.replace("'", "&#x27;") in last
    assert all(f"session/{session.key}/{number}.png" in last for number in session.pictures)


def test_others_are_served_while_a_large_grid_is_made(server):
    job = Job(ImageRequest(prompt="a red circle", height=64, width=64, seed=1))
    plan = GridPlan((job,) * 2, columns=("a", "b"), rows=("c",))
    noise = Image.effect_noise((1536, 1536), 60).convert("RGB")

    async def longest_pause() -> float:
        run = asyncio.create_task(generated(plan, Session(), server.context, noise))
        pauses, before = [0.0], time.monotonic()
        while not run.done():
            await asyncio.sleep(0.01)
            pauses.append(time.monotonic() - before)
            before = time.monotonic()
        assert isinstance((await run)[-1], Done)
        return max(pauses)

    assert asyncio.run(longest_pause()) < 0.3  # the PNG takes a second


async def generated(plan, session, context, picture) -> list[object]:
    """Run a grid on a server that does not generate, with one picture for each of its cells."""
    found: list[object] = []
    async for event in shown_grid(lambda: plan, session, context):
        found.append(event)
        for ticket in session.tickets:
            ticket.send(Finished((GeneratedImage(picture, {"seed": 1}),)))
    return found


# Progress ---------------------------------------------------------------------------------------------------------


def test_the_page_says_why_a_request_waits():
    state = ServiceState(
        ready=False,
        compiled=13,
        programs=32,
        waiting=1,
        running=0,
        images=0,
        evaluations=0,
        stopping=False,
        failures=(),
    )
    ready = dataclasses.replace(state, ready=True, compiled=32)
    assert waiting(state, 0, new=True) == "Compiling, 13 of 32"
    assert waiting(ready, 0, new=True) == "Waiting"
    assert waiting(ready, 0, new=False) == "Compiling the programs of this request"
    assert waiting(dataclasses.replace(ready, running=1), 1, new=False) == "Waiting, 1 before it"


def test_a_request_that_waits_is_looked_at_again():
    async def looked() -> list[object]:
        ticket = Ticket(ImageRequest(prompt="x"))
        ticket.send(Waiting(0))
        found: list[object] = []
        async for event in events(ticket):
            found.append(event)
            if event is None:
                ticket.send(Failed(Cancelled("x")))
        return found

    first, between, last = asyncio.run(looked())
    assert (first, between) == (Waiting(0), None)
    assert isinstance(last, Failed)


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (Finished((GeneratedImage(PLAIN, {"seed": 1}),)), 200),
        (Failed(TimedOut("x")), 504),
        (Failed(Cancelled("the server stops")), 503),
        (None, 499),
        (Failed(OSError("x")), 500),
    ],
    ids=["finished", "timed out", "stopped", "cancelled", "failed"],
)
def test_a_generation_is_one_line_of_the_log_without_its_prompt(server, caplog, last, status):
    job = Job(ImageRequest(prompt="a secret", height=64, width=64, seed=5, num_inference_steps=2))

    async def generated() -> None:
        session = Session()
        async for _ in shown(lambda: job, session, server.context):
            if last is None:
                session.cancel()
            for ticket in session.tickets:
                ticket.send(last or Failed(Cancelled("its client has cancelled")))

    with caplog.at_level("INFO", "kandinsky_jax.serve"):
        asyncio.run(generated())
    [line] = [one.getMessage() for one in caplog.records if one.name == "kandinsky_jax.serve"]
    assert re.fullmatch(
        rf"POST page/generation {status} \d+ ms id=req-\d+ mode=generate size=64x64 steps=2 n=1 seed=5( queue=\d+ ms)?",
        line,
    )


# Outpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", [(64, 64), (1000, 300), (300, 1000), (7, 900)])
@pytest.mark.parametrize("shares", [(0.25, 0.25, 0, 0), (1, 0, 0, 0), (0, 0, 0, 0.05), (0.1, 0.2, 0.3, 0.4)])
def test_the_canvas_is_filled_and_the_picture_keeps_its_proportions(picture, shares):
    named = dict(zip(("left", "right", "top", "bottom"), shares, strict=True))
    size = (512, 768)
    layout = lay_out(picture, named, size)
    margins = layout.margins
    assert layout.width + margins["left"] + margins["right"] == size[1]
    assert layout.height + margins["top"] + margins["bottom"] == size[0]
    assert min(margins.values()) >= 0
    exact = layout.height * picture[0] / picture[1]
    assert abs(layout.width - exact) <= max(1, 0.5 * picture[0] / picture[1] + 0.5)
    assert sum(margins.values()) > 0


def test_the_canvas_of_a_picture():
    assert fitting_canvas(200, 100, [(512, 512), (512, 768)], 0) == (512, 768)
    height, width = fitting_canvas(200, 100, None, 512 * 512)
    assert (height % 64, width % 64) == (0, 0)
    assert 1.8 < width / height < 2.2


@pytest.mark.parametrize("shared", [{"height": 8192, "width": 8192}, {"height": 64, "width": 64, "prompt": ""}])
def test_a_canvas_that_is_not_served_is_not_made(server, shared):
    tab = OutpaintingTab(server.context)
    values = {"image": encode_value(PLAIN), "left": 25, "right": 25, "top": 0, "bottom": 0, "fill": "edge"}
    with pytest.raises(RequestError):
        tab.job(values | {"paste_back": True}, {"prompt": "x"} | shared)


# Sessions ---------------------------------------------------------------------------------------------------------


def test_threads_add_pictures_while_the_gallery_is_shown():
    session = Session()
    with ThreadPoolExecutor(4) as pool:
        added = [pool.submit(session.add, PLAIN, b"x", {"seed": 1}, "red " * 1000, "red") for _ in range(400)]
        while not all(one.done() for one in added):
            assert len(views.gallery(session)) < 100_000
    assert len({one.result().number for one in added}) == 400
    assert len(session.pictures) == MAX_PICTURES


def test_galleries_are_bounded():
    session = Session()
    for number in range(MAX_PICTURES + 5):
        session.add(PLAIN, b"x", {"seed": number}, "red", "red")
    assert len(session.pictures) == MAX_PICTURES
    assert session.selection is not None
    assert session.selection.number == MAX_PICTURES + 5
    sessions = Sessions()
    first = sessions.get("0")
    for number in range(3 * MAX_SESSIONS):
        sessions.get(str(number))
    assert len(list(sessions)) <= MAX_SESSIONS
    assert sessions.with_key(first.key) is None
    assert sessions.resume("new", first.key) is not first
    newest = sessions.get(str(3 * MAX_SESSIONS - 1))
    assert sessions.with_key(newest.key) is newest
    assert sessions.resume("reloaded", newest.key) is newest
    sessions.leave(str(3 * MAX_SESSIONS - 1))  # the page before the reload
    assert newest.left is None


# Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "choices"),
    [
        ({"sizes": ((128, 64),)}, [("recommended (64 x 128)", ""), ("64 x 128", "64x128")]),
        (
            {"sizes": ((128, 64),), "any_size": True},
            [("recommended (64 x 128)", ""), ("64 x 128", "64x128")],
        ),
        ({"any_size": True}, [("recommended (64 x 64)", ""), ("64 x 64", "64x64")]),
    ],
    ids=str,
)
def test_the_page_offers_sizes_that_are_served(given, choices):
    with site(generates=False, **given) as running:
        assert SettingsPanel(running.context, "generate").recommended("generate", False)["size"]["choices"] == choices


def test_settings_of_another_tool_that_are_not_used_are_named(server):
    facts = PngInfo()
    facts.add_text("parameters", "a cat\nSteps: 9, CFG scale: 5, Seed: 4, Model: other, Hires upscale: 2")
    data = io.BytesIO()
    PLAIN.save(data, "PNG", pnginfo=facts)
    assert read_record(data.getvalue())["unused"] == ["Model", "Hires upscale"]
