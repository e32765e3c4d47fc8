"""The tab of inpainting: a mask is painted on the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
import numpy as np

from kandinsky_jax.serve.page.tabs.base import PageTab
from kandinsky_jax.serve.page.widgets import picture_input
from kandinsky_jax.serve.requests import RequestError

LEAST = 128  # level from which a mask's pixel is repainted


class InpaintingTab(PageTab):
    """Repaints the painted part of a picture."""

    name, title, mode, modes, source = "inpaint", "Inpainting", "inpaint", ("inpaint",), "image"

    def build(self) -> None:
        self.inputs["image"] = picture_input("Paint on what is to change", "inpaint-image", paint=True)
        self.inputs["paste_back"] = gr.Checkbox(
            True, label="Keep the rest exactly", info="Puts the picture's own pixels back where nothing is painted."
        )

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        chosen = self.chosen(values, "image", "the picture")
        if chosen is None:
            raise RequestError("the picture is missing: choose one, and paint on what is to change", "image")
        if chosen.mask is None or int(np.asarray(chosen.mask).max()) < LEAST:
            raise RequestError("nothing is painted: paint on the part of the picture that is to change", "mask_image")
        return {"image": chosen.picture, "mask_image": chosen.mask, "paste_back": bool(values["paste_back"])}
