"""The programs in examples/editing run as they are, show what they say, and stay short and within public names."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import KandinskyV22CombinedPipeline
from tests.conftest import slow_and_campaign

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "editing"
EXAMPLES = sorted(FOLDER.glob("*.py"))
QUICKER = [path for path in EXAMPLES if path.stem not in ("null_embeds",)]  # the others run in the campaign


def parts(name: str, count: int) -> list[np.ndarray]:
    """The pictures side by side that an example has written, in 0..255."""
    sheet = np.asarray(Image.open(f"{name}.png").convert("RGB"), np.float32)
    assert sheet.shape == (64, 64 * count, 3)
    return np.split(sheet, count, axis=1)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def taken_for(pipe: KandinskyV22CombinedPipeline, picture: Image.Image) -> str:
    """The name whose embedding is nearest to the picture's, by the pipeline's own CLIP."""
    names = ["grinning face", "crying face", "red apple", "snowman"]
    seen = np.asarray(pipe.prior_image_encoder(pipe.prior_image_processor(picture)), np.float32)
    tokens = pipe.prior_tokenizer(names, padding="max_length", return_tensors="np")
    said = np.asarray(pipe.prior_text_encoder(tokens.input_ids).text_embeds, np.float32)
    return names[int((seen @ (said / np.linalg.norm(said, axis=1, keepdims=True)).T).argmax())]


def check_ddim_inversion(made: dict, printed: str) -> None:
    assert made["distances"][0] > 2 > 1 > made["distances"][5]
    round_trip, usual, _, exact = parts("ddim_inversion", 4)
    assert apart(usual, round_trip) > 2 > 1 > apart(exact, round_trip)


def check_edit_by_prompt(made: dict, printed: str) -> None:
    assert float(re.findall(r"[\d.e-]+$", printed.strip())[0]) < 1e-3
    round_trip, same, edited = parts("edit_by_prompt", 3)
    assert apart(same, round_trip) < 0.5
    assert apart(edited, round_trip) > 5
    assert taken_for(made["pipe"], Image.fromarray(edited.astype(np.uint8))) == "crying face"


def check_edit_by_arithmetic(made: dict, printed: str) -> None:
    pictures = parts("edit_by_arithmetic", 6)
    greener = [picture[..., 1].mean() - picture[..., 0].mean() for picture in pictures]
    assert greener[0] < greener[1] < greener[2]
    assert greener[3] < greener[4] < greener[5]


def check_edit_in_mask(made: dict, printed: str) -> None:
    assert 0.05 < made["mask"].mean() < 0.6
    kept = np.broadcast_to(made["mask"] == 0, made["latents"].shape)
    np.testing.assert_array_equal(np.asarray(made["edited"])[kept], np.asarray(made["latents"])[kept])
    assert jnp.abs(made["edited"] - made["latents"]).max() > 0.3


def check_null_embeds(made: dict, printed: str) -> None:
    without, with_them = made["distances"]
    assert with_them < 0.7 * without
    round_trip, *_, edited = parts("null_embeds", 4)
    assert apart(edited, round_trip) > 5


CHECKS = {path.stem: globals()[f"check_{path.stem}"] for path in EXAMPLES}


@pytest.mark.parametrize("path", slow_and_campaign(EXAMPLES, *QUICKER), ids=lambda path: path.stem)
def test_examples_show_what_they_say(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    CHECKS[path.stem](runpy.run_path(str(path)), capsys.readouterr().out)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_cells_and_name_nothing_private(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert text.startswith("# %% [markdown]\n# # ")
    assert text.count("\n# %%\n") >= 2
    words = set()
    for node in ast.walk(ast.parse(text)):
        for field in ("id", "attr", "arg", "name", "module"):
            words |= set(str(getattr(node, field, None) or "").split("."))
    assert not [word for word in words if word.startswith("_") and word != "_"]


@pytest.mark.campaign  # with 50 steps, as a reader would run it
def test_the_guide():
    made: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "editing.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "editing.md", "exec"), made)
        if "back" in made and "distance" not in made:
            made["distance"] = jnp.abs(made["back"] - made["latents"]).max()
    assert made["distance"] < 0.1
    assert isinstance(made["pipe"], KandinskyV22CombinedPipeline)
    for name in ("edited", "shifted", "halfway"):
        assert np.isfinite(made[name]).all()
