"""A callback that sets the guidance scale changes the following steps as in diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kandinsky_jax import TorchGenerator
from tests.conftest import note, quick_and_slow, worst
from tests.pipelines.test_compile import compilations
from tests.pipelines.test_modes import for_reference, given

PROMPTS = ["a red circle on a blue background", "yellow ring, black background"]
CALL = {"num_inference_steps": 6, "height": 64, "width": 64, "output_type": "np"}
PRIOR = ("prompt_embeds", "text_encoder_hidden_states", "text_mask")
CASES = {  # the first scale, and those that a callback sets, by the step after which it does
    "changed": (4.0, {1: 1.5, 3: 7.0}),
    "turned off": (4.0, {2: 0.0}),
    "turned on": (1.0, {2: 4.0}),
    "off and on": (4.0, {1: 1.0, 3: 3.0}),
}


@pytest.fixture(scope="module")
def embeds(ours):
    return ours["KandinskyV22PriorPipeline"](
        PROMPTS[0], num_inference_steps=4, generator=2, output_type="np", return_dict=False
    )


def theirs_callback(scales, uncond):
    """As diffusers documents it: with the scale, the batch of every tensor is halved or doubled.

    Args:
        uncond: the unconditional rows by name; the others are the same in both halves.
    """

    def callback(pipe, i, t, tensors):
        before = pipe.do_classifier_free_guidance
        pipe._guidance_scale = scales.get(i, pipe._guidance_scale)
        result = dict(tensors)
        for name in tensors.keys() - {"latents"}:
            if before and not pipe.do_classifier_free_guidance:
                result[name] = tensors[name].chunk(2)[-1]
            elif pipe.do_classifier_free_guidance and not before:
                result[name] = torch.cat([uncond.get(name, tensors[name]), tensors[name]])
        return result

    return callback


def ours_callback(scales, name="guidance_scale"):
    """The scale alone: what belongs to it is ours to do."""

    def callback(pipe, i, t, tensors):
        setattr(pipe, name, scales.get(i, pipe.guidance_scale))
        return tensors

    return callback


@pytest.mark.parametrize("case", quick_and_slow(CASES, "off and on"))
@pytest.mark.parametrize("mode", ["", pytest.param("Inpaint", marks=pytest.mark.slow)])
def test_decoders_follow_the_scale(ours, theirs, embeds, mode, case):
    scale, scales = CASES[case]
    name, pictures = f"KandinskyV22{mode}Pipeline", given("inpaint", 1, 64, 64) if mode else {}
    rows = dict(zip(("image_embeds", "negative_image_embeds"), embeds, strict=True))
    generated = ours[name](
        **rows,
        **pictures,
        guidance_scale=scale,
        generator=TorchGenerator(3),
        callback_on_step_end=ours_callback(scales, "guidance_scale" if mode else "_guidance_scale"),
        **CALL,
    ).images
    tensors = {k: torch.tensor(v) for k, v in rows.items()}
    expected = theirs[name](
        **tensors,
        **for_reference(pictures),
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=theirs_callback(scales, {"image_embeds": tensors["negative_image_embeds"]}),
        callback_on_step_end_tensor_inputs=[
            "latents",
            "image_embeds",
            *(["masked_image", "mask_image"] if mode else []),
        ],
        **CALL,
    ).images
    assert note(np.abs(generated - expected).max() * 255, "max |d|, of 255") <= 4
    plain = ours[name](**rows, **pictures, guidance_scale=scale, generator=TorchGenerator(3), **CALL).images
    assert np.abs(generated - plain).max() * 255 > 10  # and it has an effect


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("negative", [None, pytest.param("gray", marks=pytest.mark.slow)])
def test_the_prior_follows_the_scale(ours, theirs, case, negative):
    scale, scales = CASES[case]
    call = {"negative_prompt": negative, "num_inference_steps": 6, "guidance_scale": scale}
    name = "KandinskyV22PriorPipeline"
    found = ours[name](
        PROMPTS[0], generator=TorchGenerator(5), callback_on_step_end=ours_callback(scales), output_type="np", **call
    )
    texts = [PROMPTS[0]] if negative is None else [PROMPTS[0], negative]
    unconditional = None if negative is None else [negative] * 2
    both = theirs[name]._encode_prompt(texts, "cpu", 1, True, unconditional)
    uncond = {k: x.chunk(2)[0] for k, x in zip(PRIOR, both, strict=True)}
    expected = theirs[name](
        PROMPTS[0],
        generator=torch.Generator().manual_seed(5),
        callback_on_step_end=theirs_callback(scales, uncond),
        callback_on_step_end_tensor_inputs=["latents", *PRIOR],
        output_type="np",
        **call,
    )
    assert worst(found.image_embeds, expected.image_embeds) <= 1e-3
    plain = ours[name](PROMPTS[0], generator=TorchGenerator(5), output_type="np", **call)
    assert np.abs(found.image_embeds - plain.image_embeds).max() > 0.01


def test_a_combined_pipeline_hands_its_callbacks_the_stage(ours, embeds):
    """And its own `guidance_scale` and `prior_guidance_scale` are those of the stages."""
    pipe, seen = ours["KandinskyV22CombinedPipeline"], []

    def prior_callback(stage, i, t, tensors):
        pipe.prior_guidance_scale = 2.0 + i
        seen.append(stage.guidance_scale)
        return tensors

    def callback(stage, i, t, tensors):
        pipe._guidance_scale += 1
        seen.append((stage.guidance_scale, stage.num_timesteps, stage.do_classifier_free_guidance))
        return tensors

    call = CALL | {"prior_num_inference_steps": 2, "num_inference_steps": 3, "guidance_scale": 4.0}
    changed = pipe(
        PROMPTS[0], generator=0, prior_callback_on_step_end=prior_callback, callback_on_step_end=callback, **call
    ).images
    assert seen == [2.0, 3.0, (5.0, 3, True), (6.0, 3, True), (7.0, 3, True)]
    assert (pipe.guidance_scale, pipe.prior_guidance_scale, pipe.num_timesteps) == (7.0, 3.0, 3)
    assert np.abs(changed - pipe(PROMPTS[0], generator=0, **call).images).max() > 0.01


def test_halved_as_diffusers_documents_it(ours, embeds):
    """A callback that also halves the embeddings, as it has to there."""

    def halving(pipe, i, t, tensors):
        if i == 2:
            pipe._guidance_scale = 0.0
            tensors["image_embeds"] = np.split(tensors["image_embeds"], 2)[-1]
        return tensors

    pipe, call = ours["KandinskyV22Pipeline"], {"guidance_scale": 4.0} | CALL
    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "image_embeds"]}
    halved = pipe(*embeds, callback_on_step_end=halving, generator=TorchGenerator(1), **inputs, **call).images
    alone = pipe(*embeds, callback_on_step_end=ours_callback({2: 0.0}), generator=TorchGenerator(1), **call).images
    np.testing.assert_allclose(halved, alone, atol=1e-4)


@pytest.mark.slow
def test_another_scale_compiles_nothing(ours, embeds):
    pipe, call = ours["KandinskyV22Pipeline"], {"guidance_scale": 4.0, "generator": 1} | CALL
    pipe(*embeds, callback_on_step_end=ours_callback({2: 0.0}), **call)
    with compilations() as events:
        pipe(*embeds, callback_on_step_end=ours_callback({0: 3.0, 1: 2.5, 3: 1.0}), **call)
    assert not events


@pytest.mark.parametrize(
    ("value", "negative", "says"),
    [
        ("4", True, "guidance_scale must be a finite number, got '4'"),
        (float("nan"), True, "finite"),
        (4.0, False, "guidance was turned on by a callback, and there are no negative_image_embeds"),
    ],
)
def test_what_cannot_be_followed_is_said(ours, embeds, value, negative, says):
    pipe, call = ours["KandinskyV22Pipeline"], {"guidance_scale": 1.0, "generator": 1} | CALL
    with pytest.raises(ValueError, match=says):
        pipe(embeds[0], embeds[1] if negative else None, callback_on_step_end=ours_callback({0: value}), **call)


def test_rows_that_fit_no_batch_are_refused(ours, embeds):
    call = {"guidance_scale": 4.0, "generator": 1} | CALL
    inputs = {"callback_on_step_end_tensor_inputs": ["image_embeds"]}
    wrong = {"callback_on_step_end": lambda *_: {"image_embeds": np.zeros((3, embeds[0].shape[1]))}}
    with pytest.raises(ValueError, match=r"image_embeds has shape .* its first axis must be 1, or 2 with guidance"):
        ours["KandinskyV22Pipeline"](*embeds, **wrong, **inputs, **call)


def test_before_a_call_there_is_no_scale(ours):
    fresh = type(ours["KandinskyV22Pipeline"]).from_pipe(ours["KandinskyV22Pipeline"])
    assert not hasattr(fresh, "guidance_scale")
    with pytest.raises(AttributeError, match="after the pipeline has been called"):
        _ = fresh.num_timesteps


def test_a_callbacks_negative_embedding_counts_where_image_embeds_has_none(ours):
    """As in diffusers it is ignored where image_embeds has both; where it is used, its shape is checked."""
    pipe, dim = ours["KandinskyV22Pipeline"], ours["KandinskyV22Pipeline"].unet.config.encoder_hid_dim
    embeds, negative = np.ones((1, dim), np.float32), np.zeros((1, dim), np.float32)
    call = CALL | {"generator": 1, "guidance_scale": 4.0}
    names = ("latents", "image_embeds", "negative_image_embeds")

    def run(returned):
        changed = {"callback_on_step_end": lambda pipe, i, t, tensors: returned if i == 0 else {}}
        return pipe(embeds, negative, **call, **changed, callback_on_step_end_tensor_inputs=names).images

    plain = run({})
    assert np.array_equal(run({"negative_image_embeds": np.ones((3, 2), np.float32)}), plain)
    other = run({"image_embeds": embeds, "negative_image_embeds": 0.5 * embeds})
    assert np.abs(other - plain).max() > 1e-3
    with pytest.raises(ValueError, match=r"the callback's negative_image_embeds has shape \(3, 2\), needed is \(1, "):
        run({"image_embeds": embeds, "negative_image_embeds": np.ones((3, 2), np.float32)})
