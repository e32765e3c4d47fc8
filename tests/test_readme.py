"""The README is short, and the code of every mode generates what the page says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

README = Path(__file__).parents[1] / "README.md"
SCRIPT = README.parent / "tpu_scripts" / "readme_pictures.py"
# What each picture may be taken for.
SHOWS = {
    "face": ("grinning face",),
    "panda": ("panda face",),
    "cool": ("smiling face with sunglasses",),
    "ball": ("crying face",),
    "apple": ("red apple",),
    "mixed": ("smiling face with horns", "smiling face with sunglasses"),
    "varied": ("crying face",),
}
OTHERS = ("rocket", "slice of pizza", "christmas tree", "purple heart", "penguin", "crown", "skull", "tulip")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("readme_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def taken_for(pipe, picture: Image.Image, names: list[str]) -> str:
    """The name whose embedding is nearest to the picture's, by the pipeline's own CLIP."""
    pixels = jnp.asarray(pipe.prior_image_processor(picture))
    tokens = pipe.prior_tokenizer(names, padding="max_length", return_tensors="np")
    seen = np.asarray(pipe.prior_image_encoder(pixels), np.float32)[0]
    said = np.asarray(pipe.prior_text_encoder(jnp.asarray(tokens.input_ids)).text_embeds, np.float32)
    return names[int(np.argmax(said @ seen / np.linalg.norm(said, axis=1)))]


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.read_text().splitlines()) <= 150
    docs, found, new = README.parent / "docs", set(), [README]
    while new:
        page = new.pop()
        found.add(page)
        targets = re.findall(r"\]\((?!https?:)([^)#]+\.md)", page.read_text())
        new += {(page.parent / target).resolve() for target in targets} - found
    assert set(docs.glob("*.md")) <= found


@pytest.mark.slow
def test_one_line_for_every_mode(script):
    """The block for every mode, as it is printed."""
    made: dict = {}
    exec(compile(script.modes_block(), "modes.md", "exec"), made)
    assert set(script.MODES) == set(SHOWS)
    names = sorted({name for expected in SHOWS.values() for name in expected} | set(OTHERS))
    for name, expected in SHOWS.items():
        assert taken_for(made["text2img"], made[name], names) in expected, name
    rows = {name: np.asarray(made[name], float) for name in ("face", "cool", "ball", "apple")}
    # Well under the hole the face is the same, but for what MoVQ sees across the border.
    assert abs(rows["cool"] - rows["face"])[54:].mean() < 5 < abs(rows["cool"] - rows["face"])[12:36].mean()
    # Balls lie where the hints have them: the paper around is white.
    for name in ("ball", "apple"):
        near = made["depth"] > 128
        assert rows[name][~near].mean() > 225 > 200 > rows[name][near].mean(), name
    modes = ("text2img", "img2img", "inpaint", "controlnet", "controlnet_img2img")
    assert all(made[mode].prior_prior is made["text2img"].prior_prior for mode in modes)
    assert made["inpaint"].movq is made["controlnet"].movq is made["text2img"].movq
