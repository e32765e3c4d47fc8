"""What clients ask the server for: one typed request for the HTTP API and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

# Modes that a prior adds to those of the decoders: the embedding comes from a mix, or from a picture and a prompt.
MIX, VARY = "mix", "vary"


class RequestError(ValueError):
    """A request that cannot be served; the message says why.

    Args:
        message: what was given and what is needed.
        param: the field that is wrong, None for the whole request.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """A request for pictures; None and empty fields are filled in by `ServedModel.complete`.

    Args:
        mode: a name of `kandinsky_jax.pipelines.modes.MODES`, or "mix" or "vary".
        prompt: what to generate; of no use to "mix".
        negative_prompt: what to avoid.
        image, mask_image, hint: pictures of the modes that take them; the mask is white where the picture is repainted.
            Those of the decoders' modes; "vary" takes `image` too.
        items, weights: prompts and pictures of "mix", and a number for each.
        strength: of the modes that start from a picture, above 0, at most 1.
        height, width: pixels, multiples of 64.
        num_images: pictures of the request; image i draws from `fold_in(key(seed), i)`.
        seed: 0 .. 2**63 - 1.
        num_inference_steps, guidance_scale: of the decoder.
        prior_num_inference_steps, prior_guidance_scale: of the prior.
        scheduler: a short name of the decoder's, see `kandinsky_jax.scheduler_named`.
        loras: weights of LoRA files of the server's folder, by name.
        fast: use the model's fast adapter and the settings that it was made for.
        torch_noise: PyTorch's noise, for the picture that diffusers generates with this seed; one picture at a time.
        paste_back: put the picture's own pixels back outside the mask.
    """

    mode: str = "generate"
    prompt: str = ""
    negative_prompt: str | None = None
    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    hint: Image.Image | None = None
    items: tuple[str | Image.Image, ...] = ()
    weights: tuple[float, ...] = ()
    strength: float | None = None
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    prior_num_inference_steps: int | None = None
    prior_guidance_scale: float | None = None
    scheduler: str | None = None
    loras: Mapping[str, float] = field(default_factory=dict)
    fast: bool = False
    torch_noise: bool = False
    paste_back: bool = False

    def record(self, model: str, image: int) -> dict[str, Any]:
        """Return the settings that reproduce a picture, as they are written into it; pictures are left out.

        Args:
            model: the model's name.
            image: number of the picture in the request.
        """
        facts = {
            name: value
            for spec in dataclasses.fields(self)
            if not isinstance(value := getattr(self, name := spec.name), Image.Image) and value is not None
        }
        facts["items"] = [item if isinstance(item, str) else "(picture)" for item in self.items]
        facts["weights"], facts["loras"] = list(self.weights), dict(self.loras)
        unused = {"items": not self.items, "weights": not self.items, "loras": not self.loras}
        facts = {name: value for name, value in facts.items() if not unused.get(name)}
        return facts | {"model": model, "image": image}
