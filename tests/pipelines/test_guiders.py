"""Guiders in pipelines, by name and as objects: the core's samples, for the decoder and for the prior."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kandinsky_jax import DDIMScheduler, UNet2DConditionModel, diffusion, scheduler_named
from kandinsky_jax.checkpoint import CheckpointError
from kandinsky_jax.pipelines.denoising import denoise_steps
from kandinsky_jax.pipelines.guidance import choose_guider
from tests.conftest import SHAPES_MODEL, note

SEED, STEPS, SCALE = 5, 4, 3.0
SIZE = {"height": 64, "width": 64}
NAMES = {  # guidance_scale and the text
    "cfg": (SCALE, "cfg"),
    "rescaled-cfg": (SCALE, "rescaled-cfg:rescale=0.5"),
    "apg": (SCALE, "apg:eta=0.2,norm_threshold=6"),
    "cfg++": (0.6, "cfg++"),
    "pag": (SCALE, "pag:perturbed_scale=1.5"),  # the middle layers
    "autoguidance": (2.0, None),  # by the folder of a weak model
}


@pytest.fixture(scope="module")
def weak(ours, tmp_path_factory):
    """A weaker UNet and prior: those of the model with noise on their weights; by attribute, networks and folders."""
    found = {}
    for pipe, name in (("KandinskyV22Pipeline", "unet"), ("KandinskyV22PriorPipeline", "prior")):
        network, params = diffusion.Network.split(getattr(ours[pipe], name))
        rng = np.random.default_rng(0)
        noisy = jax.tree.map(lambda x, rng=rng: x + 0.02 * jnp.float32(rng.normal(size=x.shape)), params)
        folder = tmp_path_factory.mktemp("weak") / name
        network.bind(noisy).save_pretrained(folder)
        found[name] = network.bind(noisy), folder
    return found


@pytest.fixture(scope="module")
def decoder(ours):
    pipe = ours["KandinskyV22Pipeline"]
    deterministic = type(pipe).from_pipe(pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    deterministic.set_progress_bar_config(disable=True)
    return deterministic


def text_of(name: str, folder) -> str:
    return NAMES[name][1] or f"autoguidance:model={folder}"


DOWN = r"down_blocks\..*"  # the middle block has 2 x 2 places at 64 x 64 pixels


def guider_of(name: str, layers: str) -> diffusion.Guider:
    guider = diffusion.guider_named(text_of(name, "somewhere"), NAMES[name][0])
    return type(guider)(**{**vars(guider), "layers": layers}) if name == "pag" else guider


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_with_a_guider_is_the_cores_sample(decoder, embeds, weak, name):
    scale, text = NAMES[name][0], text_of(name, weak["unet"][1]) + f",layers={DOWN}" * (name == "pag")
    found = decoder(
        *embeds, generator=SEED, num_inference_steps=STEPS, guidance_scale=scale, guider=text, output_type="latent",
        **SIZE,
    ).images  # fmt: skip

    @jax.jit
    def sampled(noise, embeds, negative):
        unet, other = decoder.unet, weak["unet"][0]
        guider = guider_of(name, DOWN)
        if name == "autoguidance":
            guider = diffusion.Autoguidance(scale, other, other.condition(embeds))
        cond, uncond = unet.condition(embeds), unet.condition(negative)
        schedule = decoder.scheduler.schedule(STEPS)
        return diffusion.sample(unet, noise, cond, uncond, schedule, guider=guider)

    [noise] = diffusion.noise_source(SEED, 2, diffusion.DECODER_STREAM).initial((2, 8, 8, 4))
    expected = sampled(noise, *embeds).transpose(0, 3, 1, 2)
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    note(worst, "pipeline beside the core, max |d| / max")
    assert worst <= 1e-5
    if name != "cfg":
        plain = decoder(
            *embeds, generator=SEED, num_inference_steps=STEPS, guidance_scale=scale, output_type="latent", **SIZE
        ).images
        assert np.abs(plain - found).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_a_prior_with_a_guider_is_the_cores_sample(ours, weak, name):
    pipe, prompts = ours["KandinskyV22PriorPipeline"], ["red circle", "blue square"]
    scale, text = NAMES[name][0], text_of(name, weak["prior"][1])
    call = {"generator": SEED, "num_inference_steps": STEPS, "guidance_scale": scale, "output_type": "np"}
    found = pipe(prompts, guider=text, **call).image_embeds

    schedule = pipe.scheduler.schedule(STEPS)
    source = diffusion.noise_source(SEED, 2, diffusion.PRIOR_STREAM)
    shape = (2, pipe.prior.config.embedding_dim)
    [noise] = source.initial(shape)
    [steps] = source.steps(0, STEPS, schedule.draws_noise, shape)

    def conditions(prior):
        tokens = pipe.tokenizer([*prompts, "", ""], padding="max_length", return_tensors="np")
        encoded = pipe.text_encoder(jnp.asarray(tokens.input_ids))
        both = prior.condition(encoded.text_embeds, encoded.last_hidden_state, tokens.attention_mask.astype(bool))
        return [jax.tree.map(lambda x, i=i: jnp.split(x, 2)[i], both) for i in range(2)]

    @jax.jit
    def sampled(noise):
        middle = len(pipe.prior.transformer_blocks) // 2
        guider = guider_of(name, rf"transformer_blocks\.{middle}\..*")
        if name == "autoguidance":
            guider = diffusion.Autoguidance(scale, weak["prior"][0], conditions(weak["prior"][0])[0])
        last = diffusion.sample(pipe.prior, noise, *conditions(pipe.prior), schedule, guider=guider, rng=steps)
        return pipe.prior.post_process_latents(last)

    expected = np.asarray(sampled(noise))
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    note(worst, "prior beside the core, max |d| / max")
    assert worst <= 2e-5
    if name != "cfg":
        assert np.abs(pipe(prompts, **call).image_embeds - found).max() > 1e-3 * np.abs(expected).max()


class Halved(NamedTuple):
    """A guider of a user's own: half of the way from uncond to cond and beyond, by its own scale."""

    scale: float = 2.0

    def init(self, sample):
        return jnp.zeros(())

    def evaluations(self, cond, uncond):
        return [diffusion.Evaluation(cond), diffusion.Evaluation(uncond)]

    def combine(self, outputs, sample, coefficients, state):
        (cond, variance), (uncond, _) = (diffusion.split_output(x, sample.shape[-1]) for x in outputs)
        guided = uncond + 0.5 * self.scale * (cond - uncond)
        return diffusion.prediction_from_output(coefficients, sample, guided, variance), state + 1


def test_an_own_guider_in_a_pipeline(decoder, embeds):
    call = {"generator": SEED, "num_inference_steps": STEPS, "output_type": "latent"} | SIZE
    own = decoder(*embeds, guider=Halved(6.0), **call).images
    assert decoder.guidance_scale == 6.0
    np.testing.assert_allclose(own, decoder(*embeds, guidance_scale=3.0, **call).images, atol=2e-5)


def test_a_callback_changes_the_scale_of_any_guider(decoder, embeds):
    call = {"generator": SEED, "num_inference_steps": STEPS, "output_type": "latent"} | SIZE
    seen = []

    def change(pipe, i, t, tensors):
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance))
        if i == 1:
            pipe.guidance_scale = 1.0
        return {}

    changed = decoder(*embeds, guider="apg", guidance_scale=SCALE, callback_on_step_end=change, **call).images
    assert seen == [(SCALE, True)] * 2 + [(1.0, False)] * 2
    interval = decoder(*embeds, guider="apg", guidance_scale=SCALE, guidance_interval=(0, 0.5), **call).images
    np.testing.assert_allclose(changed, interval, atol=1e-5)


@pytest.mark.slow
def test_an_interval_keeps_the_memory_of_a_guider(decoder, embeds):
    """The steps outside are conditional, and the momentum goes on where it was."""
    call = {"generator": SEED, "num_inference_steps": 8, "output_type": "latent", "guidance_scale": SCALE} | SIZE
    found = decoder(*embeds, guider="apg", guidance_interval=(0.25, 0.75), **call).images
    schedule = decoder.scheduler.schedule(8)
    t = schedule.timesteps
    guider = diffusion.IntervalGuidance(diffusion.guider_named("apg", SCALE), low=float(t[6] + 1), high=float(t[2] + 1))
    conditions = map(jax.jit(decoder.unet.condition), embeds)
    [noise] = diffusion.noise_source(SEED, 2, diffusion.DECODER_STREAM).initial((2, 8, 8, 4))
    expected = diffusion.sample(decoder.unet, noise, *conditions, schedule, guider=guider)
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), atol=1e-4)


def test_scales_and_settings_are_arguments_of_one_program(decoder, embeds):
    call = {"generator": SEED, "num_inference_steps": STEPS, "output_type": "latent"} | SIZE
    decoder(*embeds, guider="apg:eta=0.5", guidance_scale=2.0, **call)
    known = denoise_steps.jitted._cache_size()
    decoder(*embeds, guider="apg:eta=0.1,momentum=-0.3", guidance_scale=5.0, **call)
    assert denoise_steps.jitted._cache_size() == known


def test_a_combined_call_guides_both_stages(ours):
    pipe = ours["KandinskyV22CombinedPipeline"]
    call = {"generator": SEED, "num_inference_steps": STEPS, "prior_num_inference_steps": STEPS} | SIZE
    found = pipe(
        "red circle", guider="rescaled-cfg", prior_guider="apg", prior_guidance_interval=(0, 0.5), output_type="np",
        **call,
    ).images  # fmt: skip
    embeds = pipe.prior_pipe(
        "red circle", guider="apg", guidance_interval=(0, 0.5), num_inference_steps=STEPS, generator=SEED
    )
    decoded = pipe.decoder_pipe(
        *embeds.values(), guider="rescaled-cfg", num_inference_steps=STEPS, generator=SEED, output_type="np", **SIZE
    ).images
    assert np.array_equal(found, decoded)
    plain = pipe("red circle", output_type="np", **call).images
    assert np.abs(found - plain).max() > 0.02


def test_a_guider_without_uncond_needs_no_negative_embeddings(decoder, embeds, weak):
    call = {"generator": SEED, "num_inference_steps": 2, "output_type": "latent"} | SIZE
    decoder(embeds[0], None, guider=diffusion.Autoguidance(2.0, weak["unet"][0]), **call)
    decoder(embeds[0], None, guider="pag", guidance_scale=1.0, **call)
    with pytest.raises(ValueError, match="by the guider cfg"):
        decoder(embeds[0], None, guider="cfg++", guidance_scale=0.5, **call)


class NoPytree:
    init = evaluations = combine = None


WRONG = [
    ("agp", ValueError, "there is no guider 'agp'"),
    (3, TypeError, "guider must be a name such as 'apg'.*got 3 without init, evaluations, combine"),
    (diffusion.ClassifierFreeGuidance, TypeError, "a class"),
    (NoPytree(), TypeError, "no pytree of numbers; make it a NamedTuple"),
    (diffusion.ClassifierFreeGuidance(jnp.ones(2)), TypeError, "no pytree of numbers"),
    ("cfg++", ValueError, "scale is 4, needed is 0 to 1"),
    ("pag:layers=attention", ValueError, "'attention' matches no attention layer; there are .*mid_block"),
    ("autoguidance:model=nowhere/", CheckpointError, "nowhere/"),
    (diffusion.Autoguidance(2.0), TypeError, "must be a UNet2DConditionModel, or the folder of one, got None"),
]


@pytest.mark.parametrize(("guider", "kind", "message"), WRONG, ids=[str(guider)[:30] for guider, *_ in WRONG])
def test_a_wrong_guider_is_said_before_anything_runs(ours, embeds, guider, kind, message):
    with pytest.raises(kind, match=message):
        ours["KandinskyV22Pipeline"](*embeds, guider=guider, **SIZE)


def test_a_solver_that_the_guider_cannot_serve_is_said(ours, embeds):
    pipe = ours["KandinskyV22Pipeline"]
    other = type(pipe).from_pipe(pipe, scheduler=scheduler_named("dpm++2m", pipe.scheduler.config))
    with pytest.raises(ValueError, match=r"cfg\+\+ is for solvers whose steps keep nothing"):
        other(*embeds, guider="cfg++:scale=0.5", **SIZE)


def test_a_weak_model_is_read_again_where_its_files_are_others(decoder, weak, tmp_path, monkeypatch):
    """Also by the same relative name in another folder, and from a family of models."""
    module, _ = weak["unet"]
    from_file = "autoguidance:model=weak"
    for number, where in enumerate(("a", "b", "b")):
        (tmp_path / where).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / where)
        network, params = diffusion.Network.split(module)
        network.bind(jax.tree.map(lambda x, number=number: (1 + number) * x, params)).save_pretrained("weak")
        loaded = choose_guider(from_file, 2.0, decoder.unet).weak
        leaves = [jax.tree.leaves(diffusion.Network.split(one)[1]) for one in (loaded, module)]
        np.testing.assert_array_equal(leaves[0][0], (1 + number) * leaves[1][0])
    assert choose_guider(from_file, 2.0, decoder.unet).weak is loaded
    family = choose_guider(f"autoguidance:model={SHAPES_MODEL}", 2.0, decoder.unet).weak
    assert family.config == decoder.unet.config


def test_a_weak_model_of_another_kind_is_said(decoder, embeds):
    config = dict(decoder.unet.config.to_dict()) | {"encoder_hid_dim": 8}
    other = UNet2DConditionModel.from_config(config)
    with pytest.raises(ValueError, match=r"has encoder_hid_dim=8, needed is \d+"):
        decoder(*embeds, guider=diffusion.Autoguidance(2.0, other), **SIZE)
