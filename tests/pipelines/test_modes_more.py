"""Further cases of modes: guidance off, callbacks, broadcasting, outputs, and deviations from the reference."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from kandinsky_jax import DDIMScheduler, DDPMScheduler, TorchGenerator
from kandinsky_jax.pipelines import checks
from tests.conftest import note, official_config, quick_and_slow, worst
from tests.pipelines.test_modes import MODES, PROMPTS, extra, for_reference, generators, given, picture

SIZE = {"height": 64, "width": 64, "output_type": "np"}
SHORT = {"num_inference_steps": 6} | SIZE


@pytest.fixture(scope="module")
def embeds(ours):
    return ours["KandinskyV22PriorPipeline"](PROMPTS[:2], generator=2, output_type="np", return_dict=False)


def assert_same(ours, reference) -> None:
    difference = np.abs(np.asarray(ours) - np.asarray(reference)) * 255
    assert difference.shape[1:] == (64, 64, 3)
    assert note(difference.mean(), "mean |d|, of 255") <= 0.2
    assert note(difference.max(), "max |d|, of 255") <= 4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["img2img", "inpaint", "controlnet"])
def test_guidance_off_and_two_images(ours, theirs, embeds, mode):
    """The reference forgets to repeat where guidance is off: it is given everything twice instead."""
    rows = [x[:1] for x in embeds]
    pictures = given(mode, 1, 64, 64)
    generated = ours[MODES[mode]](
        image_embeds=rows[0],
        negative_image_embeds=None,
        guidance_scale=1.0,
        num_images_per_prompt=2,
        generator=TorchGenerator(3),
        **pictures,
        **SHORT,
        **extra(mode),
    ).images
    reference = theirs[MODES[mode]](
        image_embeds=torch.tensor(rows[0].repeat(2, axis=0)),
        negative_image_embeds=torch.tensor(rows[1].repeat(2, axis=0)),
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        **for_reference({name: x * 2 for name, x in pictures.items()}),
        **SHORT,
        **extra(mode),
    ).images
    assert_same(generated, reference)


@pytest.mark.parametrize("mode", ["inpaint", "img2img"])
@pytest.mark.parametrize("kind", quick_and_slow(("official DDPM", "DDIM"), "DDIM"))
def test_other_schedulers(ours, theirs, embeds, mode, kind):
    """Starts and blends follow the scheduler: the official configuration, and a deterministic one."""
    config = official_config("kandinsky-2-2-decoder", "scheduler")
    name, changes = (
        ("DDPMScheduler", {}) if kind == "official DDPM" else ("DDIMScheduler", {"timestep_spacing": "trailing"})
    )
    mine, other = ours[MODES[mode]], theirs[MODES[mode]]
    kept = mine.scheduler, other.scheduler
    mine.scheduler = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}[name].from_config(
        config, **changes
    )
    other.scheduler = getattr(diffusers, name).from_config(config, **changes)
    try:
        rows, pictures = [x[:1] for x in embeds], given(mode, 1, 64, 64)
        settings = {"num_inference_steps": 10, "output_type": "np", "height": 64, "width": 64} | extra(mode)
        generated = mine(
            image_embeds=rows[0], negative_image_embeds=rows[1], generator=TorchGenerator(4), **pictures, **settings
        ).images
        reference = other(
            image_embeds=torch.tensor(rows[0]),
            negative_image_embeds=torch.tensor(rows[1]),
            generator=torch.Generator().manual_seed(4),
            **for_reference(pictures),
            **settings,
        ).images
        assert_same(generated, reference)
    finally:
        mine.scheduler, other.scheduler = kept


def test_inpaint_callback_sees_and_changes(ours, theirs, embeds):
    """The kept picture and the mask among the tensors; what is returned takes effect as in the reference."""
    seen: dict[str, list] = {"ours": [], "theirs": []}

    def watch(who):
        def callback(pipe, i, t, tensors):
            seen[who].append((i, int(t), {k: torch.as_tensor(v).numpy().copy() for k, v in tensors.items()}))
            changed = {"latents": tensors["latents"] * 0.7} if i in (1, 5) else {}  # 5 is the last step
            if i == 2:
                changed |= {"masked_image": tensors["masked_image"] * 0.5, "mask_image": tensors["mask_image"] * 0.9}
            return dict(tensors) | changed

        return callback

    names = ["latents", "image_embeds", "negative_image_embeds", "masked_image", "mask_image"]
    name, pictures = "KandinskyV22InpaintPipeline", given("inpaint", 1, 64, 64)
    rows = [x[:1] for x in embeds]
    generated = ours[name](
        image_embeds=rows[0],
        negative_image_embeds=rows[1],
        generator=TorchGenerator(6),
        callback_on_step_end=watch("ours"),
        callback_on_step_end_tensor_inputs=names,
        **pictures,
        **SHORT,
    ).images
    reference = theirs[name](
        image_embeds=torch.tensor(rows[0]),
        negative_image_embeds=torch.tensor(rows[1]),
        generator=torch.Generator().manual_seed(6),
        callback_on_step_end=watch("theirs"),
        callback_on_step_end_tensor_inputs=names,
        **for_reference(pictures),
        **SHORT,
    ).images
    assert [(i, t, sorted(x)) for i, t, x in seen["ours"]] == [(i, t, sorted(x)) for i, t, x in seen["theirs"]]
    for (_, _, mine), (_, _, other) in zip(seen["ours"], seen["theirs"], strict=True):
        for tensor in mine:
            assert worst(mine[tensor], other[tensor]) <= 2e-4, tensor
    assert_same(generated, reference)


def test_img2img_callback_counts_the_steps_that_are_done(ours, embeds):
    steps: list[tuple[int, int]] = []
    ours["KandinskyV22Img2ImgPipeline"](
        *(embeds[0][:1], picture(0), embeds[1][:1]),
        strength=0.5,
        generator=0,
        callback_on_step_end=lambda pipe, i, t, tensors: steps.append((i, t)) or tensors,
        **SHORT,
    )
    assert [i for i, _ in steps] == [0, 1, 2]
    assert ours["KandinskyV22Img2ImgPipeline"].num_timesteps == 3


@pytest.mark.filterwarnings("ignore:.*callback:FutureWarning")
@pytest.mark.parametrize("mode", quick_and_slow(("Controlnet", ""), ""))
def test_the_older_callback(ours, theirs, embeds, mode):
    """`callback(step, timestep, latents)` every so many steps, which the reference still takes."""
    seen: dict[str, list] = {"ours": [], "theirs": []}
    name, hints = f"KandinskyV22{mode}Pipeline", [given("controlnet", 1, 64, 64)["hint"]] if mode else []
    rows = [x[:1] for x in embeds]

    def watcher(who: str):
        return lambda i, t, latents: seen[who].append((i, int(t), torch.as_tensor(latents).numpy().copy()))

    ours[name](*rows, *hints, generator=TorchGenerator(1), callback=watcher("ours"), callback_steps=2, **SHORT)
    theirs[name](
        *(torch.tensor(x) for x in rows),
        *(torch.tensor(np.stack(hint)) for hint in hints),
        generator=torch.Generator().manual_seed(1),
        callback=watcher("theirs"),
        callback_steps=2,
        **SHORT,
    )
    assert [(i, t) for i, t, _ in seen["ours"]] == [(i, t) for i, t, _ in seen["theirs"]]
    assert len(seen["ours"]) == 3
    for (_, _, mine), (_, _, other) in zip(seen["ours"], seen["theirs"], strict=True):
        assert worst(mine, other) <= 2e-4


@pytest.mark.parametrize("mode", MODES)
def test_every_output_type(ours, embeds, mode):
    """ "pt" is always 0..1, and the controlnets give latents too, unlike the reference's."""
    rows = {"image_embeds": embeds[0][:1], "negative_image_embeds": embeds[1][:1]}
    pictures = given(mode, 1, 64, 64)

    def generate(kind: str):
        generator = TorchGenerator(1)
        return ours[MODES[mode]](
            **rows, **pictures, generator=generator, **extra(mode), **SHORT | {"output_type": kind}
        ).images

    array = generate("np")
    np.testing.assert_array_equal(generate("pt"), array.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(np.asarray(generate("pil")[0]), (array[0] * 255).round())
    assert generate("latent").shape == (1, 4, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inpaint", "controlnet img2img"])
def test_one_picture_serves_all_prompts(ours, embeds, mode):
    rows = {"image_embeds": embeds[0], "negative_image_embeds": embeds[1]}
    one = given(mode, 1, 64, 64)
    generated = [
        ours[MODES[mode]](**rows, **pictures, generator=TorchGenerator(1), **extra(mode), **SHORT).images
        for pictures in ({name: x[0] for name, x in one.items()}, {name: x * 2 for name, x in one.items()})
    ]
    np.testing.assert_array_equal(generated[0], generated[1])
    assert np.abs(generated[0][0] - generated[0][1]).max() > 0.1  # other noise


def test_pictures_are_dealt_out():
    """One for all, one per prompt (its images are neighbours), or one per generated picture."""
    rows = np.arange(6)
    assert checks.per_picture(rows[:1], "image", 3, 2).tolist() == [0] * 6
    assert checks.per_picture(rows[:3], "image", 3, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert checks.per_picture(rows, "image", 3, 2).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["img2img", "inpaint", "controlnet"])
def test_a_picture_does_not_depend_on_its_batch(ours, embeds, mode):
    """JAX keys, and each element its own picture, mask and hint."""
    pictures = given(mode, 2, 64, 64)
    both = ours[MODES[mode]](
        image_embeds=embeds[0], negative_image_embeds=embeds[1], **pictures, generator=[4, 9], **SHORT, **extra(mode)
    ).images
    for i, seed in enumerate([4, 9]):
        own = {name: x[i] for name, x in pictures.items()}
        rows = {"image_embeds": embeds[0][i : i + 1], "negative_image_embeds": embeds[1][i : i + 1]}
        alone = ours[MODES[mode]](**rows, **own, generator=seed, **SHORT, **extra(mode)).images
        np.testing.assert_allclose(both[i], alone[0], atol=1e-4)


@pytest.mark.slow
def test_kept_latents_are_the_pictures_own(ours, embeds):
    """Bit for bit, whatever was generated in the repainted part; `paste_back` does the same for pixels."""
    from kandinsky_jax import images
    from kandinsky_jax.diffusion.inpainting import latent_repaint_mask

    pipe, pictures = ours["KandinskyV22InpaintPipeline"], given("inpaint", 2, 64, 64)
    call = {"image_embeds": embeds[0], "negative_image_embeds": embeds[1], "generator": 3} | pictures | SHORT
    latents = np.asarray(pipe(**call | {"output_type": "latent"}).images).transpose(0, 2, 3, 1)
    pixels = images.pictures(pictures["image"], "image", 64, 64)
    mask = images.masks(pictures["mask_image"], "mask_image", 64, 64)
    keep = ~latent_repaint_mask(mask, 8, 8)
    encoded = np.asarray(pipe._encode(pixels))
    np.testing.assert_array_equal(latents[keep], encoded[keep])
    assert np.abs(latents - encoded)[~keep].mean() > 0.1

    plain, pasted = pipe(**call).images, pipe(**call, paste_back=True).images
    np.testing.assert_array_equal(pasted[~mask], images.from_network(pixels)[~mask])
    np.testing.assert_array_equal(pasted[mask], plain[mask])
    assert np.abs(plain - pasted)[~mask].max() > 0.01


def test_strength_one_starts_from_noise(ours, theirs, embeds):
    """All steps are done, and hardly anything of the picture is left, as in the reference."""
    rows, pictures = [x[:1] for x in embeds], given("img2img", 1, 64, 64)
    mine, other = generators("img2img", 1, 5)
    generated = ours["KandinskyV22Img2ImgPipeline"](
        rows[0], *pictures["image"], rows[1], strength=1, generator=mine, **SHORT
    )
    settings = {"strength": 1.0, "generator": other} | SHORT
    reference = theirs["KandinskyV22Img2ImgPipeline"](
        *(torch.tensor(rows[0]), pictures["image"], torch.tensor(rows[1])), **settings
    )
    assert_same(generated.images, reference.images)


def test_emb2emb_takes_embeddings_and_pixels(ours, theirs):
    """Ready embeddings [B, D], and [B, 3, S, S] for the vision tower, as in the reference."""
    name, rng = "KandinskyV22PriorEmb2EmbPipeline", np.random.default_rng(0)
    settings = {"strength": 0.5, "num_inference_steps": 6}
    for shape in ((1, 64), (1, 3, 64, 64)):
        arrays = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
        mine = ours[name](PROMPTS[:2], arrays, generator=TorchGenerator(1), **settings)
        joined = ours[name](PROMPTS[:2], np.concatenate(arrays), generator=TorchGenerator(1), **settings)
        other = theirs[name](
            PROMPTS[:2], list(map(torch.tensor, arrays)), generator=torch.Generator().manual_seed(1), **settings
        )
        assert worst(mine.image_embeds, other.image_embeds) <= 1e-3
        np.testing.assert_array_equal(mine.image_embeds, joined.image_embeds)


def test_a_mix_takes_ready_embeddings_and_pictures_alike(ours):
    """A picture, its array, its pixels for CLIP and its embedding are one and the same."""
    pipe = ours["KandinskyV22PriorPipeline"]
    square = picture(0).resize((64, 64))
    pixels = pipe.image_processor(square).transpose(0, 3, 1, 2)
    kinds = [square, np.asarray(square), pixels]
    found = [pipe.interpolate([kind], [1.0]).image_embeds for kind in kinds]
    for other in [*found[1:], pipe.interpolate([found[0]], [1.0]).image_embeds]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


def test_a_mix_of_one_is_the_prompts_own(ours):
    """With a seed, every item gets the noise that it would get alone."""
    pipe = ours["KandinskyV22PriorPipeline"]
    alone = pipe(PROMPTS[0], generator=3, output_type="np")
    mixed = pipe.interpolate([PROMPTS[1], PROMPTS[0]], [0, 1], generator=3)
    np.testing.assert_allclose(mixed.image_embeds, alone.image_embeds, atol=1e-6)
    np.testing.assert_allclose(mixed.negative_image_embeds, alone.negative_image_embeds, atol=1e-6)


@pytest.mark.slow
def test_the_reference_uses_the_first_mask_for_all(ours, theirs, embeds):
    """Why inpaint is compared picture by picture: as one batch, the reference's second picture is another one."""
    pictures = given("inpaint", 2, 64, 64)
    mine, _ = generators("inpaint", 2, 3)
    settings = {"image_embeds": embeds[0], "negative_image_embeds": embeds[1]}
    generated = ours["KandinskyV22InpaintPipeline"](**settings, **pictures, generator=mine, **SHORT).images
    others = [torch.Generator().manual_seed(s) for s in (3, 4)]
    batch = theirs["KandinskyV22InpaintPipeline"](
        **{name: torch.tensor(x) for name, x in settings.items()}, **for_reference(pictures), generator=others, **SHORT
    ).images
    assert np.abs(generated[0] - batch[0]).max() * 255 <= 4
    assert np.abs(generated[1] - batch[1]).max() * 255 > 50
