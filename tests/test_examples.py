"""The programs in examples/ run as they are, show what they say, and stay short and within public names."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import KandinskyV22CombinedPipeline, diffusion
from tests.conftest import slow_and_campaign

FOLDER = Path(__file__).parents[1] / "examples"
ENGINES = sorted(FOLDER.glob("batch_on_*.py"))  # run by batch/test_engine_examples.py
# Run here, or by the tests of the folder's name; the app of a Hub Space is a program of another kind.
LABORATORY = sorted({*FOLDER.glob("*/*.py")} - {*FOLDER.glob("space/*.py")})
EXAMPLES = [*sorted(set(FOLDER.glob("*.py")) - set(ENGINES)), *FOLDER.glob("guiders/*.py")]
QUICKER = [path for path in EXAMPLES if path.stem not in ("gradient_to_noise",)]  # the others run in the campaign
MAX_LINES = dict.fromkeys(EXAMPLES, 20) | dict.fromkeys(ENGINES, 50) | dict.fromkeys(LABORATORY, 60)
NAMES = ["snowman", "red apple", "red heart", "rocket", "penguin", "slice of pizza", "christmas tree", "skull", "tulip"]


def taken_for(pipe, pictures: list[Image.Image]) -> list[str]:
    """The names whose embeddings are nearest to the pictures', by the pipeline's own CLIP."""
    pixels = np.concatenate([pipe.prior_image_processor(picture) for picture in pictures])
    tokens = pipe.prior_tokenizer(NAMES, padding="max_length", return_tensors="np")
    seen = np.asarray(jax.jit(pipe.prior_image_encoder)(pixels), np.float32)
    said = np.asarray(jax.jit(pipe.prior_text_encoder)(tokens.input_ids).text_embeds, np.float32)
    return [NAMES[i] for i in (seen @ (said / np.linalg.norm(said, axis=1, keepdims=True)).T).argmax(1)]


def picture(name: str) -> Image.Image:
    return Image.open(f"{name}.png").convert("RGB")


def check_own_guider(made: dict, printed: str) -> None:
    assert taken_for(made["pipe"], [picture("own_guider")]) == ["red apple"]
    unguided = diffusion.sample(
        made["pipe"].unet, made["noise"], made["cond"], None, made["schedule"], guider=diffusion.NoGuidance()
    )
    assert np.abs(made["latents"] - unguided).max() > 0.1


def check_own_sampler(made: dict, printed: str) -> None:
    ddim, own = map(float, re.findall(r"[\d.]+\d", printed.partition(":")[2]))
    assert 0 < own < 0.75 * ddim


def check_attention_maps(made: dict, printed: str) -> None:
    assert picture("attention_maps").size == (128, 64)
    assert taken_for(made["pipe"], [picture("attention_maps").crop((0, 0, 64, 64))]) == ["snowman"]
    means = made["loop"].cache / 25
    assert 0.1 < means.sum() < 1  # of each place's attention, the image tokens have the rest
    assert means.max() > 1.2 * means.min() > 0
    alone = diffusion.sample(
        made["pipe"].unet, made["noise"], made["cond"], made["uncond"], made["schedule"], guider=made["guider"]
    )
    np.testing.assert_allclose(made["loop"].solver[0], alone, atol=1e-3)


def check_swapped_block(made: dict, printed: str) -> None:
    pipe, ordinary = made["pipe"], KandinskyV22CombinedPipeline.from_pretrained("tiny").unet
    assert taken_for(pipe, [picture("swapped_block")]) == ["red apple"]
    embeds = jnp.ones((1, ordinary.config.encoder_hid_dim))
    swapped, own = (jax.jit(unet.condition)(embeds) for unet in (pipe.unet, ordinary))
    for part, own_part in zip(
        (*swapped.down_blocks, swapped.mid_block), (*own.down_blocks, own.mid_block), strict=True
    ):
        for (key, value), (own_key, own_value) in zip(part.attentions, own_part.attentions, strict=True):
            np.testing.assert_array_equal(value, own_value)
            np.testing.assert_array_equal(key, 1.5 * own_key)


def check_guidance_grid(made: dict, printed: str) -> None:
    grid = picture("guidance_grid")
    assert grid.size == (5 * 64, 64)
    found = taken_for(made["pipe"], [grid.crop((64 * i, 0, 64 * i + 64, 64)) for i in range(5)])
    assert found[0] != "red apple"  # scale 0 is unconditional
    assert set(found[1:]) == {"red apple"}


def check_gradient_to_noise(made: dict, printed: str) -> None:
    similarities = [float(value) for value in re.findall(r"similarity ([\d.]+)", printed)]
    assert len(similarities) == 4
    assert similarities == sorted(similarities)
    assert similarities[-1] > similarities[0] + 0.01


def check_high_scales(made: dict, printed: str) -> None:
    """At scale 8 other guiders show an apple, and at 16 all have moved less than CFG."""
    assert picture("high_scales").size == (4 * 64, 4 * 64)
    rows = {name: [Image.fromarray((x * 255).astype("uint8")) for x in row] for name, row in made["rows"].items()}
    eighth = [row[2] for name, row in rows.items() if name != "cfg"]
    assert taken_for(made["pipe"], eighth) == ["red apple"] * 3
    distances = {line.split()[0]: float(line.split()[-1]) for line in printed.splitlines()[:4]}
    assert distances["cfg"] > 1.5 * max(value for name, value in distances.items() if name != "cfg")


CHECKS = {
    "attention_maps": check_attention_maps,
    "gradient_to_noise": check_gradient_to_noise,
    "guidance_grid": check_guidance_grid,
    "high_scales": check_high_scales,
    "own_guider": check_own_guider,
    "own_sampler": check_own_sampler,
    "swapped_block": check_swapped_block,
}


@pytest.mark.parametrize("path", slow_and_campaign(EXAMPLES, *QUICKER), ids=lambda path: path.stem)
def test_an_example_shows_what_it_says(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path(str(path))
    CHECKS[path.stem](made, capsys.readouterr().out)


def test_every_example_of_a_method_is_run():
    """Those in a folder of their own are run by tests of that name, which check what they show."""
    for path in LABORATORY:
        topic = path.parent.name
        tests = FOLDER.parent / "tests" / topic / "test_examples.py"
        assert topic == "guiders" or path.stem in tests.read_text(), path


@pytest.mark.parametrize("path", MAX_LINES, ids=lambda path: path.stem)
def test_an_example_is_short_and_has_public_names_only(path):
    text = path.read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= MAX_LINES[path]
    words = set()
    for node in ast.walk(ast.parse(text)):
        for field in ("id", "attr", "arg", "name", "module"):
            words |= set(str(getattr(node, field, None) or "").split("."))
    assert not [word for word in words if word.startswith("_") and not word.endswith("__")]
