"""Guiders beside diffusers' for the same predictions, and beside their papers' formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import guiders as reference

from kandinsky_jax import diffusion
from kandinsky_jax.schedulers import NAMES, DDIMScheduler, DDPMScheduler, scheduler_named
from tests.diffusion.toy import assert_close, inputs, network, normal, row, with_variance

SCHEDULE = DDIMScheduler(clip_sample=False).schedule(5)
SCALE = 3.5
BOUND = 1e-5


def outputs(seed: int = 0, shape: tuple[int, ...] = (2, 4, 4, 3)) -> list[jax.Array]:
    """Three outputs of a network, with a learned variance."""
    return [normal(seed + i, *shape[:-1], 2 * shape[-1]) for i in range(3)]


def as_torch(x: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def predictions(found: list[jax.Array], channels: int = 3) -> list[torch.Tensor]:
    return [as_torch(x[..., :channels]) for x in found]


def check_output(prediction: diffusion.Prediction, sample: jax.Array, output: torch.Tensor, index: int = 2) -> None:
    """A prediction is that of a guided output."""
    expected = diffusion.prediction_from_output(row(SCHEDULE, index), sample, jnp.asarray(output.numpy()))
    assert_close(prediction.x0, expected.x0, BOUND)
    assert_close(prediction.eps, expected.eps, BOUND)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_diffusers(rescale):
    uncond, cond, _ = outputs()
    sample = normal(9, 2, 4, 4, 3)
    guider = reference.ClassifierFreeGuidance(guidance_scale=SCALE, guidance_rescale=rescale)
    expected = guider.forward(*predictions([cond, uncond]))[0]
    own = diffusion.RescaledGuidance(SCALE, rescale)
    prediction, _ = own.combine([uncond, cond], sample, row(SCHEDULE, 2), None)
    check_output(prediction, sample, expected)
    assert_close(prediction.variance, cond[..., 3:], 0)


@pytest.mark.parametrize(("eta", "momentum", "threshold"), [(1.0, 0.0, 15.0), (0.0, -0.5, 5.0), (0.3, -0.75, 2.0)])
def test_projected_guidance_is_diffusers_over_several_steps(eta, momentum, threshold):
    """diffusers' guider takes whatever it is given; the paper's predictions of x0 are given here.

    The paper's scale w is w - 1 there, in what diffusers calls the original formulation.
    """
    guider = reference.AdaptiveProjectedGuidance(
        guidance_scale=SCALE - 1,
        use_original_formulation=True,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=threshold,
        eta=eta,
    )
    guider.momentum_buffer = reference.adaptive_projected_guidance.MomentumBuffer(momentum)
    own = diffusion.AdaptiveProjectedGuidance(SCALE, eta, momentum, threshold)
    state = own.init(normal(0, 2, 4, 4, 3))
    for step in range(3):
        uncond, cond, _ = outputs(10 * step)
        sample, coefficients = normal(5 + step, 2, 4, 4, 3), row(SCHEDULE, step)
        x0 = [diffusion.predict_x0(coefficients, sample, x[..., :3]) for x in (cond, uncond)]
        expected = guider.forward(*map(as_torch, x0))[0]
        prediction, state = own.combine([uncond, cond], sample, coefficients, state)
        assert_close(prediction.x0, jnp.asarray(expected.numpy()), BOUND)


def test_projected_guidance_without_its_parts_is_classifier_free():
    uncond, cond, _ = outputs()
    sample = normal(9, 2, 4, 4, 3)
    own = diffusion.AdaptiveProjectedGuidance(SCALE, eta=1.0, momentum=0.0, norm_threshold=np.inf)
    found, _ = own.combine([uncond, cond], sample, row(SCHEDULE, 2), jnp.zeros_like(sample))
    expected, _ = diffusion.ClassifierFreeGuidance(SCALE).combine([uncond, cond], sample, row(SCHEDULE, 2), None)
    assert_close(found.x0, expected.x0, BOUND)


def test_autoguidance_is_diffusers():
    weak, cond, _ = outputs()
    sample = normal(9, 2, 4, 4, 3)
    guider = reference.AutoGuidance(guidance_scale=SCALE, auto_guidance_layers=[0], dropout=0.1)
    expected = guider.forward(*predictions([cond, weak]))[0]
    prediction, _ = diffusion.Autoguidance(SCALE).combine([weak, cond], sample, row(SCHEDULE, 2), None)
    check_output(prediction, sample, expected)


@pytest.mark.parametrize("guided", [True, False], ids=["with uncond", "without uncond"])
def test_perturbed_attention_guidance_is_diffusers(guided):
    uncond, cond, perturbed = outputs()
    sample = normal(9, 2, 4, 4, 3)
    guider = reference.PerturbedAttentionGuidance(
        guidance_scale=SCALE if guided else 0.0,
        use_original_formulation=not guided,  # 0 is no guidance then
        perturbed_guidance_scale=2.0,
        perturbed_guidance_layers=[0],
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
    )
    guider.set_state(step=1, num_inference_steps=5, timestep=torch.tensor(0))
    pred = dict(
        zip(("pred_cond", "pred_uncond", "pred_cond_skip"), predictions([cond, uncond, perturbed]), strict=True)
    )
    if not guided:
        del pred["pred_uncond"]
    expected = guider.forward(**pred)[0]
    given = [uncond, cond, perturbed] if guided else [cond, perturbed]
    prediction, _ = diffusion.PerturbedAttentionGuidance(SCALE, 2.0).combine(given, sample, row(SCHEDULE, 2), None)
    check_output(prediction, sample, expected)


def test_perturbed_attention_is_that_of_joint_attention_in_diffusers():
    """Queries and keys of places and of the condition in one softmax; of its own kind each place sees itself alone."""
    from diffusers.models.attention_processor import Attention, PAGJointAttnProcessor2_0

    heads, dim, places, tokens = 2, 4, 6, 3
    torch.manual_seed(0)
    layer = Attention(
        query_dim=heads * dim,
        heads=heads,
        dim_head=dim,
        added_kv_proj_dim=heads * dim,
        context_pre_only=True,
        processor=PAGJointAttnProcessor2_0(),
    )
    pixels, text = torch.randn(2, places, heads * dim), torch.randn(2, tokens, heads * dim)
    with torch.no_grad():
        out = layer.processor(layer, torch.cat([pixels, pixels]), torch.cat([text, text]))
        expected = out[0][2:] if isinstance(out, tuple) else out[2:]

        def split(x):
            return jnp.asarray(x.numpy()).reshape(2, -1, heads, dim)

        query = split(layer.to_q(pixels))
        key, value = (
            jnp.concatenate([split(added(text)), split(own(pixels))], axis=1)
            for added, own in ((layer.add_k_proj, layer.to_k), (layer.add_v_proj, layer.to_v))
        )
        attended = diffusion.perturbed_attention("a layer")(query, key, value, None, name="a layer")
        found = layer.to_out[0](torch.from_numpy(np.array(attended)))
    assert_close(jnp.asarray(found.numpy()), jnp.asarray(expected.numpy()), BOUND)
    ordinary = diffusion.perturbed_attention("a layer")(query, key, value, None, name="another")
    assert np.abs(np.asarray(ordinary) - np.asarray(attended)).max() > 0.1


def test_perturbed_attention_keeps_a_mask():
    query, key = normal(0, 1, 3, 1, 4), normal(1, 1, 5, 1, 4)
    value = jnp.eye(5, 4)[None, :, None]
    mask = jnp.array([[True, False, True, True, True]] * 3)[None, None]
    out = diffusion.perturbed_attention(".*")(query, key, value, mask, name="x")
    assert_close(out[0, :, 1], jnp.zeros(3) + 1e-30, 1)  # hidden by the mask
    assert float(out[0, 0, 3]) == 0  # another place's
    assert float(out[0, 1, 3]) > 0  # its own


# CFG++ -----------------------------------------------------------------------------------------------------------


def test_cfg_plus_plus_is_the_papers_algorithm_2():
    """x0 of the guided noise, and from there on with the unconditional one."""
    noise, cond, uncond = inputs()
    scheduler = DDIMScheduler(clip_sample=False)
    schedule = scheduler.schedule(5)
    found = diffusion.sample(network, noise, cond, uncond, schedule, guider=diffusion.CFGPlusPlus(0.6))

    x = np.asarray(noise, np.float64)
    alpha = scheduler.alphas_cumprod[schedule.timesteps]
    after = np.append(alpha[1:], 1.0)
    for t, a, b in zip(schedule.timesteps, alpha, after, strict=True):
        of_cond, of_uncond = (
            np.asarray(network(jnp.asarray(x, jnp.float32), jnp.full(2, t), c), np.float64) for c in (cond, uncond)
        )
        guided = of_uncond + 0.6 * (of_cond - of_uncond)
        x0 = (x - np.sqrt(1 - a) * guided) / np.sqrt(a)
        x = np.sqrt(b) * x0 + np.sqrt(1 - b) * of_uncond
    assert_close(found, jnp.asarray(x, jnp.float32), BOUND)


def test_cfg_plus_plus_of_euler_is_k_diffusions():
    """k-diffusion's variant: x' = x0 guided + slope of the unconditional prediction * sigma'."""
    noise, cond, uncond = inputs()
    schedule = scheduler_named("euler", DDIMScheduler().config).schedule(5)
    sigmas = np.append(schedule.levels[:, 1], 0.0)
    x = noise * schedule.init_noise_sigma
    found = diffusion.sample(network, x, cond, uncond, schedule, guider=diffusion.CFGPlusPlus(0.6))
    for t, sigma, after in zip(schedule.timesteps, sigmas[:-1], sigmas[1:], strict=True):
        scaled = x / np.sqrt(sigma**2 + 1)
        of_cond, of_uncond = (network(scaled, jnp.full(2, t, jnp.float32), c) for c in (cond, uncond))
        x0 = x - sigma * (of_uncond + 0.6 * (of_cond - of_uncond))
        slope = (x - (x - sigma * of_uncond)) / sigma
        x = x0 + slope * after
    assert_close(found, x, BOUND)


def test_cfg_plus_plus_of_ddpm_is_the_posterior_of_the_moved_sample():
    uncond, cond, _ = outputs()
    sample, noise = normal(9, 2, 4, 4, 3), normal(8, 2, 4, 4, 3)
    scheduler = DDPMScheduler(clip_sample=False)
    schedule = scheduler.schedule(5)
    own = row(schedule, 1)
    prediction, _ = diffusion.CFGPlusPlus(0.6).combine([uncond, cond], sample, own, None)
    found = diffusion.solver_step(own, diffusion.initial_state(sample), prediction, noise)[0]

    a, b = scheduler.alphas_cumprod[schedule.timesteps[1:3]]
    x0 = [(sample - np.sqrt(1 - a) * x[..., :3]) / np.sqrt(a) for x in (uncond, cond)]
    guided = x0[0] + 0.6 * (x0[1] - x0[0])
    moved = np.sqrt(a) * guided + np.sqrt(1 - a) * uncond[..., :3]  # noised by the unconditional prediction
    beta = 1 - a / b
    mean = np.sqrt(b) * beta / (1 - a) * guided + np.sqrt(1 - beta) * (1 - b) / (1 - a) * moved
    assert_close(found, mean + np.sqrt((1 - b) / (1 - a) * beta) * noise, BOUND)


@pytest.mark.parametrize("name", NAMES)
def test_cfg_plus_plus_refuses_solvers_with_a_memory(name):
    schedule = scheduler_named(name, DDIMScheduler().config).schedule(10)
    keeps = {"ddpm", "ddim", "euler", "euler-a", "lcm", "tcd"}
    if name in keeps:
        diffusion.CFGPlusPlus().check_schedule(schedule)
    else:
        with pytest.raises(ValueError, match="keep nothing: ddim, ddpm, euler, euler-a, lcm and tcd"):
            diffusion.sample(network, *inputs(), schedule, guider=diffusion.CFGPlusPlus(), rng=0)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ipndm"}))
def test_levels_are_those_of_x0(name):
    """x0 = (sample - noise level * output) / signal level, for networks that predict noise."""
    schedule = scheduler_named(name, DDIMScheduler().config).schedule(10)
    table = diffusion.solver_coefficients(schedule)
    signal, noise = np.asarray(table.levels).T
    np.testing.assert_allclose(table.x0_from, np.stack([1 / signal, -noise / signal], axis=1), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(table.levels, schedule.levels, rtol=1e-6)


# In the loop -----------------------------------------------------------------------------------------------------


class Perturbable:
    """The toy network, which takes an attention function: with one, it answers for another condition."""

    def __call__(self, sample, timestep, condition, attention=None):
        return network(sample, timestep, condition if attention is None else 0.5 * condition)


def weak(sample, timestep, condition):
    return 0.8 * network(sample, timestep, condition)


GUIDERS = {
    "cfg": diffusion.ClassifierFreeGuidance(SCALE),
    "rescaled-cfg": diffusion.RescaledGuidance(SCALE, 0.7),
    "apg": diffusion.AdaptiveProjectedGuidance(SCALE),
    "cfg++": diffusion.CFGPlusPlus(0.6),
    "autoguidance": diffusion.Autoguidance(SCALE, weak, inputs()[1]),
    "pag": diffusion.PerturbedAttentionGuidance(SCALE, 2.0),
}


def test_every_named_guider_is_tested_here():
    assert GUIDERS.keys() == diffusion.GUIDERS.keys()
    assert {name: type(guider) for name, guider in GUIDERS.items()} == diffusion.GUIDERS


@pytest.mark.parametrize("name", GUIDERS)
def test_an_interval_is_guided_inside_and_conditional_outside(name):
    noise, cond, uncond = inputs()
    guider = GUIDERS[name]
    t = SCHEDULE.timesteps
    between = diffusion.IntervalGuidance(guider, low=float(t[3]), high=float(t[1]))  # the third and fourth step
    found = diffusion.sample(Perturbable(), noise, cond, uncond, SCHEDULE, guider=between)

    state, memory = diffusion.initial_state(noise), guider.init(noise)
    for i in range(len(SCHEDULE)):
        used = guider if i in (2, 3) else diffusion.NoGuidance()
        calls = diffusion.batch_evaluations(used.evaluations(cond, uncond))
        prediction, new, _ = diffusion.predict(
            Perturbable(), used, calls, row(SCHEDULE, i), state[0], memory if used is guider else None
        )
        memory = new if used is guider else memory
        state = diffusion.solver_step(row(SCHEDULE, i), state, prediction, jnp.zeros_like(noise))
    assert_close(found, state[0], BOUND)


@pytest.mark.parametrize("name", GUIDERS)
def test_gradients_to_the_noise_and_the_scale_agree_with_differences(name):
    arrays = [np.asarray(x, np.float64) for x in (*inputs(), normal(7, 2, 4, 4, 3), normal(3, 2, 4, 4, 3))]
    with jax.enable_x64(True):
        noise, cond, uncond, target, direction = map(jnp.asarray, arrays)
        guider = diffusion.Autoguidance(SCALE, weak, cond) if name == "autoguidance" else GUIDERS[name]

        @jax.jit
        def value(noise, scale):
            own = type(guider)(**{**vars(guider), "scale": scale})
            latents = diffusion.sample(Perturbable(), noise, cond, uncond, SCHEDULE, guider=own)
            return jnp.sum(latents * target)

        scale, h = jnp.float64(guider.scale), 1e-5
        to_noise, to_scale = jax.jit(jax.grad(value, argnums=(0, 1)))(noise, scale)
        slope = (value(noise + h * direction, scale) - value(noise - h * direction, scale)) / (2 * h)
        np.testing.assert_allclose(jnp.sum(to_noise * direction), slope, rtol=1e-5)
        slope = (value(noise, scale + h) - value(noise, scale - h)) / (2 * h)
        np.testing.assert_allclose(to_scale, slope, rtol=1e-5)


@pytest.mark.parametrize("name", GUIDERS)
def test_gradients_are_finite_where_both_predictions_agree(name):
    """Lengths, spreads and projections of zero have no slope; theirs here is 0, and not NaN."""
    noise, cond, _ = inputs()
    guider = GUIDERS[name]

    def value(noise):
        return jnp.sum(diffusion.sample(with_zero, noise, cond, cond, SCHEDULE, guider=guider) ** 2)

    def with_zero(sample, timestep, condition, attention=None):
        return jnp.zeros_like(sample) * condition[:, None, None]

    if name == "autoguidance":
        guider = diffusion.Autoguidance(SCALE, with_zero, cond)
    assert np.isfinite(jax.grad(value)(noise)).all()
    assert np.isfinite(jax.grad(value)(jnp.zeros_like(noise))).all()


@pytest.mark.parametrize("name", [name for name in GUIDERS if name != "autoguidance"])
def test_numbers_are_arguments_and_one_program_serves_them(name):
    noise, cond, uncond = inputs()
    traces = []

    @jax.jit
    def run(guider):
        traces.append(name)
        return diffusion.sample(Perturbable(), noise, cond, uncond, SCHEDULE, guider=guider)

    def of(scale):
        guider = GUIDERS[name]
        return jax.tree.map(jnp.float32, type(guider)(**{**vars(guider), "scale": scale}))

    first, second = run(of(0.5)), run(of(0.9))
    assert len(traces) == 1
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3
    many = jax.vmap(run)(jax.tree.map(lambda *x: jnp.stack(x), of(0.5), of(0.9)))
    assert_close(many[1], second, BOUND)


def test_what_is_asked_for_twice_is_evaluated_once():
    _, cond, uncond = inputs()
    wanted = [diffusion.Evaluation(cond), diffusion.Evaluation(uncond), diffusion.Evaluation(cond)]
    [call] = diffusion.batch_evaluations(wanted)
    assert call.members == ((0, 2), (1,))
    assert call.evaluation.condition.shape == (4, 3)
    guider = diffusion.IntervalGuidance(diffusion.ClassifierFreeGuidance(2.0))
    assert len(diffusion.batch_evaluations(guider.evaluations(cond, uncond))[0].members) == 2


# Names -----------------------------------------------------------------------------------------------------------


def test_names_have_settings():
    found = diffusion.guider_named("apg:eta=0.5,momentum=-0.75", 8.0)
    assert found == diffusion.AdaptiveProjectedGuidance(8.0, 0.5, -0.75, 15.0)
    assert diffusion.guider_named("cfg:scale=2", 8.0) == diffusion.ClassifierFreeGuidance(2.0)
    assert diffusion.guider_named("cfg++") == diffusion.CFGPlusPlus(0.6)
    layers = r"pag:layers=down_blocks\.(1,2)\..*,perturbed_scale=1"
    assert diffusion.guider_named(layers).layers == r"down_blocks\.(1,2)\..*"
    assert diffusion.guider_named("autoguidance:model=a,b/c").model == "a,b/c"
    assert diffusion.guider_named("apg:norm_threshold=inf").norm_threshold == np.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfg+", "there is no guider 'cfg[+]'; did you mean 'cfg[+][+]'"),
        ("cfgpp", "did you mean 'cfg[+][+]'. there are cfg, rescaled-cfg"),
        ("apg:eta=0,eta=1", "eta is given twice"),
        ("cfg:scale=1e39", "scale is 1e[+]39, needed is"),
        ("nonsense", "there are cfg, rescaled-cfg, apg"),
        ("interval", r"guidance_interval=\(0.4, 1\), with any guider"),
        ("apg:", "'' is no setting of apg; needed is NAME=VALUE, of scale, eta, momentum, norm_threshold"),
        ("apg:eta", "'eta' is no setting"),
        ("apg:eta=x", "eta must be a finite number, got 'x'"),
        ("apg:eta=inf", "eta must be a finite number"),
        ("cfg:rescale=0.7", "'rescale=0.7' is no setting of cfg"),
        ("rescaled-cfg:rescale=2", "rescale is 2, needed is 0 to 1"),
        ("cfg++:scale=4", "scale is 4, needed is 0 to 1; about a twelfth of cfg's"),
        ("pag:perturbed_scale=-1", "perturbed_scale is -1, needed is 0 or more"),
        ("pag:layers=(", "layers must be a regular expression"),
        ("autoguidance", "needs a weaker model.*autoguidance:model=FOLDER"),
        ("autoguidance:condition=1", "'condition=1' is no setting"),
    ],
)
def test_a_wrong_name_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        diffusion.guider_named(text)


def test_autoguidance_without_a_model_is_said():
    noise, cond, _ = inputs()
    with pytest.raises(ValueError, match="needs a weaker model and its condition"):
        diffusion.sample(network, noise, cond, None, SCHEDULE, guider=diffusion.Autoguidance(2.0))


def test_the_variance_is_the_conditional_one():
    noise, cond, uncond = inputs()
    for name in ("cfg", "rescaled-cfg", "apg", "cfg++"):
        guider = GUIDERS[name]
        calls = diffusion.batch_evaluations(guider.evaluations(cond, uncond))
        found, *_ = diffusion.predict(with_variance, guider, calls, row(SCHEDULE, 2), noise, guider.init(noise))
        expected = with_variance(noise, jnp.full(2, SCHEDULE.timesteps[2]), cond)[..., 3:]
        assert_close(found.variance, expected, BOUND)
