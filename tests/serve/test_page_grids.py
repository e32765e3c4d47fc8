"""A grid while it runs, where it ends early, and its file."""

from __future__ import annotations

import asyncio

import pytest
from PIL import Image

from kandinsky_jax.serve.page.context import Job
from kandinsky_jax.serve.page.grids import GridPlan, GridRun, _keep_grid, read_values, shown_grid
from kandinsky_jax.serve.page.restore import read_record
from kandinsky_jax.serve.page.runs import Done, Step, keep, shown
from kandinsky_jax.serve.page.sessions import Session
from kandinsky_jax.serve.requests import ImageRequest, RequestError
from kandinsky_jax.serve.tickets import Finished, GeneratedImage, Progress
from tests.serve.browsers import site

PLAIN = Image.new("RGB", (64, 64), "red")
JOB = Job(ImageRequest(prompt="a red circle", height=64, width=64, seed=1))
PLAN = GridPlan((JOB,) * 4, columns=("Steps: 1", "Steps: 2"), rows=("Seed: 1", "Seed: 2"))


@pytest.fixture(scope="module")
def server():
    with site(generates=False) as running:
        yield running


def step(done: float) -> Step:
    """A cell's progress."""
    return Step(Progress(done, 1, 2, 0.0, (None,)), "a red circle", "")


def test_the_progress_is_that_of_the_whole_grid_and_never_falls_back():
    run = GridRun(PLAN, Session())
    assert run.view(0, "waits") == "waits"
    shares = []
    for number, event in ((0, step(0.5)), (1, step(0.5)), (0, step(0.75)), (0, Done((), JOB.request)), (1, step(0.5))):
        run.note(number, event)
        view = run.view(number, event)
        shares += [int(view.partition('value="')[2].partition('"')[0])] if view else []
    assert shares == [12, 31, 38]
    assert "picture 2 of 4" in view
    run.note(2, step(0.0))
    assert run.view(2, step(0.0)) == ""  # another one is shown
    assert run.view(1, "waits") == ""


def test_cells_are_numbered_by_their_place_and_not_by_when_they_are_done():
    session = Session()
    session.add(PLAIN, b"x", {"seed": 1}, "before", "")
    run = GridRun(PLAN, session)
    for number in (2, 0, 3, 1):
        image = GeneratedImage(PLAIN, {"seed": number})
        run.note(number, Done((keep(image, JOB, session, run.first + number),), JOB.request))
    _keep_grid(run.cells, PLAN, session)
    kept = session.listed()
    assert [(one.number, (one.record or {}).get("seed")) for one in kept] == [
        (1, 1),
        (2, 0),
        (3, 1),
        (4, 2),
        (5, 3),
        (6, None),
    ]
    assert kept[-1].name == "kandinsky-0006.png"


def test_a_grids_file_says_that_it_is_one():
    session = Session()
    sheet = _keep_grid([session.add(PLAIN, _png(), {}, "", "") for _ in range(4)], PLAN, session)
    with pytest.raises(RequestError, match="a grid has no settings of its own; drop one of its pictures"):
        read_record(sheet.png)


def _png() -> bytes:
    session = Session()
    return keep(GeneratedImage(PLAIN, {"seed": 1}), JOB, session).png


def test_a_cancelled_grid_says_what_there_is_of_it(server):
    async def cancelled() -> str:
        session, last = Session(), ""
        async for event in shown_grid(lambda: PLAN, session, server.context):
            last = event if isinstance(event, str) else last
            if len(session.pictures) == 2:
                session.cancel()
            for ticket in session.tickets:
                ticket.send(Finished((GeneratedImage(PLAIN, {"seed": 1}),)))
        return last

    last = asyncio.run(cancelled())
    assert "Cancelled" in last
    assert "of 4 pictures, in the gallery." in last
    assert "Nothing was generated" not in last


def test_a_server_that_stops_says_so_and_nothing_else():
    with site(generates=False) as stopped:
        stopped.service.stop(0)

        async def last(events) -> str:
            return [event async for event in events][-1]

        for events in (
            shown(lambda: JOB, Session(), stopped.context),
            shown_grid(lambda: PLAN, Session(), stopped.context),
        ):
            view = asyncio.run(last(events))
            assert "The server is stopping." in view
            assert "kj-error" not in view


@pytest.mark.parametrize("text", ["1 2 4", "1-4", "1;2"])
def test_values_without_commas_are_answered_by_an_example(text):
    with pytest.raises(
        RequestError, match=f"Steps, is '{text}'; needed are numbers with commas between them, such as 10, 20"
    ):
        read_values("Steps", text, "X")
