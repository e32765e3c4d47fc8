"""The tab that mixes prompts and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from kandinsky_jax.serve.page.tabs.base import PageTab
from kandinsky_jax.serve.page.widgets import picture_input
from kandinsky_jax.serve.requests import MIX, RequestError

ITEMS = 4
SIDE = 512  # pixels of a picture that is sent; CLIP sees fewer


class MixTab(PageTab):
    """Pictures between prompts and pictures."""

    name, title, mode, modes, uses_prompt = MIX, "Mix", MIX, (MIX,), False
    source = "picture_1"

    def build(self) -> None:
        gr.Markdown("Each item is a prompt or a picture, and counts as much as its weight.", elem_classes="kj-small")
        for number in range(1, ITEMS + 1):
            with gr.Accordion(f"Item {number}", open=number <= 2):
                self.inputs[f"text_{number}"] = gr.Textbox(label=f"Prompt {number}", lines=1, max_lines=3)
                self.inputs[f"picture_{number}"] = picture_input(
                    f"or picture {number}", f"mix-picture-{number}", side=SIDE
                )
                self.inputs[f"weight_{number}"] = gr.Slider(0, 1, value=0.5, step=0.05, label=f"Weight {number}")

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        items, weights = [], []
        for number in range(1, ITEMS + 1):
            text = (values[f"text_{number}"] or "").strip()
            chosen = self.chosen(values, f"picture_{number}", f"picture {number}")
            if text and chosen is not None:
                raise RequestError(f"item {number} has a prompt and a picture; use two items for them", "items")
            if text or chosen is not None:
                items.append(text if chosen is None else chosen.picture)
                weights.append(float(values[f"weight_{number}"]))
        if not items:
            raise RequestError("there are no items to mix; give prompts or pictures", "items")
        return {"items": tuple(items), "weights": tuple(weights), "prompt": ""}

    def restored(self, record: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, (item, weight) in enumerate(
            zip(record.get("items", ()), record.get("weights", ()), strict=False), 1
        ):
            if number <= ITEMS:
                found[f"text_{number}"] = item if isinstance(item, str) else ""
                found[f"picture_{number}"] = ""
                found[f"weight_{number}"] = min(1.0, max(0.0, weight))
        return found
