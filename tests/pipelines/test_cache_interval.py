"""Cached features (DeepCache): equal to the reference whose last layer is given earlier features, in one program."""

from __future__ import annotations

import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from kandinsky_jax import TorchGenerator
from kandinsky_jax.batch import JobError, load_pipeline
from kandinsky_jax.diffusion import ClassifierFreeGuidance, sample
from kandinsky_jax.models import capture
from kandinsky_jax.pipelines import denoising
from tests.batch.test_jobs import PROMPTS, job_of, members, run_job
from tests.cli.test_cli import invoke
from tests.conftest import SHAPES_MODEL, note
from tests.pipelines.test_compile import compilations
from tests.pipelines.test_modes import MODES, extra, for_reference, given

SIZE = {"height": 64, "width": 64, "output_type": "np"}
CALL = {"num_inference_steps": 7, "guidance_scale": 4.0} | SIZE


class KeptFeatures:
    """Gives the reference's last layer the features of the last step that is a multiple of `interval`."""

    def __init__(self, unet: torch.nn.Module, interval: int):
        self._interval, self._step, self._kept = interval, 0, None
        self._skip = unet.config.block_out_channels[0]
        self._hook = unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(self._replace)

    def _replace(self, module, arguments):
        x, *rest = arguments
        features, skip = x[:, : -self._skip], x[:, -self._skip :]
        if self._step % self._interval == 0:
            self._kept = features
        self._step += 1
        return torch.cat([self._kept, skip], dim=1), *rest

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._hook.remove()


SLOW_MODES = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("img2img", "inpaint", "controlnet")]


@pytest.mark.parametrize("mode", ["text2img", *SLOW_MODES])
def test_as_the_reference_with_kept_features(ours, theirs, embeds, mode):
    rows, pictures = [x[:1] for x in embeds], given(mode, 1, 64, 64)
    generated = ours[MODES[mode]](
        image_embeds=rows[0],
        negative_image_embeds=rows[1],
        cache_interval=3,
        generator=TorchGenerator(3),
        **pictures,
        **CALL,
        **extra(mode),
    ).images
    reference = theirs[MODES[mode]]
    with KeptFeatures(reference.unet, 3):
        expected = reference(
            image_embeds=torch.tensor(rows[0]),
            negative_image_embeds=torch.tensor(rows[1]),
            generator=torch.Generator().manual_seed(3),
            **for_reference(pictures),
            **CALL,
            **extra(mode),
        ).images
    difference = np.abs(generated - expected) * 255
    assert note(difference.mean(), "mean |d|, of 255") <= 0.2
    assert note(difference.max(), "max |d|, of 255") <= 4


def test_one_program_more_for_all_intervals(ours, embeds):
    pipe, rows = ours["KandinskyV22Pipeline"], [x[:1] for x in embeds]
    plain = pipe(*rows, generator=TorchGenerator(0), **CALL).images
    pipe(*rows, generator=TorchGenerator(0), cache_interval=2, **CALL)
    with compilations() as events:
        found = [pipe(*rows, generator=TorchGenerator(0), cache_interval=n, **CALL).images for n in (3, 5, 1000)]
        pipe(*rows, generator=TorchGenerator(1), cache_interval=4, **CALL | {"num_inference_steps": 9})
        assert np.array_equal(pipe(*rows, generator=TorchGenerator(0), cache_interval=1, **CALL).images, plain)
    assert not events
    distances = [np.abs(picture - plain).mean() for picture in found]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_slices_do_not_matter(ours, embeds, monkeypatch):
    """Features are kept from slice to slice, however long the host lets the device run."""
    pipe, rows = ours["KandinskyV22Pipeline"], [x[:1] for x in embeds]
    call = {"generator": TorchGenerator(2), "cache_interval": 3} | CALL
    found = []
    for seconds in (0.0, 60.0):
        monkeypatch.setattr(denoising, "SLICE_SECONDS", seconds)
        found.append(pipe(*rows, **call | {"generator": TorchGenerator(2)}).images)
    stepwise = pipe(*rows, **call | {"generator": TorchGenerator(2)}, callback_on_step_end=lambda *a: a[-1]).images
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], stepwise)


@pytest.mark.slow
def test_features_are_computed_anew_where_guidance_begins_or_ends(ours, embeds):
    """Of 8 steps the guided ones are 2 to 5: so 0, 2, 5 and 6 run whole with n = 3."""
    pipe, rows = ours["KandinskyV22Pipeline"], [x[:1] for x in embeds]
    call = CALL | {"num_inference_steps": 8, "guidance_interval": (0.25, 0.75)}
    parts, real = [], denoising.first_cache

    def watched(network, params, state, refresh, evaluations, exchanged):
        parts.append((evaluations, refresh[:6].tolist()))
        return real(network, params, state, refresh, evaluations, exchanged)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "first_cache", watched)
        kept = pipe(*rows, generator=TorchGenerator(4), cache_interval=3, **call).images
    assert parts == [(evaluations, [True, False, False] * 2) for evaluations in (1, 2, 1)]
    whole = pipe(*rows, generator=TorchGenerator(4), **call).images
    assert 0 < np.abs(kept - whole).mean() * 255 < 20


@pytest.mark.slow
def test_a_call_that_is_warmed_up_compiles_nothing(shapes_pipe):
    shapes_pipe.warmup(height=64, width=64, batch=2, cache_interval=2)
    with compilations() as events:
        call = {"num_inference_steps": 4, "prior_num_inference_steps": 2, "generator": 0}
        shapes_pipe(["red ring", "blue star"], cache_interval=3, height=64, width=64, **call)
    assert not events


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_intervals_that_are_none(ours, embeds, value):
    with pytest.raises(ValueError, match="cache_interval must be an integer of at least 1, got"):
        ours["KandinskyV22Pipeline"](*[x[:1] for x in embeds], cache_interval=value, **CALL)


@pytest.mark.slow
def test_on_the_command_line(ours, tmp_path):
    short = ["-m", str(SHAPES_MODEL), *"-q --steps 6 --prior-steps 4 --seed 5 --torch-noise -o out.png".split()]
    done = invoke(["generate", "yellow ring", *short, "--cache-interval", "2"], tmp_path)
    assert done.exit_code == 0, done.output
    [expected] = ours["KandinskyV22CombinedPipeline"](
        "yellow ring",
        cache_interval=2,
        prior_num_inference_steps=4,
        generator=TorchGenerator(5),
        **CALL | {"num_inference_steps": 6},
    ).images
    with Image.open(tmp_path / "out.png") as picture:
        assert np.abs(np.asarray(picture) - expected * 255).max() <= 1
        assert json.loads(picture.text["kandinsky_jax"])["cache_interval"] == 2
    done = invoke(["generate", "x", *short, "--cache-interval", "0"], tmp_path)
    assert "--cache-interval must be an integer of at least 1, got 0" in str(done.exception)


# The core ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop(ours, embeds):
    """A UNet, its first noise, conditions, and a schedule of four steps."""
    pipe = ours["KandinskyV22Pipeline"]
    noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    cond, uncond = (pipe.unet.condition(jnp.asarray(x)) for x in embeds)
    return pipe.unet, noise, cond, uncond, pipe.scheduler.schedule(4)


def cached_sample(unet, noise, cond, uncond, schedule, refresh):
    cache = unet.feature_cache(4, 8, 8, refresh)
    guider = ClassifierFreeGuidance(4.0)
    return sample(unet, noise, cond, uncond, schedule, guider=guider, rng=0, cache=cache)


def test_sample_takes_a_cache(loop):
    unet, noise, cond, uncond, schedule = loop
    whole = sample(unet, noise, cond, uncond, schedule, guider=ClassifierFreeGuidance(4.0), rng=0)
    refreshed = cached_sample(*loop, np.ones(4, bool))
    np.testing.assert_allclose(refreshed, whole, atol=2e-5)
    kept = jax.jit(lambda refresh: cached_sample(*loop, refresh))
    uneven = kept(np.array([True, False, True, True]))  # any steps, in one program
    assert 1e-3 < np.abs(uneven - whole).mean() < np.abs(kept(np.array([True] + [False] * 3)) - whole).mean()


@pytest.mark.slow
def test_gradients_go_through_kept_features(loop):
    """Of a linear function of the sample, along a direction: the derivative is the difference quotient."""
    unet, noise, *rest = loop
    direction = jax.random.normal(jax.random.key(1), noise.shape)
    refresh = np.array([True, False, False, True])

    def value(noise):
        return cached_sample(unet, noise, *rest, refresh).mean()

    gradient = jax.grad(value)(noise)
    step = 1e-2
    quotient = (value(noise + step * direction) - value(noise - step * direction)) / (2 * step)
    assert np.isfinite(gradient).all()
    assert abs(float(jnp.vdot(gradient, direction)) / float(quotient) - 1) < 0.02


def test_kept_features_are_those_of_the_evaluation_before(loop):
    unet, noise, cond, _, _ = loop
    first, cache = unet(noise, 500, cond, cache=unet.feature_cache(2, 8, 8, np.array([True, False, True])))
    np.testing.assert_allclose(first, unet(noise, 500, cond), atol=1e-5)
    other, kept = unet(-noise, 100, cond, cache=cache)
    assert np.array_equal(kept.features, cache.features)
    assert int(kept.done) == 2
    assert np.abs(other - unet(-noise, 100, cond)).max() > 0.1
    again, _ = unet(-noise, 100, cond, cache=kept)
    np.testing.assert_allclose(again, unet(-noise, 100, cond), atol=1e-5)


def test_what_a_cache_must_be(loop):
    unet, noise, cond, *_ = loop
    with pytest.raises(TypeError, match=r"cache must be what unet.feature_cache\(...\) returns, got tuple"):
        unet(noise, 5, cond, cache=(1, 2))
    with pytest.raises(ValueError, match=re.escape("the shape [3, 8, 8, 64]; needed is [2, 8, 8, 64]")):
        unet(noise, 5, cond, cache=unet.feature_cache(3, 8, 8, np.array([True])))
    with pytest.raises(ValueError, match=r"refresh\[0\] is False"):
        unet.feature_cache(2, 8, 8, np.array([False, True]))
    with pytest.raises(ValueError, match=r"refresh has the shape \[0\]"):
        unet.feature_cache(2, 8, 8, np.array([], bool))
    with pytest.raises(ValueError, match="capture does not go into an evaluation with a cache"):
        capture(unet, "mid_block")(noise, 5, cond, cache=unet.feature_cache(2, 8, 8, np.array([True])))


# Batch jobs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_a_job_of_cached_features(shapes_pipe, tmp_path, form):
    """Its pictures are those of the direct call; the interval is recorded, and part of its identity."""
    rows = [{"prompt": PROMPTS[0], "seed": 5}]
    settings = {"form": form, "batch": 1, "defaults": {"steps": 6, "prior_steps": 2}}
    job = job_of(tmp_path, rows, cache_interval=3, **settings)
    assert run_job(job, load_pipeline(job)).complete
    call = {"num_inference_steps": 6, "prior_num_inference_steps": 2, "height": 64, "width": 64}
    [expected] = shapes_pipe(PROMPTS[0], generator=5, cache_interval=3, **call).images
    if form == "webdataset":
        found = members(tmp_path / "out")
        [about] = [json.loads(data) for name, data in found.items() if name.endswith(".json")]
        [data] = [data for name, data in found.items() if name.endswith(".png")]
    else:
        [about] = pyarrow.parquet.read_table(tmp_path / "out" / "manifest").to_pylist()
        data = (tmp_path / "out" / about["file_name"]).read_bytes()
    assert about["cache_interval"] == 3
    assert np.array_equal(Image.open(io.BytesIO(data)), expected)
    with pytest.raises(JobError, match=r"\n  cache_interval was 3, now not given$"):
        job_of(tmp_path, rows, **settings).begin()
    with pytest.raises(JobError, match="cache_interval must be an integer of at least 1, got 0"):
        job_of(tmp_path, rows, cache_interval=0, **settings)
