"""The programs in examples/composition run as they are, show what they say, and stay short and within public names."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import composition
from tests import shapes
from tests.conftest import SHAPES_MODEL, run_program, slow_and_campaign

GUIDE = Path(__file__).parents[2] / "docs" / "composition.md"
LONG = ("posterior_sampling",)  # runs far longer than it compiles: in a process without the suite's XLA flags
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "composition").glob("*.py"))
QUICKER = [
    path for path in EXAMPLES if path.stem not in ("posterior_sampling", "interpolation")
]  # the others run in the campaign


def cells(name: str, columns: int, rows: int = 1) -> list[np.ndarray]:
    """The pictures of a grid, `[64, 64, 3]` in 0..1, row by row."""
    with Image.open(name) as grid:
        assert grid.size == (64 * columns, 64 * rows)
        levels = np.asarray(grid.convert("RGB"), np.float32) / 255
    return [levels[64 * y : 64 * y + 64, 64 * x : 64 * x + 64] for y in range(rows) for x in range(columns)]


def check_posterior_sampling(made: dict, printed: str) -> None:
    ordinary, posterior = (float(value) for value in re.findall(r"missed by ([\d.]+) of", printed))
    assert posterior < 0.5 * ordinary
    truth, _, _, fitting = cells("posterior_sampling.png", 4)
    assert shapes.classify(truth) == shapes.classify(fitting) == shapes.Verdict("green", "white", "star")


def check_seeds_and_prompts(made: dict, printed: str) -> None:
    assert float(printed.split(":")[1]) <= 1e-5
    assert made["of_seeds_and_prompts"]._cache_size() == 1
    asked = [("red", "white"), ("blue", "yellow"), ("green", "black"), ("white", "gray")] * 3
    found = [shapes.classify(cell) for cell in cells("seeds_and_prompts.png", 4, 3)]
    assert [(verdict.colour, verdict.background) for verdict in found] == asked
    assert np.abs(made["pictures"][0] - made["pictures"][1]).mean() > 0.01  # seeds differ


def check_interpolation(made: dict, printed: str) -> None:
    grid = made["grid"].reshape(4, 5, 64, 64, 3)
    corners = made["pictures"](made["noise"](0).repeat(4, axis=0), made["embeds"])
    np.testing.assert_allclose(grid[[0, 0, -1, -1], [0, -1, 0, -1]], corners, atol=1e-3)
    stds = made["noises"].std(axis=(1, 2, 3))
    assert stds.min() > 0.95 * min(stds[0], stds[-1])
    cells("interpolation.png", 5, 4)
    with Image.open("interpolation.gif") as gif:
        assert gif.n_frames == 2 * len(made["frames"]) - 2


def check_panorama(made: dict, printed: str) -> None:
    around, turned, both = (np.asarray(made[name])[0] for name in ("around", "turned", "both"))
    with Image.open("panorama.png") as grid:
        assert grid.size == (256, 3 * 64)
    steps = np.abs(np.diff(turned, axis=1)).mean(axis=(0, 2))
    assert steps[127] < 2 * steps.mean()  # where the ends of `around` meet
    levels = np.clip(both / 2 + 0.5, 0, 1)
    for part, colour in ((levels[:, :64], "blue"), (levels[:, -64:], "yellow")):
        assert shapes.classify(part).background == colour
    assert np.abs(around - np.roll(around, 64, axis=1)).mean() > 0.01  # not one picture four times


def check_outpainting(made: dict, printed: str) -> None:
    whole, canvas, mask, *finished = cells("outpainting.png", 6)
    assert mask[:, :40].max() == 0
    assert mask[:, 40:].min() == 1
    for picture in finished:
        np.testing.assert_array_equal(picture[:, :32], whole[:, :32])  # the rest is faded in
        assert np.abs(picture[:, 40:] - canvas[:, 40:]).mean() > 0.1
        assert np.abs(picture[:, 40:] - whole[:, 40:]).mean() < 0.1


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("path", slow_and_campaign(EXAMPLES, *QUICKER), ids=lambda path: path.stem)
def test_an_example_shows_what_it_says(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "shapes_model").symlink_to(SHAPES_MODEL)
    monkeypatch.chdir(tmp_path)
    if path.stem in LONG:
        CHECKS[path.stem]({}, run_program(path, tmp_path))
    else:
        made = runpy.run_path(str(path))
        CHECKS[path.stem](made, capsys.readouterr().out)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_has_public_names_only(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert text.startswith("# %% [markdown]\n# # ")
    words = set()
    for node in ast.walk(ast.parse(text)):
        for field in ("id", "attr", "arg", "name", "module"):
            words |= set(str(getattr(node, field, None) or "").split("."))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "composition":
            assert node.attr in composition.__all__
    assert not [word for word in words if word.startswith("_") and not word.endswith("__")]


@pytest.mark.slow
def test_the_guide_runs_as_printed(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "shapes_model").symlink_to(SHAPES_MODEL)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    made: dict = {}
    for block in blocks:
        exec(compile(block, GUIDE.name, "exec"), made)
    pictures, noise = made["pictures"], made["noise"]
    found = [shapes.classify(np.clip(np.asarray(picture) / 2 + 0.5, 0, 1)) for picture in pictures]
    assert [verdict.background for verdict in found] == ["blue", "yellow"]
    assert made["latents"].shape == (1, 8, 32, 4)
    assert np.asarray(made["image"]).shape == (64, 64, 3)
    for name, arguments, shape in (
        ("restored", (noise,), (2, 64, 64, 3)),
        ("of_seeds_and_prompts", (noise, made["embeds"], made["negatives"]), (2, 2, 64, 64, 3)),
        ("panorama", (made["canvas"],), (2, 64, 256, 3)),
    ):
        assert jax.eval_shape(made[name], *arguments).shape == shape
