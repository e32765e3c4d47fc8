"""Inpainting and depth hints with the model of coloured shapes: combined pipelines and decoders."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digest_cases import Case, inputs
from digest_cases.modes import GUIDED, call, mode_cases

SHAPES = "shapes"
FEWER = [  # of the decoders alone, which run the same programs as the combined pipelines
    "guided/one image/seed 0",
    "guided/one image/torch seed 3",
    "guided/one image/latents out",
    "unguided/one image/seed 0",
]


def cases() -> list[Case]:
    """All cases of the module."""
    photo, mask = inputs.picture(), inputs.mask()
    inpaint = {"image": photo, "mask_image": mask}
    depth = {"hint": inputs.depth()}
    both = {"image": photo, "hint": inputs.depth(), "strength": 0.7}
    modes = functools.partial(mode_cases, model=SHAPES)
    return [
        *modes("inpaint", "KandinskyV22InpaintCombinedPipeline", inpaint),
        *modes("controlnet", "KandinskyV22ControlnetCombinedPipeline", depth),
        *modes("controlnet img2img", "KandinskyV22ControlnetImg2ImgCombinedPipeline", both),
        *modes("inpaint decoder", "KandinskyV22InpaintPipeline", inpaint, variants=FEWER),
        *modes("controlnet decoder", "KandinskyV22ControlnetPipeline", depth, variants=FEWER),
        *modes("controlnet img2img decoder", "KandinskyV22ControlnetImg2ImgPipeline", both, variants=FEWER),
        *_mask_cases(),
        *_hint_cases(),
        *_callback_cases(),
    ]


def _decoder(name: str, changes: dict[str, Any], _: Path) -> Any:
    return call(inputs.pipeline(name, SHAPES), **GUIDED | changes)


def _mask_cases() -> list[Case]:
    photo, mask = inputs.picture(2), inputs.mask()
    grey = Image.fromarray(np.uint8(mask) * 255)
    forms: dict[str, dict[str, Any]] = {
        "mask as a picture": {"mask_image": grey.resize((90, 70))},
        "mask of ones and zeros": {"mask_image": mask.astype(np.float32)},
        "mask of 0 to 255": {"mask_image": np.uint8(mask) * 255},
        "paste back": {"mask_image": mask, "paste_back": True},
        "pil": {"mask_image": mask, "output_type": "pil"},
    }
    found = []
    for form, changes in forms.items():
        run = functools.partial(_decoder, "KandinskyV22InpaintPipeline", {"image": photo} | changes)
        found.append(Case(f"inpaint decoder/{form}", run))
    return found


def _hint_cases() -> list[Case]:
    forms = {
        "hint ready": inputs.hint(),
        "hint as a picture": inputs.picture(3),
        "hint of 8 bits": np.uint8(inputs.depth() >> 8),
        "hint of floats": inputs.depth().astype(np.float32) / 1000,
    }
    found = []
    for form, hint in forms.items():
        changes = {"hint": hint, "output_type": "latent"}
        run = functools.partial(_decoder, "KandinskyV22ControlnetPipeline", changes)
        found.append(Case(f"controlnet decoder/{form}", run))
    return found


def _callback_cases() -> list[Case]:
    found = []
    for mode, name, changes in (
        ("inpaint", "KandinskyV22InpaintPipeline", {"image": inputs.picture(), "mask_image": inputs.mask()}),
        ("controlnet", "KandinskyV22ControlnetPipeline", {"hint": inputs.depth()}),
    ):
        run = functools.partial(_with_callback, name, changes)
        found.append(Case(f"{mode} decoder/callback sees every tensor", run))
        run = functools.partial(_decoder, name, changes | {"num_inference_steps": 6, "guidance_interval": (0.4, 1.0)})
        found.append(Case(f"{mode} decoder/guidance interval 0.4 to 1.0", run))
    return found


def _with_callback(name: str, changes: dict[str, Any], _: Path) -> Any:
    seen: list[Any] = []
    pipe = inputs.pipeline(name, SHAPES)
    names = pipe._callback_tensor_inputs  # as in diffusers

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append([step, float(timestep), {name: np.asarray(tensors[name]) for name in names}])
        return {}

    images = call(
        pipe,
        **GUIDED,
        **changes,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=list(names),
    )
    return {"images": images, "seen": seen}
