"""Wrong arguments of any kind raise short errors of our types."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kandinsky_jax
from kandinsky_jax import images
from kandinsky_jax.diffusion import rng
from kandinsky_jax.pipelines import checks

ODD = {
    "5,000 digits": 10**5000,
    "-5,000 digits": -(10**5000),
    "beyond floats": 10**400,
    "a long list": list(range(100_000)),
    "a long text": "x" * 10_000,
    "bytes": b"x" * 5_000,
    "complex": 1j,
    "NumPy's complex": np.complex64(1j),
    "an object": object(),
}
CHECKS = {
    "count": lambda x: checks.count(x, "num_images_per_prompt"),
    "side": lambda x: checks.side(x, "height"),
    "guidance": checks.guidance,
    "interval": lambda x: checks.interval(x, 10),
    "interval's ends": lambda x: checks.interval((x, x), 10),
    "strength": lambda x: checks.strength(x, 10),
    "choice": lambda x: checks.choice(x, "output_type", ("pil", "np")),
    "callback": lambda x: checks.callback(None, [x], ("latents",)),
    "prompt": lambda x: checks.texts(["a", [x]], "prompt"),
    "weights": lambda x: checks.interpolation(["a"], [x]),
    "latents": lambda x: checks.latents(x, (1, 4, 8, 8)),
    "embeds": lambda x: checks.embeds(x, "image_embeds", 64),
    "generator": lambda x: rng.noise_source(x, 1, rng.PRIOR_STREAM),
    "torch generator": rng.TorchGenerator,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("value", ODD)
def test_odd_values_are_refused_in_a_short_message(check, value):
    with pytest.raises((ValueError, TypeError)) as caught:
        CHECKS[check](ODD[value])
    assert len(str(caught.value)) < 500
    assert "digits" not in str(caught.value)  # Python's own words


@pytest.mark.parametrize("scale", [4, 4.0, np.float32(4), np.array(4), jnp.float32(4), torch.tensor(4.0)], ids=repr)
def test_a_guidance_scale_may_be_an_array_without_axes(scale):
    assert checks.guidance(scale) == 4.0
    assert isinstance(checks.guidance(scale), float)


def test_a_raw_key_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"raw key of shape \(3,\), needed is \[2\]"):
        rng.noise_source(jnp.zeros(3, jnp.uint32), 1, rng.PRIOR_STREAM)
    assert rng.noise_source(jnp.zeros(2, jnp.uint32), 1, rng.PRIOR_STREAM)


@pytest.mark.parametrize("inputs", ["latents", 7, object()], ids=["name", "number", "object"])
def test_the_tensors_of_a_callback_are_a_list(inputs):
    with pytest.raises(TypeError, match="callback_on_step_end_tensor_inputs must be a list of names, got"):
        checks.callback(print, inputs, ("latents",))


def test_a_list_of_pictures_that_holds_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(ValueError, match=r"image.* is a list in 4 others; give one list of pictures"):
        images.pictures(value, "image", 64, 64)


@pytest.mark.parametrize(
    "value", ["tiny", None, kandinsky_jax.KandinskyV22Pipeline, object()], ids=["name", "none", "class", "object"]
)
@pytest.mark.parametrize("name", ["AutoPipelineForText2Image", "AutoPipelineForInpainting", "KandinskyV22Pipeline"])
def test_from_pipe_takes_pipelines_only(name, value):
    with pytest.raises(TypeError, match=rf"{name}.from_pipe takes pipelines of kandinsky_jax"):
        getattr(kandinsky_jax, name).from_pipe(value)


@pytest.mark.parametrize("given", ["\ud800", ["fine", "a \udfff b"]])
def test_half_a_surrogate_pair_is_no_text(given):
    with pytest.raises(ValueError, match=r"^prompt(\[1\])? is not text: character [02] is '\\ud"):
        checks.texts(given, "prompt")


@pytest.mark.parametrize("name", ["guidance", "latents", "embeds"])
def test_a_traced_array_points_to_the_public_core(name):
    with pytest.raises(TypeError, match=r"is traced by jit, vmap or grad, .*; kandinsky_jax.diffusion.sample is"):
        jax.vmap(CHECKS[name])(jnp.ones(2))
