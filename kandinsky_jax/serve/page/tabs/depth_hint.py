"""The tab of the depth hint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from kandinsky_jax.serve.page.tabs.base import PageTab, strength_slider
from kandinsky_jax.serve.page.widgets import picture_input

FROM_PICTURE = "controlnet-img2img"


class DepthHintTab(PageTab):
    """Pictures that follow a depth map."""

    name, title, mode, modes = "depth", "Depth hint", "controlnet", ("controlnet", FROM_PICTURE)
    source = "image"

    def build(self) -> None:
        self.inputs["hint"] = picture_input("Depth map", "depth-hint")
        gr.Markdown("Light is near, dark is far.", elem_classes="kj-small")
        with gr.Accordion("Start from a picture", open=False) as self.source_area:
            self.inputs["image"] = picture_input("Source picture, if any", "depth-image")
            self.inputs["strength"] = strength_slider("Strength", "How much of the source picture changes.")

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        hint = {"hint": self.needed(values, "hint", "the depth map")}
        source = self.chosen(values, "image", "the source picture")
        if source is None:
            return hint
        return hint | {"mode": FROM_PICTURE, "image": source.picture, "strength": values["strength"]}
