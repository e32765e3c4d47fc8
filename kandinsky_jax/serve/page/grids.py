"""X/Y grids: one request for each pair of values of two settings, pasted into one labelled picture."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image, ImageDraw, ImageFont

from kandinsky_jax.serve.page import views
from kandinsky_jax.serve.page.context import Job, PageContext
from kandinsky_jax.serve.page.runs import Done, failure_view, run, run_of
from kandinsky_jax.serve.page.sessions import Session
from kandinsky_jax.serve.requests import RequestError
from kandinsky_jax.serve.tickets import Cancelled, QueueFull

MAX_CELLS = 36
SEPARATOR = ","
TEXT_SEPARATOR = "|"  # of prompts, which have commas
RETRY = 1.0  # seconds until a cell is offered again to a full queue
PAD = 6  # pixels around a label


@dataclass(frozen=True)
class Axis:
    """A setting that a grid varies.

    Args:
        name: of the field of `ImageRequest`.
        read: converts one value.
        separator: between values.
    """

    name: str
    read: Callable[[str], Any]
    separator: str = SEPARATOR


AXES = {
    "Steps": Axis("num_inference_steps", int),
    "Guidance scale": Axis("guidance_scale", float),
    "Prior steps": Axis("prior_num_inference_steps", int),
    "Prior guidance scale": Axis("prior_guidance_scale", float),
    "Seed": Axis("seed", int),
    "Scheduler": Axis("scheduler", str),
    "Strength": Axis("strength", float),
    "Prompt": Axis("prompt", str, TEXT_SEPARATOR),
    "Negative prompt": Axis("negative_prompt", str, TEXT_SEPARATOR),
}


def build_axes() -> dict[str, Component]:
    """Create the inputs of a grid."""
    inputs: dict[str, Component] = {}
    hint = "Values with commas between them; prompts with | between them. Grid, below the tab's inputs, generates it."
    gr.Markdown(hint, elem_classes="kj-small")
    for axis, usual in (("x", "Steps"), ("y", "Guidance scale")):
        with gr.Row():
            inputs[f"{axis}_setting"] = gr.Dropdown(
                list(AXES), value=usual, label=f"{axis.upper()}: setting", min_width=140
            )
            inputs[f"{axis}_values"] = gr.Textbox(label=f"{axis.upper()}: values", max_lines=1, min_width=160)
    return inputs


def read_values(setting: str, text: str | None, axis: str) -> list[Any]:
    """Return the values of an axis.

    Args:
        setting: a key of `AXES`.
        text: with separators.
        axis: "X" or "Y", for messages.
    Raises:
        RequestError: where one cannot be read, or there are none.
    """
    if setting not in AXES:
        raise RequestError(f"{axis} of the grid has no setting; there are {', '.join(AXES)}")
    one = AXES[setting]
    parts = [part.strip() for part in (text or "").split(one.separator) if part.strip()]
    if not parts:
        raise RequestError(
            f"{axis} of the grid, {setting}, has no values; give some under X/Y grid, such as 10, 20, 50"
        )
    try:
        return [one.read(part) for part in parts]
    except ValueError:
        raise RequestError(f"{axis} of the grid, {setting}, has a value that is no number: {text!r}") from None


@dataclass(frozen=True)
class GridPlan:
    """A grid that is to be generated.

    Args:
        jobs: row by row.
        columns, rows: labels of X and Y.
    """

    jobs: tuple[Job, ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]


def plan_grid(base: Job, values: dict[str, Any], context: PageContext) -> GridPlan:
    """Return the cells of a grid, all checked.

    Args:
        base: the job that is varied.
        values: of the inputs of `build_axes`.
        context: of the page.
    Raises:
        RequestError: naming the cell that cannot be generated.
    """
    x, y = values["x_setting"], values["y_setting"]
    if x == y:
        raise RequestError(f"X and Y of the grid are both {x}; choose two settings")
    across, down = read_values(x, values["x_values"], "X"), read_values(y, values["y_values"], "Y")
    if len(across) * len(down) > MAX_CELLS:
        raise RequestError(f"the grid has {len(across)} x {len(down)} cells; there may be {MAX_CELLS}")
    seed = secrets.randbits(32) if base.request.seed is None else base.request.seed
    common = dataclasses.replace(base.request, num_images=1, seed=seed)
    jobs = []
    for below in down:
        for beside in across:
            request = dataclasses.replace(common, **{AXES[x].name: beside, AXES[y].name: below})
            try:
                context.model.complete(request, context.settings)
            except RequestError as error:
                raise RequestError(f"the cell {x} {beside}, {y} {below}: {error}", error.param) from None
            jobs.append(dataclasses.replace(base, request=request))
    return GridPlan(tuple(jobs), tuple(f"{x}: {value}" for value in across), tuple(f"{y}: {value}" for value in down))


async def shown_grid(plan: Callable[[], GridPlan], session: Session, context: PageContext) -> AsyncIterator[str | Done]:
    """Generate a grid; a cancelled one leaves the cells that are done in the gallery."""
    began = time.monotonic()
    try:
        with run_of(session):
            yield views.working("Starting")
            planned = await asyncio.to_thread(plan)
            done: dict[int, Done] = {}
            async for number, event in _cells(planned.jobs, session, context):
                if isinstance(event, Done):
                    done[number] = event
                if isinstance(event, Done) or number == _first_running(planned, done):
                    yield event
            cells = [kept.picture() for number in sorted(done) for kept in done[number].kept]
            picture = await asyncio.to_thread(label_grid, cells, planned.columns, planned.rows)
            about = f"Grid. Across: {', '.join(planned.columns)}. Down: {', '.join(planned.rows)}."
            kept = session.add(picture, _png(picture), None, about, about)
            yield views.finished([kept], session.key, planned.jobs[0].note, time.monotonic() - began)
            yield Done((kept,), planned.jobs[0].request)
    except Exception as error:
        if view := failure_view(error):
            yield view


def _first_running(planned: GridPlan, done: dict[int, Done]) -> int:
    """Return the number of the first cell that is not done, whose progress is shown."""
    return next((number for number in range(len(planned.jobs)) if number not in done), 0)


async def _cells(jobs: Sequence[Job], session: Session, context: PageContext) -> AsyncIterator[tuple[int, str | Done]]:
    """Run cells, as many at once as share a step; yield their numbers and views, and what became of them.

    Raises:
        Exception: of the first cell that fails; the others are cancelled.
    """
    inbox: asyncio.Queue[tuple[int, str | Done | Exception | None]] = asyncio.Queue()
    places = asyncio.Semaphore(max(context.settings.batch_sizes))

    async def one(number: int, job: Job) -> None:
        try:
            async with places:
                async for event in _patient(job, session, context, f"picture {number + 1} of {len(jobs)}"):
                    inbox.put_nowait((number, event))
            inbox.put_nowait((number, None))
        except Exception as error:
            inbox.put_nowait((number, error))

    tasks = [asyncio.create_task(one(number, job)) for number, job in enumerate(jobs)]
    try:
        left = len(tasks)
        while left:
            number, event = await inbox.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                left -= 1
            else:
                yield number, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _patient(job: Job, session: Session, context: PageContext, of: str) -> AsyncIterator[str | Done]:
    """Run a cell; where the queue is full, wait for a place."""
    while True:
        try:
            async for event in run(job, session, context, of):
                yield event
            return
        except QueueFull:
            if session.cancelled:
                raise Cancelled("the grid was cancelled") from None
            yield views.working("Waiting for a place in the queue")
            await asyncio.sleep(RETRY)


def label_grid(cells: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Paste pictures into one, with labels above and at the left.

    Args:
        cells: row by row, of one size or smaller than the largest.
        columns, rows: labels.
    """
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    size = max(11, min(20, width // 14))
    font = ImageFont.load_default(size=size)
    side = min(max(round(max(font.getlength(row) for row in rows)) + 2 * PAD, 32), max(width, 96))
    top = round(size * 1.4) + 2 * PAD
    sheet = Image.new("RGB", (side + len(columns) * width, top + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        pen.text((side + column * width + width / 2, top / 2), _fitted(label, width, font), "black", font, anchor="mm")
    for row, label in enumerate(rows):
        pen.text((side / 2, top + row * height + height / 2), _fitted(label, side, font), "black", font, anchor="mm")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (side + index % len(columns) * width, top + index // len(columns) * height))
    return sheet


def _fitted(label: str, width: int, font: Any) -> str:
    """Return a label that is no wider than its place; its value, where the setting's name has none."""
    if font.getlength(label) <= width - PAD:
        return label
    label = label.partition(": ")[2] or label
    while len(label) > 1 and font.getlength(label + "…") > width - PAD:
        label = label[:-1]
    return label if font.getlength(label) <= width - PAD else label + "…"


def _png(picture: Image.Image) -> bytes:
    target = io.BytesIO()
    picture.save(target, "PNG")
    return target.getvalue()
