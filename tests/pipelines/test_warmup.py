"""After compiling ahead, a call compiles nothing; compiling ahead runs and caches nothing."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest
from PIL import Image

from kandinsky_jax import (
    CheckpointError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    TorchGenerator,
)
from tests.conftest import SHAPES_MODEL
from tests.pipelines.test_compile import compilations

SIZE = {"height": 64, "width": 64}
STEPS = {"num_inference_steps": 3, "prior_num_inference_steps": 3}
PICTURE = Image.new("RGB", (80, 70), "red")
MASK, HINT = np.eye(64) > 0, PICTURE.convert("L")
EMBEDS = np.full((2, 64), 0.1, np.float32)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Every program is compiled again, or comes from the suite's persistent cache, which counts as compiling too."""
    jax.clear_caches()


@pytest.mark.parametrize(
    ("name", "warm", "given"),
    [
        ("Combined", SIZE, {"prompt": "a red circle", **SIZE, **STEPS}),
        pytest.param(
            "InpaintCombined",
            SIZE | {"generator": TorchGenerator(0)},
            {"prompt": "red", "image": PICTURE, "mask_image": MASK, "generator": TorchGenerator(1), **SIZE, **STEPS},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "ControlnetImg2ImgCombined",
            SIZE | {"batch": 2},
            {"prompt": ["red", "blue"], "image": PICTURE, "hint": HINT, "strength": 0.7, **SIZE, **STEPS},
            marks=pytest.mark.slow,
        ),
        ("PriorEmb2Emb", {"num_images_per_prompt": 2}, {"prompt": "a", "image": PICTURE, "num_images_per_prompt": 2}),
        pytest.param(
            "",
            SIZE | {"batch": 2, "guidance_scale": 1.0, "output_type": "latent"},
            {
                "image_embeds": EMBEDS,
                "negative_image_embeds": None,
                "guidance_scale": 1.0,
                "num_inference_steps": 3,
                "output_type": "latent",
                **SIZE,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nothing_compiles_after_a_warmup(ours, name, warm, given):
    pipe = ours[f"KandinskyV22{name}Pipeline"]

    with compilations() as events:
        pipe.warmup(**warm)
    assert len(events) >= 3
    with compilations() as events:
        pipe(**{"generator": 1} | given)
    assert not events


@pytest.mark.slow
def test_the_picture_is_the_same_after_a_warmup(shapes_pipe):
    """The zeros of a rehearsal are not taken for results."""
    expected = shapes_pipe("a red circle", generator=3, output_type="np", **SIZE, **STEPS).images
    fresh = KandinskyV22CombinedPipeline.from_pipe(shapes_pipe)
    fresh.set_progress_bar_config(disable=True)
    fresh.warmup(**SIZE)
    assert np.array_equal(fresh("a red circle", generator=3, output_type="np", **SIZE, **STEPS).images, expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["diffusers", "orbax"])
def test_loading_compiles_meanwhile(ours, tmp_path, layout):
    """Programs compiled for a network without arrays are those of the loaded one."""
    ours["KandinskyV22Pipeline"].save_pretrained(tmp_path / "decoder", layout=layout)
    jax.clear_caches()
    with compilations() as events:
        pipe = KandinskyV22Pipeline.from_pretrained(tmp_path / "decoder", dtype="float32", warmup=SIZE)
    assert len(events) >= 3
    pipe.set_progress_bar_config(disable=True)
    with compilations() as events:
        pipe(EMBEDS[:1], EMBEDS[:1], num_inference_steps=3, generator=1, **SIZE)
    assert not events


@pytest.mark.slow
def test_a_call_of_ones_own_is_rehearsed_while_loading():
    seen = []

    def call(pipe) -> None:
        seen.append(pipe)
        pipe("a red circle", generator=0, output_type="latent", **SIZE, **STEPS)

    pipe = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32", warmup=call)
    pipe.set_progress_bar_config(disable=True)
    [twin] = seen
    assert twin is not pipe
    with compilations() as events:
        call(pipe)
    assert not events


def test_what_is_wrong_with_the_call_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("kandinsky_jax.pipelines.loading.load_network", lambda *_, **__: pytest.fail("read a network"))
    with pytest.raises(ValueError, match="height=32 is too small"):
        KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, warmup={"height": 32})
    with pytest.raises(TypeError, match="no_such_argument"):
        KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, warmup={"no_such_argument": 1})


@pytest.mark.slow
def test_a_failed_load_does_not_wait_for_the_compiler(ours, tmp_path):
    ours["KandinskyV22Pipeline"].save_pretrained(tmp_path / "decoder")
    weights = tmp_path / "decoder" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    jax.clear_caches()
    with pytest.raises(CheckpointError):
        KandinskyV22Pipeline.from_pretrained(tmp_path / "decoder", warmup={"height": 64, "width": 320})
    compiling = [thread for thread in threading.enumerate() if thread.name.startswith("compile")]
    assert compiling
    for thread in compiling:
        thread.join()
