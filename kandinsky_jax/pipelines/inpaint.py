"""Picture and mask -> latents; every step sees the kept part, which is put back after it -> picture.

Reference: diffusers' KandinskyV22InpaintPipeline and KandinskyV22InpaintCombinedPipeline.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion.inpainting import Blend, latent_repaint_mask
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.combined import CombinedPipeline
from kandinsky_jax.pipelines.decoder import DecoderInputs, DecoderPipeline, DecoderRequest
from kandinsky_jax.pipelines.options import (
    CombinedExtensionOptions,
    CombinedNoiseOptions,
    CombinedOutputOptions,
    CombinedStepOptions,
    DecoderNoiseOptions,
    DecoderOutputOptions,
    DecoderStepOptions,
    ExtensionOptions,
    ImageEmbedsOption,
    ImageOption,
    MaskImageOption,
    NegativeImageEmbedsOption,
    OldCallbackOption,
    PasteBackOption,
    PromptOption,
    takes,
)
from kandinsky_jax.pipelines.outputs import ImageResult
from kandinsky_jax.schedulers import MAX_STEPS


@dataclass(frozen=True, kw_only=True)
class InpaintInputs(DecoderInputs):
    """Inputs of an inpainting loop: the picture's latents, and which of them are kept."""

    blend: Blend
    kept: np.ndarray  # further channels of the UNet's input: latents of the kept part, keep mask; [B, h, w, 5]
    kept_uncond: np.ndarray  # likewise for the unconditional evaluation, which a callback may change by itself

    def condition_arguments(self) -> dict[str, jax.Array]:
        return super().condition_arguments() | {"channels": jnp.asarray(self.kept)}

    def uncond_arguments(self) -> dict[str, jax.Array]:
        return super().uncond_arguments() | {"channels": jnp.asarray(self.kept_uncond)}

    def current_blend(self) -> Blend:
        return self.blend

    def callback_tensors(self, guided: bool) -> dict[str, PyTree]:
        both = np.concatenate([self.kept_uncond, self.kept]) if guided else self.kept
        both = both.transpose(0, 3, 1, 2)  # [2B, 5, h, w]
        return super().callback_tensors(guided) | {"masked_image": both[:, :-1], "mask_image": both[:, -1:]}

    def with_callback_tensors(self, changed: Mapping[str, PyTree], both: bool) -> Self:
        new, kept, kept_uncond = super().with_callback_tensors(changed, both), self.kept, self.kept_uncond
        for name, channels in (("masked_image", slice(0, -1)), ("mask_image", slice(-1, None))):
            if name in changed:
                cond, uncond = checks.callback_halves(changed[name], name, len(self.start))
                kept = _with_channels(kept, channels, cond)
                kept_uncond = _with_channels(kept_uncond, channels, cond if uncond is None else uncond)
        blend = self.blend._replace(keep=jnp.asarray(kept_uncond[..., -1:]))
        return dataclasses.replace(new, blend=blend, kept=kept, kept_uncond=kept_uncond)

    def finish(self, sample: jax.Array) -> jax.Array:
        # The last step did this, but a callback may have changed the sample since.
        return _put_back(self.blend, np.int32(MAX_STEPS - 1), sample)


def _with_channels(array: np.ndarray, channels: slice, values: np.ndarray) -> np.ndarray:
    """Return an array `[B, h, w, C]` with some channels replaced by values `[B, c, h, w]`."""
    array = array.copy()
    array[..., channels] = values.astype(np.float32).transpose(0, 2, 3, 1)
    return array


@jax.jit
def _put_back(blend: Blend, row: jax.Array, sample: jax.Array) -> jax.Array:
    return blend(row, sample)


@dataclass(frozen=True)
class InpaintOptions(
    OldCallbackOption,
    ExtensionOptions,
    PasteBackOption,
    DecoderOutputOptions,
    DecoderNoiseOptions,
    DecoderStepOptions,
    NegativeImageEmbedsOption,
    MaskImageOption,
    ImageOption,
    ImageEmbedsOption,
):
    """Options of `KandinskyV22InpaintPipeline`, from the last to the first."""


class KandinskyV22InpaintPipeline(DecoderPipeline):
    """Inpaints pictures, guided by image embeddings.

    Args:
        unet, scheduler, movq: as in diffusers.
    """

    REPOSITORY: ClassVar[str] = hub.INPAINT
    _callback_tensor_inputs = (*DecoderPipeline._callback_tensor_inputs, "masked_image", "mask_image")

    @takes(InpaintOptions)
    def __call__(self, options: InpaintOptions) -> ImageResult:
        """Repaint the masked part of pictures.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._call(options)

    def _inputs(
        self, request: DecoderRequest, noise: jax.Array, cond: np.ndarray, uncond: np.ndarray | None
    ) -> InpaintInputs:
        assert request.image is not None
        assert request.repaint_mask is not None
        repaint_mask = latent_repaint_mask(request.repaint_mask, request.h, request.w)
        for i in np.flatnonzero(~repaint_mask.any(axis=(1, 2)) & request.repaint_mask.any(axis=(1, 2))):
            warnings.warn(
                f"mask_image of image {i} repaints nothing: its white parts are smaller than a latent, which has "
                f"{self.movq.config.scale_factor} x {self.movq.config.scale_factor} pixels; widen them",
                stacklevel=2,
            )
        picture, keep = self._encode(request.image), (~repaint_mask).astype(np.float32)[..., None]
        blend = Blend(picture, noise, jnp.asarray(keep), jnp.asarray(self._levels(request)))
        kept = np.concatenate([np.asarray(picture) * keep, keep], axis=-1)
        start = noise * request.schedule.init_noise_sigma
        return InpaintInputs(start=start, cond=cond, uncond=uncond, blend=blend, kept=kept, kept_uncond=kept)

    def _levels(self, request: DecoderRequest) -> np.ndarray:
        """Return the kept part's signal and noise after each step: as the next step has them, clean after the last."""
        levels = np.tile(np.array([1, 0], np.float32), (MAX_STEPS, 1))
        later = request.schedule.levels[1:]
        levels[: len(later)] = later
        return levels


@dataclass(frozen=True)
class InpaintCombinedOptions(
    OldCallbackOption,
    CombinedExtensionOptions,
    PasteBackOption,
    CombinedOutputOptions,
    CombinedNoiseOptions,
    CombinedStepOptions,
    MaskImageOption,
    ImageOption,
    PromptOption,
):
    """Options of `KandinskyV22InpaintCombinedPipeline`, from the last to the first."""


class KandinskyV22InpaintCombinedPipeline(CombinedPipeline):
    """Inpaints pictures, guided by prompts. Components: see `CombinedPipeline`."""

    REPOSITORY: ClassVar[str] = hub.INPAINT
    DECODER: ClassVar[type[DecoderPipeline]] = KandinskyV22InpaintPipeline
    OPTIONS = InpaintCombinedOptions

    @takes(InpaintCombinedOptions)
    def __call__(self, options: InpaintCombinedOptions) -> ImageResult:
        """Repaint the masked part of pictures.

        Raises:
            ValueError, TypeError: for wrong arguments, before anything is compiled.
        """
        return self._start(options).result()
