"""X/Y grids: one request for each pair of values of two settings, pasted into one labelled picture."""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import io
import json
import logging
import secrets
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import Component
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from kandinsky_jax.common.errors import quote
from kandinsky_jax.serve.page import views
from kandinsky_jax.serve.page.context import Job, PageContext
from kandinsky_jax.serve.page.restore import GRID
from kandinsky_jax.serve.page.runs import Done, Step, failure_view, run, run_of
from kandinsky_jax.serve.page.sessions import KeptPicture, Session
from kandinsky_jax.serve.requests import RequestError
from kandinsky_jax.serve.tickets import Cancelled, Progress, QueueFull

MAX_CELLS = 36
SEPARATOR = ","
TEXT_SEPARATOR = "|"  # of prompts, which have commas
NO_GRID = "The labelled picture could not be made; the server's log says why. Its cells are in the gallery"
RETRY = 1.0  # seconds until a cell is offered again to a full queue
PAD = 6  # pixels around a label
MAX_LABEL = 1000  # characters that are looked at, more than there is room for
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Axis:
    """A setting that a grid varies.

    Args:
        name: of the field of `ImageRequest`.
        read: converts one value.
        example: of its values.
        separator: between them.
    """

    name: str
    read: Callable[[str], Any]
    example: str
    separator: str = SEPARATOR


AXES = {
    "Steps": Axis("num_inference_steps", int, "10, 20, 50"),
    "Guidance scale": Axis("guidance_scale", float, "1, 2.5, 4"),
    "Prior steps": Axis("prior_num_inference_steps", int, "5, 10, 25"),
    "Prior guidance scale": Axis("prior_guidance_scale", float, "1, 2.5, 4"),
    "Seed": Axis("seed", int, "1, 2, 3"),
    "Scheduler": Axis("scheduler", str, "ddim, euler"),
    "Strength": Axis("strength", float, "0.2, 0.5, 0.8"),
    "Prompt": Axis("prompt", str, "a red fox | a blue owl", TEXT_SEPARATOR),
    "Negative prompt": Axis("negative_prompt", str, "blurred | dark", TEXT_SEPARATOR),
}


def build_axes() -> dict[str, Component]:
    """Create the inputs of a grid."""
    inputs: dict[str, Component] = {}
    hint = (
        "Values with commas between them; prompts with | between them. X or Y alone is one row or column. "
        "Grid, below the tab's inputs, generates it."
    )
    gr.Markdown(hint, elem_classes="kj-small")
    for axis, usual in (("x", "Steps"), ("y", "Guidance scale")):
        with gr.Row():
            inputs[f"{axis}_setting"] = gr.Dropdown(
                list(AXES), value=usual, label=f"{axis.upper()}: setting", min_width=140
            )
            inputs[f"{axis}_values"] = gr.Textbox(
                label=f"{axis.upper()}: values",
                placeholder=example(usual),
                max_lines=1,
                min_width=160,
            )
    return inputs


def example(setting: str | None) -> str:
    """Return words with an example of a setting's values; "" for one that there is not."""
    return f"such as {AXES[setting].example}" if setting in AXES else ""


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
            f"{axis} of the grid, {setting}, has no values; give some under X/Y grid, such as {one.example}"
        )
    try:
        return [one.read(part) for part in parts]
    except ValueError:
        wrong = f"{axis} of the grid, {setting}, is {quote(text, 80)}"
        raise RequestError(f"{wrong}; needed are numbers with commas between them, such as {one.example}") from None


class Change(NamedTuple):
    """A value of a setting that a grid varies."""

    setting: str
    value: Any

    @property
    def label(self) -> str:
        """Its words on the grid."""
        return f"{self.setting}: {f'{self.value:g}' if isinstance(self.value, float) else self.value}"


@dataclass(frozen=True)
class GridPlan:
    """A grid that is to be generated.

    Args:
        jobs: row by row.
        columns, rows: labels of X and Y; one empty label where an axis is not used.
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
    axes = {axis: (values[f"{axis.lower()}_setting"], values[f"{axis.lower()}_values"]) for axis in ("X", "Y")}
    given = {axis: pair for axis, pair in axes.items() if (pair[1] or "").strip()} or axes
    if len({setting for setting, _ in given.values()}) < len(given):
        raise RequestError(f"X and Y of the grid are both {axes['X'][0]}; choose two settings")
    read = {axis: read_values(setting, text, axis) for axis, (setting, text) in given.items()}
    across, down = (
        [Change(axes[axis][0], value) for value in read[axis]] if axis in read else [None] for axis in ("X", "Y")
    )
    if len(across) * len(down) > MAX_CELLS:
        raise RequestError(f"the grid has {len(across)} x {len(down)} cells; there may be {MAX_CELLS}")
    seed = secrets.randbits(32) if base.request.seed is None else base.request.seed
    common = dataclasses.replace(base.request, num_images=1, seed=seed)
    jobs = []
    for below in down:
        for beside in across:
            changes = [change for change in (beside, below) if change is not None]
            request = dataclasses.replace(common, **{AXES[one.setting].name: one.value for one in changes})
            try:
                context.model.complete(request, context.settings)
            except RequestError as error:
                where = ", ".join(one.label for one in changes)
                raise RequestError(f"the cell {where}: {error}", error.param) from None
            jobs.append(dataclasses.replace(base, request=request))
    columns, rows = (tuple(one.label if one else "" for one in changes) for changes in (across, down))
    return GridPlan(tuple(jobs), columns, rows)


class GridRun:
    """What is known of a grid that runs: its cells, and the share of all their work that is done.

    Args:
        planned: what is generated.
        session: keeps the pictures.
    """

    def __init__(self, planned: GridPlan, session: Session):
        self.planned, self.session = planned, session
        self.first = session.reserve(len(planned.jobs))  # number of the first cell in the gallery, row by row
        self.done: dict[int, Done] = {}
        self._shares: dict[int, float] = {}
        self._steps: dict[int, Step] = {}
        self._began: float | None = None
        self._share = 0.0

    @property
    def cells(self) -> list[KeptPicture]:
        """The pictures that are there, row by row."""
        return [kept for number in sorted(self.done) for kept in self.done[number].kept]

    @property
    def kept(self) -> str:
        """Words for the pictures of a grid that has ended early; "" where there are none."""
        count = len(self.done)
        return f"{count} of {len(self.planned.jobs)} pictures, in the gallery." if count else ""

    def note(self, number: int, event: str | Step | Done) -> None:
        """Note an event of a cell."""
        if isinstance(event, Step):
            self._began = time.monotonic() if self._began is None else self._began
            self._shares[number], self._steps[number] = event.progress.done, event
        elif isinstance(event, Done):
            self.done[number], self._shares[number] = event, 1.0

    def view(self, number: int, event: str | Step | Done) -> str:
        """Return the view after an event of a cell; "" for none: that of the first cell that is not done is shown."""
        if self._began is None:
            first = next((one for one in range(len(self.planned.jobs)) if one not in self.done), 0)
            return event if isinstance(event, str) and number == first else ""
        running = [one for one in sorted(self._steps) if one not in self.done]
        if not running or number != running[0] or not isinstance(event, Step):
            return ""
        of = f"picture {number + 1} of {len(self.planned.jobs)}"
        return views.progress(self._whole(event.progress), event.alt, event.note, of)

    def _whole(self, progress: Progress) -> Progress:
        """Return a cell's progress with the share and the time of the whole grid, which never falls back."""
        self._share = max(self._share, sum(self._shares.values()) / len(self.planned.jobs))
        elapsed = time.monotonic() - (self._began or 0.0)
        left = elapsed / self._share * (1 - self._share) if self._share else None
        return dataclasses.replace(progress, done=self._share, seconds_left=left)


async def shown_grid(plan: Callable[[], GridPlan], session: Session, context: PageContext) -> AsyncIterator[str | Done]:
    """Generate a grid; a cancelled one leaves the cells that are done in the gallery."""
    began = time.monotonic()
    grid: GridRun | None = None
    try:
        with run_of(session):
            yield views.working("Starting")
            planned = await asyncio.to_thread(plan)
            grid = GridRun(planned, session)
            async for number, event in _cells(grid, session, context):
                grid.note(number, event)
                if isinstance(event, Done):
                    yield event
                elif view := await asyncio.to_thread(grid.view, number, event):
                    yield view
            note = planned.jobs[0].note
            try:
                sheet = await asyncio.to_thread(_keep_grid, grid.cells, planned, session)
            except Exception as error:  # what was generated is shown all the same
                log.error("a grid was not made of its %d pictures", len(grid.cells), exc_info=error)
                note = ". ".join(filter(None, (NO_GRID, note)))
                yield views.finished(grid.cells, session.key, note, time.monotonic() - began)
            else:
                made = f"1 grid of {len(grid.cells)} pictures"
                yield views.finished([sheet], session.key, note, time.monotonic() - began, made)
                yield Done((sheet,), planned.jobs[0].request)
    except Exception as error:
        if view := failure_view(error, session, context, grid.kept if grid else ""):
            yield view


def _keep_grid(cells: Sequence[KeptPicture], planned: GridPlan, session: Session) -> KeptPicture:
    """Make the labelled picture, and put it into the gallery."""
    picture = label_grid([cell.picture() for cell in cells], planned.columns, planned.rows)
    sides = (("Across", planned.columns), ("Down", planned.rows))
    about = " ".join(["Grid.", *(f"{name}: {', '.join(labels)}." for name, labels in sides if any(labels))])
    return session.add(picture, _png(picture, planned), None, about, about)


async def _cells(grid: GridRun, session: Session, context: PageContext) -> AsyncIterator[tuple[int, str | Step | Done]]:
    """Run cells, as many at once as share a step; yield their numbers and events, and what became of them.

    Raises:
        Exception: of the first cell that fails; the others are cancelled. `Cancelled` only once all have ended: a
            server that stops finishes those that run.
    """
    jobs = grid.planned.jobs
    inbox: asyncio.Queue[tuple[int, str | Step | Done | Exception | None]] = asyncio.Queue()
    places = asyncio.Semaphore(max(context.settings.batch_sizes))

    async def one(number: int, job: Job) -> None:
        try:
            async with places:
                async for event in _patient(job, session, context, grid.first + number):
                    inbox.put_nowait((number, event))
            inbox.put_nowait((number, None))
        except Exception as error:
            inbox.put_nowait((number, error))

    tasks = [asyncio.create_task(one(number, job)) for number, job in enumerate(jobs)]
    try:
        left, cancelled = len(tasks), None
        while left:
            number, event = await inbox.get()
            if isinstance(event, Cancelled):
                cancelled, left = event, left - 1
            elif isinstance(event, Exception):
                raise event
            elif event is None:
                left -= 1
            else:
                yield number, event
        if cancelled is not None:
            raise cancelled
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _patient(job: Job, session: Session, context: PageContext, number: int) -> AsyncIterator[str | Step | Done]:
    """Run a cell; where the queue is full, wait for a place."""
    while not session.cancelled:
        try:
            async for event in run(job, session, context, number):
                yield event
            return
        except QueueFull:
            if context.service.state.stopping:
                raise Cancelled("the server is stopping") from None
            yield views.working("Waiting for a place in the queue")
            await asyncio.sleep(RETRY)
    raise Cancelled("the grid was cancelled")


def label_grid(cells: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Paste pictures into one, with labels above and at the left.

    Args:
        cells: row by row, of one size or smaller than the largest.
        columns, rows: labels.
    """
    columns, rows = [_one_line(label) for label in columns], [_one_line(label) for label in rows]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    size = max(11, min(20, width // 14))
    font = ImageFont.load_default(size=size)
    side, top = _label_width(rows, width, font), round(size * 1.4) + 2 * PAD
    side, top = side if any(rows) else 0, top if any(columns) else 0
    sheet = Image.new("RGB", (side + len(columns) * width, top + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns if top else ()):
        pen.text((side + column * width + width / 2, top / 2), _fitted(label, width, font), "black", font, anchor="mm")
    for row, label in enumerate(rows if side else ()):
        text = "\n".join(_fitted(line, side, font) for line in label.split(": ", 1))
        middle = (side / 2, top + row * height + height / 2)
        pen.multiline_text(middle, text, "black", font, anchor="mm", align="center")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (side + index % len(columns) * width, top + index // len(columns) * height))
    return sheet


def _label_width(rows: Sequence[str], width: int, font: Any) -> int:
    """Return the width of the rows' labels: the setting's name above its value."""
    longest = max(font.getlength(line) for row in rows for line in row.split(": ", 1))
    return min(max(round(longest) + 2 * PAD, 32), max(width, 160))


def _one_line(label: str) -> str:
    """Return the beginning of a label without line breaks, and other characters that are not drawn but steer."""
    shown = (" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in label[:MAX_LABEL])
    return " ".join("".join(shown).split())


def _fitted(label: str, width: int, font: Any) -> str:
    """Return a label that is no wider than its place; its value, where the setting's name has none."""
    if font.getlength(label) <= width - PAD:
        return label
    label = label.partition(": ")[2] or label
    if font.getlength(label) <= width - PAD:
        return label
    lengths = range(1, len(label))
    fitting = bisect.bisect_right(lengths, width - PAD, key=lambda length: font.getlength(label[:length] + "…"))
    return label[: max(1, fitting)] + "…"


def _png(picture: Image.Image, planned: GridPlan) -> bytes:
    """Encode a grid, with a text that says so."""
    facts = PngInfo()
    facts.add_itxt(GRID, json.dumps({"x": planned.columns, "y": planned.rows}))
    target = io.BytesIO()
    picture.save(target, "PNG", pnginfo=facts)
    return target.getvalue()
