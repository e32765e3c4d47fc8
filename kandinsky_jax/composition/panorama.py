"""MultiDiffusion: pictures larger than the UNet's, from windows that overlap, and pictures with a prompt per region."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.types import Array, Float, PyTree
from kandinsky_jax.diffusion import Model, model_precision
from kandinsky_jax.models.unet import UNetCondition


def window_starts(length: int, window: int, stride: int, wrap: bool = False) -> list[int]:
    """Place windows along one side of a canvas.

    Source: `StableDiffusionPanoramaPipeline.get_views` of diffusers, and the same where the stride divides what there
    is to divide; elsewhere a last window ends at the border, so that nothing stays uncovered.

    Args:
        length: of the side, in latents.
        window: of a window; a longer one than the side is as long as the side, and then there is only one.
        stride: from window to window, 1 to `window`.
        wrap: whether windows go on at the other end.
    Returns:
        the first latent of each window.
    """
    if length <= window:
        return [0]
    if wrap:
        return list(range(0, length, stride))
    starts = list(range(0, length - window + 1, stride))
    return starts if starts[-1] == length - window else [*starts, length - window]


def stack_conditions(conditions: Sequence[PyTree]) -> PyTree:
    """Join the conditions of regions, each a pytree of arrays `[B, ...]`, to one of arrays `[B, regions, ...]`."""
    if len({jax.tree.structure(condition) for condition in conditions}) != 1:
        raise ValueError("the conditions of regions differ in structure; make them by the same arguments")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *conditions)


class _Windows(NamedTuple):
    """Evaluations of one step: windows, or windows of regions. The last ones may be there to fill a batch."""

    rows: np.ndarray  # int [P, h], latents of the canvas
    columns: np.ndarray  # int [P, w]
    region: np.ndarray  # int [P]
    weight: np.ndarray  # float64 [P, h, w]; those of all windows over a latent of the canvas sum to 1


class Panorama:
    """A model of large canvases: evaluates another model in windows that overlap, and averages what it predicts.

    It goes wherever a model does: `diffusion.sample(Panorama(unet, 64, 16), noise, cond, uncond, schedule)`, with any
    guider and schedule, and a noise of any size.

    Source: Bar-Tal et al. 2023, MultiDiffusion (arXiv 2302.08113), equation 5; with regions, its section 4.2 without
    the bootstrapping of tight masks. The paper averages the windows' next samples, this class their predictions. The
    next sample is the same, as far as a step is the same linear function of sample and output in all windows: for
    every solver of this package, with `NoGuidance` or `ClassifierFreeGuidance`, and where the noise of a stochastic
    solver is the canvas's. It is not where x0 is clipped or thresholded, where the variance is learned, and with a
    guider that is not linear (one that rescales to the canvas's deviation, not to each window's): these see the
    average, as if one large network had predicted it.

    Args:
        model: `model(sample [N, h, w, C], timestep [N], condition) -> [N, h, w, D]`, such as a UNet.
        window: latents along a side of a window, or (height, width); those that the model was trained for.
        stride: from window to window, at most the window; smaller ones join better and cost more.
        wrap: go on at the right with what is on the left, for pictures of 360 degrees; see `decode_wrapped`.
        weights: of a window's latents, above 0, `[h, w]`; None weighs all alike, as the paper.
        regions: `[R, H, W]`, weights of at least 0 of each condition in the latents of the canvas, such as masks. The
            conditions are then of `stack_conditions`, uncond as well. Windows in which a region is 0 are left out.
        windows_at_once: how many are evaluated in one call of the model, for less memory; None is all of them.

    A hint or a picture to inpaint is given for the whole canvas and cut into the same windows.
    """

    def __init__(
        self,
        model: Model,
        window: int | tuple[int, int],
        stride: int,
        *,
        wrap: bool = False,
        weights: ArrayLike | None = None,
        regions: ArrayLike | None = None,
        windows_at_once: int | None = None,
    ):
        self.model, self.stride, self.wrap, self.windows_at_once = model, stride, wrap, windows_at_once
        self.window = (window, window) if isinstance(window, int) else tuple(window)
        for name, value, most in (
            ("window", min(self.window), None),
            ("stride", stride, min(self.window)),
            ("windows_at_once", 1 if windows_at_once is None else windows_at_once, None),
        ):
            if not isinstance(value, int) or value < 1 or value > (most or value):
                raise ValueError(
                    f"{name} must be an integer from 1 {f'to {most}' if most else 'on'}, got {quote(value)}"
                )
        self.weights = np.ones(self.window) if weights is None else np.asarray(weights, np.float64)
        if self.weights.shape != self.window or not (self.weights > 0).all():
            raise ValueError(f"weights must be numbers above 0 of shape {list(self.window)}, see window")
        self.regions = None if regions is None else np.asarray(regions, np.float64)
        if self.regions is not None and (self.regions.ndim != 3 or not (self.regions >= 0).all()):
            raise ValueError(
                f"regions must be numbers of at least 0, [R, H, W]; the shape is {list(self.regions.shape)}"
            )

    def __call__(
        self, sample: Float[Array, "N H W C"], timestep: jax.Array, condition: PyTree, **options: object
    ) -> Float[Array, "N H W D"]:
        """Evaluate the model in all windows, and average.

        Args:
            sample, timestep: as the model takes them, for the canvas.
            condition: as the model takes it, the same in all windows; or of `stack_conditions`.
            options: the model's, such as `attention`; a feature cache is of one size, and none is taken.
        """
        if "cache" in options:
            raise ValueError("a panorama takes no feature cache, which is of one window's size")
        windows, used = self._windows(*sample.shape[1:3])
        if self.regions is None and used == 1:
            with model_precision(self.model):
                return self.model(sample, timestep, condition, **options)
        if self.regions is None:
            condition = stack_conditions([condition])
        elif {jnp.shape(leaf)[1:2] for leaf in jax.tree.leaves(condition)} != {(len(self.regions),)}:
            raise ValueError(
                f"there are {len(self.regions)} regions; needed is a condition for each, of stack_conditions, for cond "
                "and uncond"
            )
        evaluate = functools.partial(self._evaluate, sample, timestep, condition, options)
        groups = jax.tree.map(jnp.asarray, (windows.rows, windows.columns, windows.region))
        if len(windows.rows) == 1:
            outputs = evaluate(tuple(x[0] for x in groups))
        else:
            outputs = jnp.moveaxis(jax.lax.map(evaluate, groups), 0, 1)  # [N, groups, windows, h, w, D]
            outputs = outputs.reshape(len(sample), -1, *outputs.shape[3:])[:, :used]
        rows, columns, _, weight = (x.reshape(-1, *x.shape[2:])[:used] for x in windows)
        outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
        weighted = outputs * jnp.asarray(weight[..., None], outputs.dtype)
        canvas = jnp.zeros((*sample.shape[:3], outputs.shape[-1]), outputs.dtype)
        return canvas.at[:, rows[:, :, None], columns[:, None, :]].add(weighted)

    def _evaluate(
        self,
        sample: jax.Array,
        timestep: jax.Array,
        condition: PyTree,
        options: dict[str, object],
        places: tuple[jax.Array, jax.Array, jax.Array],
    ) -> jax.Array:
        """Evaluate the model in some windows `[V]`; return `[N, V, h, w, D]`."""
        rows, columns, region = places
        images, windows = len(sample), len(rows)
        channels = condition.channels if isinstance(condition, UNetCondition) else None
        if channels is not None:  # of the canvas, [N, regions, H, W, c]
            channels = channels[:, region[:, None, None], rows[:, :, None], columns[:, None, :]]
            condition = condition._replace(channels=None)
        chosen = jax.tree.map(lambda leaf: leaf[:, region].reshape(images * windows, *leaf.shape[2:]), condition)
        if channels is not None:
            chosen = chosen._replace(channels=channels.reshape(images * windows, *channels.shape[2:]))
        crops = sample[:, rows[:, :, None], columns[:, None, :]]  # [N, V, h, w, C]
        with model_precision(self.model):
            output = self.model(
                crops.reshape(images * windows, *crops.shape[2:]), jnp.repeat(timestep, windows), chosen, **options
            )
        return output.reshape(images, windows, *output.shape[1:])

    def _windows(self, height: int, width: int) -> tuple[_Windows, int]:
        """Return the windows of a canvas in groups, arrays `[groups, windows_at_once, ...]`, and their number."""
        h, w = min(self.window[0], height), min(self.window[1], width)
        regions = np.ones((1, height, width)) if self.regions is None else self.regions
        if regions.shape[1:] != (height, width):
            raise ValueError(
                f"regions are of {regions.shape[1]} x {regions.shape[2]} latents, the sample has {height} x {width}"
            )
        found: list[tuple[np.ndarray, np.ndarray, int, np.ndarray]] = []
        for top in window_starts(height, h, self.stride):
            for left in window_starts(width, w, self.stride, self.wrap):
                rows, columns = top + np.arange(h), (left + np.arange(w)) % width
                shares = regions[:, rows[:, None], columns]
                for region in np.flatnonzero(shares.any(axis=(1, 2))):
                    found.append((rows, columns, int(region), shares[region] * self.weights[:h, :w]))
        windows = _Windows(*(np.stack(column) for column in zip(*found, strict=True)))
        places = windows.rows[:, :, None], windows.columns[:, None, :]
        total = np.zeros((height, width))
        np.add.at(total, places, windows.weight)
        if not total.all():
            raise ValueError(
                f"regions are all 0 in {np.sum(total == 0)} of {total.size} latents; let them cover the canvas"
            )
        windows = windows._replace(weight=windows.weight / total[places])
        size = min(self.windows_at_once or len(found), len(found))
        groups = -(-len(found) // size)
        filled = np.minimum(np.arange(groups * size), len(found) - 1).reshape(groups, size)
        return _Windows(*(array[filled] for array in windows)), len(found)


def decode_wrapped(
    decode: Callable[[jax.Array], jax.Array], latents: Float[Array, "B h w C"], padding: int = 8
) -> Float[Array, "B H W 3"]:
    """Decode a canvas that goes on at the right with what is on the left, without a seam.

    Source: `decode_latents_with_padding` of diffusers' StableDiffusionPanoramaPipeline.

    Args:
        decode: latents to pictures, such as `movq.decode`.
        latents: `[B, h, w, C]`.
        padding: latents that are appended on either side from the other one and cut off again, at most w.
    Returns:
        pictures `[B, H, W, 3]`.
    """
    width = latents.shape[2]
    if isinstance(padding, bool) or not isinstance(padding, int) or not 1 <= padding <= width:
        raise ValueError(f"padding must be an integer from 1 to the latents' width {width}, got {quote(padding)}")
    pictures = decode(jnp.concatenate([latents[:, :, -padding:], latents, latents[:, :, :padding]], axis=2))
    factor = pictures.shape[2] // (width + 2 * padding)
    return pictures[:, :, padding * factor : -padding * factor]
