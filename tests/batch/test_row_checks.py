"""Faults of a row affect that row only: found before anything large is allocated, reported alike in every run."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import re
import resource
import uuid

import numpy as np
import pytest
from PIL import Image

from kandinsky_jax.batch.requests import MAX_KEY, Checker, RowError, json_value
from kandinsky_jax.batch.rows import Raw
from kandinsky_jax.common.errors import shorten

DEFAULTS = {"steps": 10, "prior_steps": 5, "guidance_scale": 4.0, "prior_guidance_scale": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (1, 1_000_000)).save(root / "tall.png")
    Image.new("RGB", (1_000_000, 1)).save(root / "wide.png")
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    Image.new("RGB", (64, 64)).save(root / "good.png")
    Image.new("L", (64, 64)).save(root / "black.png")
    Image.fromarray(np.pad(np.full((3, 3), 255, np.uint8), ((9, 52), (9, 52)))).save(root / "small.png")
    Image.fromarray(np.full((64, 64), 4000, np.uint16)).save(root / "12-bit.png")
    (root / "cut.png").write_bytes((root / "good.png").read_bytes()[:60])
    (root / "text.png").write_text("no picture")
    os.mkfifo(root / "pipe.png")
    with (root / "large.png").open("wb") as file:
        file.truncate(10**9)
    return root


def error_of(pipe, mode, folder, row) -> str:
    """Return the entry of a row in errors.jsonl, after checking that it is reproducible, JSON, and short."""
    lines = []
    for _ in range(2):
        raw = Raw(3, {"prompt": "x"} | row)
        with pytest.raises(RowError) as caught:
            Checker(pipe, mode, str(folder), DEFAULTS).check(raw)
        lines.append(json.dumps(caught.value.record(raw), allow_nan=False))
    assert lines[0] == lines[1]
    assert not re.search(r"0x[0-9a-f]{4}|object at|/tmp", lines[0])
    assert len(caught.value.args[0]) < 500
    return caught.value.args[0]


HUGE = 10**400
GENERATE = [
    ({"height": 4096, "width": 4096}, "height and width: 4096 x 4096 is more than 4,194,304 pixels"),
    ({"height": 2048, "width": 2048, "num_images": 1000}, "num_images: 1000 of 2048 x 2048 are more than"),
    ({"steps": 10**9}, "steps: .*takes 1 to 1000"),
    ({"prior_steps": HUGE}, "prior_steps: .*takes 2 to 1000"),
    ({"steps": 1e308}, "steps: .*takes 1 to 1000"),
    ({"steps": "1e400"}, "steps: must be a whole number, got '1e400'"),
    *(({name: HUGE}, f"{name}.*10000") for name in ("seed", "height", "width", "num_images", "guidance_scale")),
    ({"num_images": 1e300}, "num_images: must be at most 1000"),
    ({"id": "x" * 96}, "id: may hold letters, digits, - and _, at most 95 of them"),
    ({"id": "x" * 200}, "id: may hold"),
    ({"id": "x" * 94, "num_images": 2}, "id: with num_images=2, at most 93 characters"),
    *(({"id": name}, "id: ") for name in (float("inf"), HUGE, b"\xff", "\ud800", {"a": float("nan")}, "y" * 10**6)),
    ({"prompt": ["x" * 10**6]}, r"prompt: must be text, got \['xxx"),
    ({"prompt": "\ud83d"}, "prompt: is not UTF-8"),
    ({"prompt": b"caf\xe9"}, "prompt: is not UTF-8"),
    ({"metadata": {"caption": ["caf\udce9"]}}, "metadata: is not UTF-8"),
    ({"metadata": json.loads("[" * 60 + "]" * 60)}, "metadata: is nested deeper than 50 levels"),
    ({f"{i}{'k' * 1000}": 1 for i in range(100)}, r"there is no column '0kkk.*and \d\d more"),
]


@pytest.mark.parametrize(("row", "says"), GENERATE, ids=range(len(GENERATE)))
def test_row_beyond_its_bounds_is_an_error_of_its_own(shapes_pipe, folder, row, says):
    assert re.search(says, error_of(shapes_pipe, "generate", folder, row))


def test_row_at_its_bounds_is_good(shapes_pipe, folder):
    checker = Checker(shapes_pipe, "generate", str(folder), DEFAULTS)
    rows = [
        {"id": "x" * MAX_KEY},
        {"id": "x" * 91, "num_images": 1000},
        {"height": 2048, "width": 2048, "num_images": 64},
        {"height": 64, "width": 4096},
        {"prompt": "café".encode()},
    ]
    for row in rows:
        assert checker.check(Raw(0, {"prompt": "x"} | row)).prompt in ("x", "café")


PICTURES = [
    ("tall.png", "image has 1000000 x 1 pixels .*too long for its proportions.*give height and width"),
    ("wide.png", "image has 1 x 1000000 pixels"),
    ("bomb.png", "image bomb.png: it is too large to be opened safely"),
    ("large.png", "image: large.png has more than 268,435,456 bytes"),
    ("pipe.png", "image: there is no file pipe.png"),
    ("text.png", "image text.png: it cannot be read as a picture: cannot identify it as any of"),
    ("cut.png", "image cut.png: it cannot be read as a picture"),
    ("12-bit.png", "image has values from 4000 to 4000, needed are"),
    ("x" * 300, "image: xxx.*cannot be read: File name too long"),
    ("a\0b.png", "image: embedded null byte"),
]


@pytest.mark.parametrize(("name", "says"), PICTURES, ids=[name[:10] for name, _ in PICTURES])
def test_extreme_picture_is_an_error_of_its_row(ours, folder, name, says):
    pipe = ours["KandinskyV22Img2ImgCombinedPipeline"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert re.search(says, error_of(pipe, "img2img", folder, {"image": name}))
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000
    )  # KB: large.png, read as far as allowed


def test_long_picture_is_used_where_its_row_says_a_size(ours, folder):
    pipe = ours["KandinskyV22Img2ImgCombinedPipeline"]
    row = {"prompt": "x", "image": "tall.png", "height": 64, "width": 64}
    assert Checker(pipe, "img2img", str(folder), DEFAULTS).check(Raw(0, row)).pictures["image"].size == (64, 64)


def test_mask_that_repaints_nothing_is_an_error_of_its_row(ours, folder):
    pipe = ours["KandinskyV22InpaintCombinedPipeline"]
    for name, says in (
        ("black.png", "mask repaints nothing; white is repainted"),
        ("small.png", "mask repaints nothing: its white parts are smaller than 8 pixels"),
    ):
        assert error_of(pipe, "inpaint", folder, {"image": "good.png", "mask": name}) == says


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (float("inf"), "Infinity"),
        (-np.inf, "-Infinity"),
        ([float("nan"), 1.5, 2**70, True, None], ["NaN", 1.5, 2**70, True, None]),
        ({"a": (b"\x00\xff", {1: "x"})}, {"a": ["AP8=", {"1": "x"}]}),
        (datetime.datetime(2024, 2, 29, 1, 2, 3, tzinfo=datetime.UTC), "2024-02-29T01:02:03+00:00"),
        ({"day": datetime.date(2024, 2, 29), "at": datetime.time(1, 2)}, {"day": "2024-02-29", "at": "01:02:00"}),
        (decimal.Decimal("1.10"), "1.10"),
        (decimal.Decimal("Infinity"), "Infinity"),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        ("é\u2028", "é\u2028"),
    ],
)
def test_metadata_of_any_type_is_json(value, wanted):
    assert json_value(value) == wanted
    json.dumps(json_value(value), allow_nan=False)


def test_messages_have_no_addresses():
    assert shorten("cannot identify <_io.BytesIO object at 0x7f00deadbeef>") == "cannot identify <_io.BytesIO>"
    assert "0x" not in shorten(object())
