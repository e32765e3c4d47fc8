"""The calls of diffusers' documentation of Kandinsky 2.2, with the import changed.

`tiny` stands for the official names, files made here for downloads, and 64 pixels and few steps for 768 and a hundred.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky_jax import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDPMScheduler,
    DiffusionPipeline,
    KandinskyPriorPipeline,
    KandinskyV22ControlnetImg2ImgPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky_jax.utils import load_image, make_image_grid

pytestmark = pytest.mark.filterwarnings("ignore:there is no cuda device here", "ignore:.*has no effect here")

PROMPT, NEGATIVE = "red heart, 4k photo", "low quality, bad quality"
SMALL = {"height": 64, "width": 64, "num_inference_steps": 4}
FEW = {"num_inference_steps": 3}


def check(image: Image.Image) -> None:
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 1


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    """What the documentation downloads."""
    path = tmp_path_factory.mktemp("downloads") / "cat.png"
    rows, columns = np.mgrid[:96, :128]
    Image.fromarray(np.stack([rows * 2, columns * 2, 255 - rows], axis=-1).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def prior():
    return KandinskyV22PriorPipeline.from_pretrained("tiny", torch_dtype=torch.float32).to("cuda")


@pytest.fixture(scope="module")
def decoder():
    return KandinskyV22Pipeline.from_pretrained("tiny", torch_dtype=torch.float32).to("cuda")


def make_hint(image: Image.Image) -> torch.Tensor:
    """A depth map as the documentation prepares it."""
    depth = np.array(image.convert("L"))[:, :, None]
    depth = np.concatenate([depth, depth, depth], axis=2)
    return (torch.from_numpy(depth).float() / 255.0).permute(2, 0, 1).unsqueeze(0).half()


@pytest.mark.slow
def test_text_to_image(prior, decoder):
    image_emb, negative_image_emb = prior(PROMPT, guidance_scale=1.0, **FEW).to_tuple()
    check(decoder(image_embeds=image_emb, negative_image_embeds=negative_image_emb, **SMALL).images[0])
    generator = torch.Generator(device="cpu").manual_seed(43)
    out = prior(PROMPT, negative_prompt=NEGATIVE, generator=generator, **FEW)
    image = decoder(**out, generator=generator, **SMALL)["images"]
    check(image[0])
    # Half precision, as the documentation loads it.
    pipe = DiffusionPipeline.from_pretrained("tiny/kandinsky-2-2-prior", torch_dtype=torch.float16)
    assert type(pipe) is KandinskyV22PriorPipeline
    assert pipe.dtype == np.float16


@pytest.mark.slow
def test_swapping_the_scheduler(decoder, prior):
    pipe = KandinskyV22Pipeline.from_pipe(decoder)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    check(pipe(**prior(PROMPT, **FEW), **SMALL).images[0])


@pytest.mark.slow
def test_combined_text_to_image():
    pipe = AutoPipelineForText2Image.from_pretrained("tiny", torch_dtype=torch.float16)
    pipe.enable_model_cpu_offload()
    image = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        prior_guidance_scale=1.0,
        guidance_scale=4.0,
        prior_num_inference_steps=3,
        **SMALL,
    ).images[0]
    check(image)


@pytest.mark.slow
def test_image_to_image(picture, decoder):
    prior = KandinskyPriorPipeline.from_pretrained("tiny", torch_dtype=torch.float32, use_safetensors=True).to("cuda")
    pipe = KandinskyV22Img2ImgPipeline.from_pipe(decoder)
    original = load_image(picture).resize((96, 64))
    image_embeds, negative_image_embeds = prior(PROMPT, NEGATIVE, **FEW).to_tuple()
    image = pipe(
        image=original,
        image_embeds=image_embeds,
        negative_image_embeds=negative_image_embeds,
        strength=0.5,
        **SMALL,
    ).images[0]
    check(image)
    assert make_image_grid([original.resize((64, 64)), image.resize((64, 64))], rows=1, cols=2).size == (128, 64)


@pytest.mark.slow
def test_combined_image_to_image(picture):
    pipe = AutoPipelineForImage2Image.from_pretrained("tiny", torch_dtype=torch.float32, use_safetensors=True)
    pipe.enable_model_cpu_offload()
    original = load_image(picture)
    original.thumbnail((64, 64))
    image = pipe(
        prompt=PROMPT, negative_prompt=NEGATIVE, image=original, strength=0.5, prior_num_inference_steps=3, **SMALL
    ).images[0]
    check(image)


@pytest.mark.slow
def test_inpainting(picture, prior):
    pipe = KandinskyV22InpaintPipeline.from_pretrained("tiny", torch_dtype=torch.float32, use_safetensors=True).to(
        "cuda"
    )
    init_image = load_image(picture).resize((64, 64))
    mask = np.zeros((64, 64), dtype=np.float32)
    mask[:20, 20:-20] = 1
    prior_output = prior("a hat", **FEW)
    image = pipe(image=init_image, mask_image=mask, **prior_output, **SMALL).images[0]
    check(image)
    grid = make_image_grid([init_image, Image.fromarray((mask * 255).astype("uint8"), "L"), image], rows=1, cols=3)
    assert grid.size == (192, 64)


@pytest.mark.slow
def test_combined_inpainting(picture):
    pipe = AutoPipelineForInpainting.from_pretrained("tiny", torch_dtype=torch.float32)
    pipe.enable_model_cpu_offload()
    mask = np.zeros((64, 64), dtype=np.float32)
    mask[:20, 20:-20] = 1
    init_image = load_image(picture).resize((64, 64))
    check(pipe(prompt="a hat", image=init_image, mask_image=mask, prior_num_inference_steps=3, **SMALL).images[0])


@pytest.mark.slow
def test_interpolation(picture, prior, decoder):
    image = load_image(picture)
    prior_out = prior.interpolate(["a cat", image, image.rotate(90)], [0.3, 0.3, 0.4], **FEW)
    check(decoder(**prior_out, **SMALL).images[0])


@pytest.mark.slow
def test_controlnet(picture, prior):
    img = load_image(picture).resize((64, 64))
    hint = make_hint(img)
    pipe = KandinskyV22ControlnetPipeline.from_pretrained("tiny", torch_dtype=torch.float32).to("cuda")
    generator = torch.Generator(device="cpu").manual_seed(43)
    image_emb, zero_image_emb = prior(prompt=PROMPT, negative_prompt=NEGATIVE, generator=generator, **FEW).to_tuple()
    image = pipe(
        image_embeds=image_emb, negative_image_embeds=zero_image_emb, hint=hint, generator=generator, **SMALL
    ).images[0]
    check(image)

    emb2emb = KandinskyV22PriorEmb2EmbPipeline.from_pipe(prior)
    img2img = KandinskyV22ControlnetImg2ImgPipeline.from_pipe(pipe)
    generator = torch.Generator(device="cpu").manual_seed(43)
    img_emb = emb2emb(prompt=PROMPT, image=img, strength=0.85, generator=generator, **FEW)
    negative_emb = emb2emb(prompt=NEGATIVE, image=img, strength=1, generator=generator, **FEW)
    image = img2img(
        image=img,
        strength=0.5,
        image_embeds=img_emb.image_embeds,
        negative_image_embeds=negative_emb.image_embeds,
        hint=hint,
        generator=generator,
        **SMALL,
    ).images[0]
    check(image)


def test_optimizations(decoder):
    """Recommendations of the documentation for PyTorch have no effect here."""
    pipe = KandinskyV22Pipeline.from_pipe(decoder)
    pipe.enable_xformers_memory_efficient_attention()
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
    pipe.unet.set_attn_processor(object())
    pipe.enable_model_cpu_offload()
    assert pipe.unet is decoder.unet
