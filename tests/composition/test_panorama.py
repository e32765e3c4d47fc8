"""MultiDiffusion: windows as diffusers places them, the averaged step by its formula, regions and seams."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kandinsky_jax import composition, diffusion
from kandinsky_jax.models.unet import UNetCondition
from kandinsky_jax.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tests.diffusion import toy
from tests.diffusion.toy import assert_close, normal, row

DDIM = DDIMScheduler(clip_sample=False)
STEPS = 4


def network(sample, timestep, condition):
    """The toy, which sees the pixel above, and the one to the left."""
    return toy.network(sample, timestep, condition) + 0.2 * jnp.tanh(jnp.roll(sample, 1, axis=2))


def conditions(seed: int = 1, images: int = 2) -> tuple[jax.Array, jax.Array]:
    return normal(seed, images, 3), normal(seed + 1, images, 3)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128), (96, 256), (48, 128), (64, 40)])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("wrap", [False, True])
def test_windows_are_where_diffusers_has_them(height, width, stride, wrap):
    from diffusers import StableDiffusionPanoramaPipeline

    views = StableDiffusionPanoramaPipeline.get_views(None, 8 * height, 8 * width, 64, stride, circular_padding=wrap)
    tops = composition.window_starts(height, 64, stride)
    lefts = composition.window_starts(width, 64, stride, wrap)
    assert [(top, top + 64, left, left + 64) for top in tops for left in lefts] == views


def test_every_latent_is_covered_where_the_stride_does_not_divide():
    for length in range(1, 40):
        for stride in range(1, 9):
            starts = composition.window_starts(length, 8, stride)
            assert {start + i for start in starts for i in range(min(8, length))} == set(range(length))
            wrapped = composition.window_starts(length, 8, stride, wrap=True)
            assert {(start + i) % length for start in wrapped for i in range(min(8, length))} == set(range(length))


def test_a_canvas_of_one_window_is_an_ordinary_sample():
    cond, uncond = conditions()
    for shape in ((2, 4, 6, 3), (2, 3, 6, 3)):  # the second is smaller than the window
        noise = normal(0, *shape)
        found = diffusion.sample(composition.Panorama(network, (4, 6), 2), noise, cond, uncond, DDIM.schedule(STEPS))
        plain = diffusion.sample(network, noise, cond, uncond, DDIM.schedule(STEPS))
        np.testing.assert_array_equal(found, plain)
        one = composition.Panorama(network, (4, 6), 2, regions=np.full((1, *shape[1:3]), 0.3))
        pair = [composition.stack_conditions([condition]) for condition in (cond, uncond)]
        assert_close(diffusion.sample(one, noise, *pair, DDIM.schedule(STEPS)), plain, 1e-6)


def averaged(parts: list[np.ndarray], places: list[tuple[slice, slice]], shape, weights=None) -> np.ndarray:
    """Equation 5: the weighted average of the windows' samples in each latent of the canvas."""
    total, count = np.zeros(shape), np.zeros((*shape[1:3], 1))
    for i, (part, place) in enumerate(zip(parts, places, strict=True)):
        weight = np.ones(part.shape[1:3]) if weights is None else weights[i]
        total[:, *place] += weight[..., None] * np.asarray(part)
        count[place] += weight[..., None]
    return total / count


PLACES = [(slice(top, top + 4), slice(left, left + 4)) for top in (0, 2) for left in (0, 2, 3)]  # of 6 x 7


def test_steps_are_the_average_of_ddim_steps_in_windows():
    """Equation 5 in NumPy, with DDIM's formula and weights that are not all alike."""
    noise, (cond, uncond) = normal(0, 2, 6, 7, 3), conditions()
    weights = np.random.default_rng(0).uniform(0.1, 1, (4, 4))
    model = composition.Panorama(network, 4, 2, weights=weights)
    schedule = DDIM.schedule(STEPS)
    found = diffusion.sample(model, noise, cond, uncond, schedule, guider=diffusion.ClassifierFreeGuidance(3.0))

    levels = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    canvas = np.asarray(noise, np.float64)
    for t in schedule.timesteps:
        now, before = levels[t], levels[t - 250] if t >= 250 else 1.0
        parts = []
        for place in PLACES:
            x = canvas[:, *place]
            of_cond, of_uncond = (network(jnp.asarray(x, jnp.float32), jnp.full(2, t), c) for c in (cond, uncond))
            eps = np.asarray(of_uncond + 3.0 * (of_cond - of_uncond), np.float64)
            x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
            parts.append(np.sqrt(before) * x0 + np.sqrt(1 - before) * eps)
        canvas = averaged(parts, PLACES, canvas.shape, [weights] * len(PLACES))
    assert_close(found, canvas)


@pytest.mark.parametrize(
    ("scheduler", "same"),
    [
        (DDPMScheduler(clip_sample=False), True),
        (DPMSolverMultistepScheduler(), True),
        (UniPCMultistepScheduler(), True),
        (DDIMScheduler(clip_sample=True), False),  # clipping is not linear, and the class says so
    ],
    ids=lambda value: type(value).__name__,
)
def test_steps_are_the_average_of_any_linear_solvers_steps_in_windows(scheduler, same):
    """Each window keeps the memory of its own solver; the noise is the canvas's."""
    noise, (cond, uncond), z = 2 * normal(0, 2, 6, 7, 3), conditions(), normal(5, STEPS, 2, 6, 7, 3)
    schedule, guider = scheduler.schedule(STEPS), diffusion.ClassifierFreeGuidance(3.0)
    model = composition.Panorama(network, 4, 2, windows_at_once=4)
    found = diffusion.sample(model, noise, cond, uncond, schedule, rng=diffusion.GivenNoise(z, 0), guider=guider)

    calls = diffusion.batch_evaluations(guider.evaluations(cond, uncond))
    states = [diffusion.initial_state(noise[:, *place]) for place in PLACES]

    @jax.jit
    def step(own, state, z):
        prediction, _, _ = diffusion.predict(network, guider, calls, own, state[0])
        return diffusion.solver_step(own, state, prediction, z)

    for i in range(STEPS):
        states = [step(row(schedule, i), state, z[i][:, *place]) for state, place in zip(states, PLACES, strict=True)]
        canvas = averaged([state[0] for state in states], PLACES, noise.shape)
        states = [
            state.at[0].set(jnp.asarray(canvas[:, *place], jnp.float32))
            for state, place in zip(states, PLACES, strict=True)
        ]
    if same:
        assert_close(found, canvas)
    else:
        assert np.abs(found - canvas).max() > 1e-3 * np.abs(canvas).max()


def test_windows_in_groups_are_all_windows():
    noise, (cond, uncond), sizes = normal(0, 2, 6, 9, 3), conditions(), []

    def model(sample, timestep, condition):
        sizes.append(len(sample))
        return network(sample, timestep, condition)

    def run(windows_at_once):
        panorama = composition.Panorama(model, 4, 2, windows_at_once=windows_at_once)
        return diffusion.sample(panorama, noise, cond, uncond, DDIM.schedule(2))

    expected = run(None)
    assert set(sizes) == {2 * 2 * 8}  # cond and uncond of two images, 2 x 4 windows
    for windows in (1, 3, 8, 100):
        sizes.clear()
        assert_close(run(windows), expected)
        assert set(sizes) == {2 * 2 * min(windows, 8)}


def test_a_canvas_that_wraps_has_no_seam():
    """Turned by a stride, it is sampled to the same picture, turned."""
    noise, (cond, uncond) = normal(0, 2, 4, 12, 3), conditions()
    model = composition.Panorama(network, 4, 2, wrap=True)
    found, turned = (
        diffusion.sample(model, x, cond, uncond, DDIM.schedule(STEPS)) for x in (noise, jnp.roll(noise, 6, axis=2))
    )
    assert_close(turned, jnp.roll(found, 6, axis=2))
    plain = composition.Panorama(network, 4, 2)
    assert not np.allclose(found, diffusion.sample(plain, noise, cond, uncond, DDIM.schedule(STEPS)), rtol=1e-3)


def test_regions_are_averaged_by_their_masks():
    """Equation 5 with the regions' masks as weights; windows where a region is not are left out."""
    sample, timestep, calls = normal(0, 2, 6, 7, 3), jnp.full(2, 300), []
    left, right = np.zeros((2, 6, 7))
    left[:, :4], right[:, 3:] = 1, 0.5
    first, second = normal(1, 2, 3), normal(2, 2, 3)

    def model(sample, timestep, condition):
        calls.append(len(sample))
        return network(sample, timestep, condition)

    panorama = composition.Panorama(model, 4, 2, regions=[left, right])
    found = panorama(sample, timestep, composition.stack_conditions([first, second]))
    parts, places, weights = [], [], []
    for mask, condition in ((left, first), (right, second)):
        for place in PLACES:
            if mask[place].any():
                parts.append(network(sample[:, *place], timestep, condition))
                places.append(place)
                weights.append(mask[place])
    assert_close(found, averaged(parts, places, sample.shape, weights))
    assert calls == [2 * len(parts)]
    assert len(parts) == 2 * (3 + 3)
    for few_or_many in ([first], [first, second, first]):
        with pytest.raises(ValueError, match="there are 2 regions; needed is a condition for each"):
            panorama(sample, timestep, composition.stack_conditions(few_or_many))


def test_everything_in_one_region_is_that_condition_alone():
    noise, (cond, uncond) = normal(0, 2, 6, 9, 3), conditions()
    masks = np.stack([np.ones((6, 9)), np.zeros((6, 9))])
    pair = [composition.stack_conditions([x, 7 * x]) for x in (cond, uncond)]
    found = diffusion.sample(composition.Panorama(network, 4, 2, regions=masks), noise, *pair, DDIM.schedule(STEPS))
    alone = diffusion.sample(composition.Panorama(network, 4, 2), noise, cond, uncond, DDIM.schedule(STEPS))
    assert_close(found, alone)


@pytest.mark.parametrize("regions", [None, np.stack([np.tri(6), 1 - np.tri(6)])])
def test_further_channels_are_cut_into_the_same_windows(regions):
    """A hint, or the kept part and the mask of inpainting, is of the whole canvas."""

    def pointwise(sample, timestep, condition):
        return sample * condition.channels + condition.embedding[:, None, None]

    def condition(seed):
        return UNetCondition(normal(seed, 2, 1), [], None, [], normal(seed, 2, 6, 6, 1))

    sample, timestep = normal(0, 2, 6, 6, 3), jnp.zeros(2)
    given = [condition(1)] if regions is None else [condition(1), condition(2)]
    expected = sum(
        mask[:, :, None] * pointwise(sample, timestep, each)
        for mask, each in zip([np.ones((6, 6))] if regions is None else regions, given, strict=True)
    )
    stacked = given[0] if regions is None else composition.stack_conditions(given)
    assert_close(composition.Panorama(pointwise, 4, 2, regions=regions)(sample, timestep, stacked), expected)


def test_gradients_go_through_the_windows():
    noise, (cond, uncond) = normal(0, 2, 6, 7, 3), conditions()
    model = composition.Panorama(network, 4, 2, windows_at_once=4)
    with jax.enable_x64(True):
        noise, cond, uncond = (jnp.asarray(x, jnp.float64) for x in (noise, cond, uncond))

        def total(noise, cond):
            return (diffusion.sample(model, noise, cond, uncond, DDIM.schedule(2)) ** 2).sum()

        check_grads(jax.jit(total), (noise, cond), 1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_a_decoded_canvas_has_no_seam():
    def decode(latents):  # sees its neighbours, and zeros beyond the border
        padded = jnp.pad(latents, ((0, 0), (0, 0), (1, 1), (0, 0)))
        return jnp.repeat(padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:], 8, axis=2)

    latents = normal(0, 1, 2, 12, 3)
    found = composition.decode_wrapped(decode, latents, padding=3)
    assert found.shape == (1, 2, 96, 3)
    turned = composition.decode_wrapped(decode, jnp.roll(latents, 5, axis=2), padding=3)
    np.testing.assert_allclose(turned, jnp.roll(found, 40, axis=2), atol=1e-6)
    np.testing.assert_allclose(found[:, :, 8:-8], decode(latents)[:, :, 8:-8], atol=1e-6)
    with pytest.raises(ValueError, match="padding must be an integer from 1 to the latents' width 12, got 13"):
        composition.decode_wrapped(decode, latents, padding=13)


def test_what_does_not_fit_is_said():
    for arguments, message in (
        ({"window": 0, "stride": 1}, "window must be an integer from 1 on, got 0"),
        ({"window": 4, "stride": 5}, "stride must be an integer from 1 to 4, got 5"),
        ({"window": 4, "stride": 2, "windows_at_once": 0}, "windows_at_once must be an integer from 1 on, got 0"),
        ({"window": 4, "stride": 2, "weights": np.zeros((4, 4))}, r"weights must be numbers above 0 of shape \[4, 4\]"),
        ({"window": 4, "stride": 2, "regions": -np.ones((1, 4, 4))}, "regions must be numbers of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            composition.Panorama(network, **arguments)
    sample, timestep, (cond, uncond) = normal(0, 2, 6, 7, 3), jnp.zeros(2), conditions()
    with pytest.raises(ValueError, match="takes no feature cache"):
        composition.Panorama(network, 4, 2)(sample, timestep, cond, cache=0)
    with pytest.raises(ValueError, match="regions are of 4 x 4 latents, the sample has 6 x 7"):
        composition.Panorama(network, 4, 2, regions=np.ones((1, 4, 4)))(sample, timestep, cond[:, None])
    holes = np.ones((1, 6, 7))
    holes[0, 1:3, 2] = 0
    with pytest.raises(ValueError, match="regions are all 0 in 2 of 42 latents"):
        composition.Panorama(network, 4, 2, regions=holes)(sample, timestep, cond[:, None])
    with pytest.raises(ValueError, match="differ in structure"):
        composition.stack_conditions([cond, (cond, uncond)])


@pytest.mark.slow
def test_one_window_of_a_trained_unet_is_an_ordinary_sample(ours):
    """With a hint, whose latents are cut; a panorama of several windows is another picture of the same size."""
    pipe = ours["KandinskyV22ControlnetPipeline"]
    unet, rng = pipe.unet, np.random.default_rng(0)
    embeds, hint = normal(0, 2, unet.config.encoder_hid_dim), jnp.asarray(rng.random((2, 64, 64, 3)), jnp.float32)
    cond, noise = jax.jit(unet.condition)(embeds, hint), normal(1, 2, 8, 8, 4)

    @jax.jit
    def run(noise, cond):
        schedule, guider = DDIM.schedule(3), diffusion.NoGuidance()
        return [
            diffusion.sample(model, noise, cond, None, schedule, guider=guider)
            for model in (unet, composition.Panorama(unet, 8, 4))
        ]

    plain, panorama = run(noise, cond)
    assert_close(panorama, plain, 1e-6)
