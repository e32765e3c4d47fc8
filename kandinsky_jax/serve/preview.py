"""Small pictures of latents, shown while a picture forms: the map of `kandinsky_jax.checkpoint.preview_map`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from kandinsky_jax.checkpoint import preview_map as maps
from kandinsky_jax.models import VQModel


@dataclass(frozen=True)
class LatentPreview:
    """A function from latents to small pictures, on the host.

    Args:
        map: of the MoVQ whose latents they are.
    """

    map: maps.PreviewMap

    def __call__(self, latents: np.ndarray) -> list[Image.Image]:
        """Return a picture of each latent, RGB, with `preview_map.SIDE` (2) pixels for each latent along a side.

        Args:
            latents: `[h, w, C]` or `[B, h, w, C]`, of any float dtype; best those that are predicted for the end, since
                those of early steps are mostly noise. Numbers that are not finite are shown black or white.
        """
        latents = np.asarray(latents, np.float32)
        latents = latents[None] if latents.ndim == 3 else latents
        if latents.ndim != 4 or latents.shape[-1] != self.map.channels:
            raise ValueError(
                f"latents have shape {latents.shape}, needed is [h, w, C] or [B, h, w, C] with C = {self.map.channels}"
            )
        pixels = self.map(np.nan_to_num(latents.clip(-1e4, 1e4)))
        levels = (pixels * 127.5 + 127.5).clip(0, 255).round().astype(np.uint8)
        return [Image.fromarray(each) for each in levels]


def preview_map(movq: VQModel) -> LatentPreview:
    """Return the previews of a MoVQ, fitted to it once where they are not kept with the model.

    The fit takes seconds for small networks, and minutes for the official MoVQ on a CPU; `tiny` has its map.

    Raises:
        CheckpointError: where MoVQ gives numbers that are not finite.
    """
    return LatentPreview(maps.of(movq))
