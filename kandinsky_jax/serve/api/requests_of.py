"""From the fields of the API to the service's requests: which mode is meant, and with which pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from kandinsky_jax.serve.api.errors import ApiError
from kandinsky_jax.serve.api.fields import (
    CommonFields,
    EditFields,
    GenerationFields,
    PictureItem,
    TextItem,
    VariationFields,
    size_of,
)
from kandinsky_jax.serve.api.pictures import PictureReader, has_holes, repaint_mask
from kandinsky_jax.serve.requests import MIX, VARY, ImageRequest


def of_generation(fields: GenerationFields, reader: PictureReader) -> ImageRequest:
    """Return the request of /v1/images/generations: text to image, with a depth map, or a mix."""
    if fields.items is not None:
        _refuse(fields.hint is not None, "hint", "is not used in a mix")
        _refuse(bool(fields.prompt), "prompt", "is not used where items are given; make it one of them")
        items = [_item(item, i, reader) for i, item in enumerate(fields.items)]
        return _mix(fields, items, fields.weights)
    _refuse(fields.weights is not None, "weights", "is used with items")
    if fields.hint is not None:
        hint = reader.decode_text(fields.hint, "hint")
        return ImageRequest(mode="controlnet", prompt=fields.prompt, hint=hint, **_common(fields))
    return ImageRequest(prompt=fields.prompt, **_common(fields))


def of_edit(fields: EditFields, reader: PictureReader) -> ImageRequest:
    """Return the request of /v1/images/edits: image to image, with a depth map, inpainting, or a mix."""
    if len(fields.image) > 1:
        for name in ("mask", "hint", "strength", "paste_back"):
            _refuse(getattr(fields, name) is not None, name, "is not used with several images, which are mixed")
        pictures = [reader.decode(data, f"image[{i}]") for i, data in enumerate(fields.image)]
        return _mix(fields, [*([fields.prompt] if fields.prompt.strip() else []), *pictures], fields.weights)
    _refuse(fields.weights is not None, "weights", "is used with several images")
    image = reader.decode(fields.image[0], "image")
    shared: dict[str, Any] = {"prompt": fields.prompt, "image": image, **_common(fields)}
    if fields.mask is None and (fields.hint is not None or not has_holes(image)):
        _refuse(fields.paste_back is not None, "paste_back", "is used with a mask")
        shared["strength"] = fields.strength
        if fields.hint is None:
            return ImageRequest(mode="img2img", **shared)
        return ImageRequest(mode="controlnet-img2img", hint=reader.decode(fields.hint, "hint"), **shared)
    _refuse(fields.hint is not None, "hint", "is not used with a mask")
    _refuse(
        fields.strength is not None, "strength", "is not used with a mask, or where the image has transparent parts"
    )
    mask = image if fields.mask is None else reader.decode(fields.mask, "mask")
    return ImageRequest(
        mode="inpaint", mask_image=repaint_mask(mask, image), paste_back=bool(fields.paste_back), **shared
    )


def of_variation(fields: VariationFields, reader: PictureReader) -> ImageRequest:
    """Return the request of /v1/images/variations."""
    image = reader.decode(fields.image, "image")
    return ImageRequest(mode=VARY, prompt=fields.prompt, image=image, strength=fields.strength, **_common(fields))


RequestOf = Callable[[Any, PictureReader], ImageRequest]


def _mix(fields: CommonFields, items: list[str | Image.Image], weights: list[float] | None) -> ImageRequest:
    if weights is None:
        weights = [1 / len(items)] * len(items)
    if len(weights) != len(items):
        raise ApiError(
            400,
            f"weights has {len(weights)} numbers for {len(items)} items; give one for each",
            "weights",
            "invalid_value",
        )
    return ImageRequest(mode=MIX, items=tuple(items), weights=tuple(weights), **_common(fields))


def _item(item: str | PictureItem | TextItem, number: int, reader: PictureReader) -> str | Image.Image:
    if isinstance(item, PictureItem):
        return reader.decode_text(item.image, f"items[{number}]")
    return item.text if isinstance(item, TextItem) else item


def _common(fields: CommonFields) -> dict[str, Any]:
    """Return the arguments of all modes."""
    height, width = size_of(fields.size)
    return {
        "negative_prompt": fields.negative_prompt,
        "height": height,
        "width": width,
        "num_images": 1 if fields.n is None else fields.n,
        "seed": fields.seed,
        "num_inference_steps": fields.steps,
        "guidance_scale": fields.guidance_scale,
        "prior_num_inference_steps": fields.prior_steps,
        "prior_guidance_scale": fields.prior_guidance_scale,
        "scheduler": fields.scheduler,
        "loras": fields.loras or {},
        "fast": bool(fields.fast),
        "torch_noise": bool(fields.torch_noise),
    }


def _refuse(there: bool, name: str, fault: str) -> None:
    if there:
        raise ApiError(400, f"{name} {fault}", name, "invalid_value")
