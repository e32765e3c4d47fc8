"""The tabs that change a picture: image to image, and variations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kandinsky_jax.serve.page.tabs.base import PageTab, strength_slider
from kandinsky_jax.serve.page.widgets import picture_input
from kandinsky_jax.serve.requests import VARY


class ImageToImageTab(PageTab):
    """Pictures that start from a picture."""

    name, title, mode, modes, source = "img2img", "Image to image", "img2img", ("img2img",), "image"

    def build(self) -> None:
        self.inputs["image"] = picture_input("Source picture", "img2img-image")
        self.inputs["strength"] = strength_slider("Strength", "How much changes: 0 nothing, 1 everything.")

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": self.needed(values, "image", "the source picture"), "strength": values["strength"]}


class VariationsTab(PageTab):
    """Pictures with the content of a picture."""

    name, title, mode, modes, source = VARY, "Variations", VARY, (VARY,), "image"

    def build(self) -> None:
        self.inputs["image"] = picture_input("Picture to vary", "vary-image")
        self.inputs["strength"] = strength_slider(
            "Strength", "How far its content moves to the prompt, which may be empty."
        )

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": self.needed(values, "image", "the picture to vary"), "strength": values["strength"]}
