"""The tab of outpainting: a picture is extended beyond its borders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from kandinsky_jax.composition import outpaint_canvas, paste_original
from kandinsky_jax.serve.page.context import Job
from kandinsky_jax.serve.page.tabs.base import PageTab
from kandinsky_jax.serve.page.widgets import picture_input
from kandinsky_jax.serve.requests import ImageRequest, RequestError
from kandinsky_jax.serve.server_settings import Size

SIDES = ("left", "right", "top", "bottom")
MULTIPLE = 64
FEATHER = 16  # pixels over which the picture's own pixels fade into the new part
FILLS = [("the border's colours", "edge"), ("the picture mirrored", "reflect"), ("noise", "noise")]


class Layout(NamedTuple):
    """Where a picture lies on its canvas.

    Args:
        width, height: of the picture on the canvas.
        margins: pixels that are added, by side.
    """

    width: int
    height: int
    margins: dict[str, int]


class OutpaintingTab(PageTab):
    """Extends a picture beyond its borders."""

    name, title, mode, source = "outpaint", "Outpainting", "inpaint", "image"

    def build(self) -> None:
        self.inputs["image"] = picture_input("Picture to extend", "outpaint-image")
        with gr.Row():
            for side in SIDES:
                self.inputs[side] = gr.Slider(
                    0,
                    100,
                    value=25 if side in ("left", "right") else 0,
                    step=5,
                    label=f"{side.capitalize()}, %",
                    min_width=190,
                )
        self.inputs["fill"] = gr.Dropdown(FILLS, value="edge", label="Start the new part from")
        self.inputs["paste_back"] = gr.Checkbox(
            True, label="Keep the picture exactly", info="Faded at its new borders."
        )

    def job(self, values: Mapping[str, Any], shared: Mapping[str, Any]) -> Job:
        picture = self.needed(values, "image", "the picture to extend")
        shares = {side: float(values[side] or 0) / 100 for side in SIDES}
        if not any(shares.values()):
            raise RequestError("all sides are 0 %; give at least one a share of the picture to add", "image")
        if values["fill"] not in (fills := [value for _, value in FILLS]):
            raise RequestError(f"the new part has no start; there are {', '.join(fills)}", "image")
        size = self._canvas_size(picture, shares, shared)
        self._check(picture, size, shared)
        layout = lay_out(picture.size, shares, size)
        scaled = picture.convert("RGB").resize((layout.width, layout.height), Image.Resampling.LANCZOS)
        canvas = outpaint_canvas(scaled, **layout.margins, fill=values["fill"], seed=0)
        request = ImageRequest(
            **{
                **shared,
                "mode": self.mode,
                "image": canvas.image,
                "mask_image": canvas.mask_image,
                "height": size[0],
                "width": size[1],
            }
        )
        note = f"The picture was scaled from {picture.width} x {picture.height} to {layout.width} x {layout.height} "
        note = note + f"pixels, to fit a canvas of {size[1]} x {size[0]}." if scaled.size != picture.size else ""
        if not values["paste_back"]:
            return Job(request, note=note)
        return Job(request, lambda generated: paste_original(generated, scaled, canvas.box, FEATHER), note)

    def _check(self, picture: Image.Image, size: Size, shared: Mapping[str, Any]) -> None:
        """Raise RequestError for a request that is not served, before its canvas is made: a client chooses its size."""
        pictures = {"image": picture, "mask_image": Image.new("L", picture.size)}
        request = ImageRequest(**{**shared, **pictures, "mode": self.mode, "height": size[0], "width": size[1]})
        self.context.model.complete(request, self.context.settings)

    def _canvas_size(self, picture: Image.Image, shares: Mapping[str, float], shared: Mapping[str, Any]) -> Size:
        """Return the height and width of the canvas: those that were chosen, else the served ones that fit best."""
        if shared.get("height") and shared.get("width"):
            return shared["height"], shared["width"]
        width = picture.width * (1 + shares["left"] + shares["right"])
        height = picture.height * (1 + shares["top"] + shares["bottom"])
        sizes = self.context.model.sizes(self.mode, self.context.settings)
        native = self.context.model.native_size(self.mode)
        return fitting_canvas(width, height, sizes, native[0] * native[1])


def fitting_canvas(width: float, height: float, sizes: Sequence[Size] | None, pixels: int) -> Size:
    """Return the height and width of a canvas.

    Args:
        width, height: of the picture and what is added.
        sizes: that are served, None for all multiples of 64.
        pixels: of the canvas where all are served.
    """
    if sizes is not None:
        return min(
            sizes, key=lambda size: (max(size[0] / size[1] * width / height, height / width * size[1] / size[0]), size)
        )
    scale = (pixels / (width * height)) ** 0.5
    rounded = [max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in (height, width)]
    return rounded[0], rounded[1]


def lay_out(picture: tuple[int, int], shares: Mapping[str, float], size: Size) -> Layout:
    """Place a picture on a canvas, as large as the canvas allows.

    Args:
        picture: its width and height.
        shares: of the picture's own side that are added, by side; what is left of the canvas is added to them, and
            to both sides where neither of two has a share.
        size: height and width of the canvas.
    """
    scale = min(
        size[1] / (picture[0] * (1 + shares["left"] + shares["right"])),
        size[0] / (picture[1] * (1 + shares["top"] + shares["bottom"])),
    )
    width, height = (
        max(1, min(most, round(side * scale))) for side, most in zip(picture, (size[1], size[0]), strict=True)
    )
    margins: dict[str, int] = {}
    for first, second, left_over in (("left", "right", size[1] - width), ("top", "bottom", size[0] - height)):
        total = shares[first] + shares[second]
        part = shares[first] / total if total else 0.5
        margins[first] = round(left_over * part)
        margins[second] = left_over - margins[first]
    return Layout(width, height, margins)
