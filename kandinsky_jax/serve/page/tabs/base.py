"""What a tab of the page is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gradio as gr
from gradio.components import Component
from PIL import Image

from kandinsky_jax.serve.page.context import Job, PageContext
from kandinsky_jax.serve.page.widgets import ChosenPicture, decode
from kandinsky_jax.serve.requests import ImageRequest, RequestError
from kandinsky_jax.serve.served_model import DEFAULT_STRENGTH


class PageTab:
    """A way to generate pictures, with its inputs.

    Args:
        context: of the page.
    """

    name: ClassVar[str]  # in element ids
    title: ClassVar[str]
    mode: ClassVar[str]  # needed of the model, and that of the settings that are shown as recommended
    modes: ClassVar[tuple[str, ...]] = ()  # whose pictures restore into this tab
    uses_prompt: ClassVar[bool] = True
    source: ClassVar[str | None] = None  # the input of a picture that the gallery can fill

    def __init__(self, context: PageContext):
        self.context = context
        self.inputs: dict[str, Component] = {}
        self.source_area: gr.Accordion | None = None  # opened where `source` is filled

    def build(self) -> None:
        """Create the inputs, `self.inputs`, within the tab."""
        raise NotImplementedError

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the request that this tab's inputs give.

        Args:
            values: of the inputs, by their names.
        """
        raise NotImplementedError

    def job(self, values: Mapping[str, Any], shared: Mapping[str, Any]) -> Job:
        """Return the job of a click on "Generate".

        Args:
            values: of the inputs, by their names.
            shared: fields of the request that the shared settings give.
        """
        return Job(ImageRequest(**{"mode": self.mode, **shared, **self.fields(values)}))

    def restored(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return values of the inputs that a picture's settings give, by their names."""
        return {name: record[name] for name in ("strength", "paste_back") if name in record and name in self.inputs}

    # For the tabs' own use ----------------------------------------------------------------------------------------

    def chosen(self, values: Mapping[str, Any], name: str, label: str) -> ChosenPicture | None:
        """Return what a picture input holds."""
        return decode(values.get(name), label, self.context.most_pixels)

    def needed(self, values: Mapping[str, Any], name: str, label: str) -> Image.Image:
        """Return the picture of an input.

        Raises:
            RequestError: where there is none.
        """
        chosen = self.chosen(values, name, label)
        if chosen is None:
            raise RequestError(f"{label} is missing: choose a picture", "image")
        return chosen.picture


def strength_slider(label: str, info: str) -> gr.Slider:
    """Return the slider of a strength."""
    return gr.Slider(0.05, 1.0, value=DEFAULT_STRENGTH, step=0.05, label=label, info=info)
