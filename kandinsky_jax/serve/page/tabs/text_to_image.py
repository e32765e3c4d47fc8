"""The tab of text to image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kandinsky_jax.serve.page.tabs.base import PageTab


class TextToImageTab(PageTab):
    """Pictures from a prompt."""

    name, title, mode, modes = "generate", "Text to image", "generate", ("generate",)

    def build(self) -> None:
        """Create nothing: the prompt is above the tabs."""

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {}
