"""Text to image and image to image with the embedded model: combined pipelines and decoders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from digest_cases import Case, inputs

STEPS = 3
OPTIONS = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "np", "generator": 0}
GUIDED, UNGUIDED = {"guidance_scale": 2.0}, {"guidance_scale": 1.0}
TWO = {"num_images_per_prompt": 2, "generator": 3}
# Variants of a decoder's call, by name; True marks those of the quick subset.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "guided/one image/seed 0": (GUIDED, True),
    "guided/one image/seed 5": (GUIDED | {"generator": 5}, False),
    "guided/one image/torch seed 3": (GUIDED | {"generator": ("torch", 3)}, True),
    "guided/two images/seed 3": (GUIDED | TWO, True),
    "guided/two images/torch seed 3": (GUIDED | TWO | {"generator": ("torch", 3)}, False),
    "guided/two images/list of seeds": (GUIDED | TWO | {"generator": [4, 9]}, False),
    "guided/one image/latents out": (GUIDED | {"output_type": "latent"}, True),
    "guided/one image/pt": (GUIDED | {"output_type": "pt"}, False),
    "guided/one image/scale 7.5 and five steps": ({"guidance_scale": 7.5, "num_inference_steps": 5}, False),
    "guided/one image/64 x 128": (GUIDED | {"width": 128}, False),
    "unguided/one image/seed 0": (UNGUIDED, False),
    "unguided/two images/seed 3": (UNGUIDED | TWO, False),
}


def cases() -> list[Case]:
    """All cases of the module."""
    tiny = functools.partial(mode_cases, model=inputs.TINY)
    photo = {"image": inputs.picture(), "strength": 0.7}
    return [
        *tiny("text2img", "KandinskyV22CombinedPipeline", {}),
        *tiny("img2img", "KandinskyV22Img2ImgCombinedPipeline", photo),
        *tiny("text2img decoder", "KandinskyV22Pipeline", {}),
        *tiny("img2img decoder", "KandinskyV22Img2ImgPipeline", photo),
        *_callback_cases(),
        *_input_cases(),
        *_bfloat16_cases(),
    ]


def mode_cases(
    mode: str,
    name: str,
    extra: Mapping[str, Any],
    model: str,
    variants: Iterable[str] = VARIANTS,
) -> list[Case]:
    """The variants of one pipeline, combined or a decoder."""
    found = []
    for variant in variants:
        changes, quick = VARIANTS[variant]
        run = functools.partial(_run, name, model, dict(extra) | changes)
        found.append(Case(f"{mode}/{variant}", run, quick))
    if "Combined" in name:
        for variant, changes in (
            ("guided/negative prompt", {"negative_prompt": "red circle"}),
            ("guided/two prompts", {"prompt": inputs.PROMPTS, "generator": [1, 2]}),
            ("guided/prior unguided", {"prior_guidance_scale": 1.0}),
        ):
            run = functools.partial(_run, name, model, {**extra, **GUIDED, **changes})
            found.append(Case(f"{mode}/{variant}", run, quick="negative" in variant))
    return found


def _run(name: str, model: str, changes: dict[str, Any], _: Path) -> Any:
    return call(inputs.pipeline(name, model), **changes)


def call(pipe: Any, **changes: Any) -> Any:
    """One call; a generator ("torch", seed) is a `TorchGenerator`."""
    import kandinsky_jax as kj

    arguments = OPTIONS | changes
    if isinstance(arguments["generator"], tuple):
        arguments["generator"] = kj.TorchGenerator(arguments["generator"][1])
    if hasattr(pipe, "prior_pipe"):
        scale = arguments["guidance_scale"]
        arguments = {"prompt": inputs.PROMPTS[0], "prior_guidance_scale": scale, **arguments}
        arguments |= {"prior_num_inference_steps": 2}
    else:
        dim = pipe.unet.config.encoder_hid_dim
        given = {"image_embeds": inputs.embeds(dim, 7), "negative_image_embeds": inputs.embeds(dim, 8)}
        arguments = given | arguments
    return as_arrays(pipe(**arguments).images)


def as_arrays(images: Any) -> Any:
    """PIL pictures as arrays; anything else as it is."""
    return [np.asarray(image) for image in images] if isinstance(images, list) else images


# Callbacks --------------------------------------------------------------------------------------------------------


def _callback_cases() -> list[Case]:
    names = {
        "text2img": "KandinskyV22CombinedPipeline",
        "text2img decoder": "KandinskyV22Pipeline",
        "img2img decoder": "KandinskyV22Img2ImgPipeline",
    }
    photo = {"image": inputs.picture(), "strength": 0.7}
    found = []
    for mode, name in names.items():
        extra = photo if "img2img" in mode else {}
        for kind, callback in (("sees latents", _seen), ("changes latents", _changed), ("guidance off", _turned_off)):
            run = functools.partial(_with_callback, name, extra, callback)
            found.append(Case(f"{mode}/callback {kind}", run, quick=mode == "text2img decoder"))
    found.append(Case("text2img/callback of the prior", _prior_callback))
    for share in ((0.4, 1.0), (0.0, 0.5)):
        run = functools.partial(_interval, share)
        found.append(Case(f"text2img/guidance interval {share[0]} to {share[1]}", run, quick=share[0] > 0))
    return found


def _with_callback(name: str, extra: dict[str, Any], callback: Callable[..., Any], _: Path) -> Any:
    seen: list[Any] = []
    run = functools.partial(callback, seen)
    images = call(inputs.pipeline(name, inputs.TINY), **GUIDED, **extra, callback_on_step_end=run)
    return {"images": images, "seen": seen}


def _seen(seen: list[Any], pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    seen.append([step, float(timestep), *(np.asarray(tensors[name]) for name in sorted(tensors))])
    return {}


def _changed(seen: list[Any], pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    seen.append(step)
    return {"latents": np.asarray(tensors["latents"]) * np.float32(0.5)} if step == 0 else {}


def _turned_off(seen: list[Any], pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 0:
        pipe._guidance_scale = 1.0  # the attribute that diffusers' documentation has callbacks set
    return {}


def _prior_callback(_: Path) -> Any:
    seen: list[Any] = []
    pipe = inputs.pipeline("KandinskyV22CombinedPipeline", inputs.TINY)
    images = call(pipe, **GUIDED, prior_callback_on_step_end=functools.partial(_seen, seen))
    return {"images": images, "seen": seen}


def _interval(share: tuple[float, float], _: Path) -> Any:
    pipe = inputs.pipeline("KandinskyV22Pipeline", inputs.TINY)
    return call(pipe, **GUIDED, num_inference_steps=6, guidance_interval=share)


# Forms of input ---------------------------------------------------------------------------------------------------


def _input_cases() -> list[Case]:
    photo = inputs.picture(1)
    pixels = np.asarray(photo)
    forms = {
        "uint8 array": pixels,
        "float array": pixels.astype(np.float32) / 255,
        "channels first": pixels.transpose(2, 0, 1),
        "16-bit array": pixels.astype(np.uint16) * 257,
        "grey": photo.convert("L"),
        "transparent": photo.convert("RGBA"),
    }
    found = []
    for form, image in forms.items():
        run = functools.partial(
            _run,
            "KandinskyV22Img2ImgPipeline",
            inputs.TINY,
            GUIDED | {"image": image, "strength": 0.5, "output_type": "latent"},
        )
        found.append(Case(f"img2img decoder/image as {form}", run))
    for strength in (0.34, 1.0):
        changes = GUIDED | {"image": photo, "strength": strength, "output_type": "latent"}
        run = functools.partial(_run, "KandinskyV22Img2ImgPipeline", inputs.TINY, changes)
        found.append(Case(f"img2img decoder/strength {strength}", run))
    first = np.random.default_rng(2).normal(size=(1, 4, 8, 8)).astype(np.float32)
    run = functools.partial(_run, "KandinskyV22Pipeline", inputs.TINY, GUIDED | {"latents": first})
    found.append(Case("text2img decoder/latents given", run))
    return found


def _bfloat16_cases() -> list[Case]:
    return [
        Case("text2img/bfloat16/guided", _bfloat16, quick=False),
    ]


def _bfloat16(_: Path) -> Any:
    pipe = inputs.pipeline("KandinskyV22CombinedPipeline", inputs.TINY, "bfloat16")
    return call(pipe, **GUIDED)
