"""The tabs of the page; one is shown where the model has its mode."""

from kandinsky_jax.serve.page.context import PageContext
from kandinsky_jax.serve.page.tabs.base import PageTab
from kandinsky_jax.serve.page.tabs.depth_hint import DepthHintTab
from kandinsky_jax.serve.page.tabs.image_to_image import ImageToImageTab, VariationsTab
from kandinsky_jax.serve.page.tabs.inpainting import InpaintingTab
from kandinsky_jax.serve.page.tabs.mix import MixTab
from kandinsky_jax.serve.page.tabs.outpainting import OutpaintingTab
from kandinsky_jax.serve.page.tabs.text_to_image import TextToImageTab

__all__ = ["TABS", "PageTab", "tabs_of"]

TABS: tuple[type[PageTab], ...] = (
    TextToImageTab,
    ImageToImageTab,
    InpaintingTab,
    OutpaintingTab,
    DepthHintTab,
    MixTab,
    VariationsTab,
)


def tabs_of(context: PageContext) -> list[PageTab]:
    """Return the tabs whose modes are served."""
    return [tab(context) for tab in TABS if tab.mode in context.model.modes]
