"""Checks of users' arguments, made before anything is compiled; messages say what was given and what is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kandinsky_jax.common.arrays import to_numpy
from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.pipelines.options import Callback

CALLBACK_DEFAULT = ("latents",)
LARGEST = 2**31 - 1  # count


def texts(value: object, name: str) -> list[str]:
    """Return a prompt argument as a list of strings."""
    if isinstance(value, str):
        return [_text(value, name)]
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a string or a list of strings, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} is an empty list; give one string or more")
    for i, item in enumerate(value):
        if not isinstance(item, str):
            raise TypeError(f"{name}[{i}] must be a string, got {type(item).__name__} ({quote(item)})")
    return [_text(item, f"{name}[{i}]") for i, item in enumerate(value)]


def _text(value: str, name: str) -> str:
    """Return a string; ValueError for one that UTF-8 cannot encode, such as half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not text: character {error.start} is {quote(value[error.start])}, half of a surrogate pair"
        ) from None
    return value


def negative_texts(value: object, prompts: Sequence[str]) -> list[str] | None:
    """Return negative prompts, one per prompt; a single string is used for all."""
    if value is None:
        return None
    negatives = texts(value, "negative_prompt")
    if isinstance(value, str):
        return negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(
            f"negative_prompt has {len(negatives)} items for {len(prompts)} prompts; give one for each, or one string"
        )
    return negatives


def count(value: object, name: str, least: int = 1) -> int:
    """Check a count, an integer of at least `least`."""
    if isinstance(value, int) and value > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, got {quote(value)}")
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {quote(value)}")
    return int(value)


def side(value: object, name: str) -> int:
    """Check a picture's height or width in pixels."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer number of pixels, got {quote(value)}")
    if value < 64:
        raise ValueError(f"{name}={quote(value)} is too small; the smallest picture is 64 pixels")
    if value > LARGEST:
        raise ValueError(f"{name}={quote(value)} is too large; needed are at most {LARGEST} pixels")
    return int(value)


def guidance(value: object, name: str = "guidance_scale") -> float:
    """Check a guidance scale, a number or an array without axes; at 1 and below, guidance is off."""
    if hasattr(value, "__array__") and getattr(value, "ndim", 1) == 0:
        value = to_numpy(value, name).item()
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not _is_finite(value)
    ):
        raise ValueError(f"{name} must be a finite number, got {quote(value)}")
    return float(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (OverflowError, TypeError):  # an integer beyond float's range; a complex number
        return False


def interval(value: object, steps: int, name: str = "guidance_interval") -> tuple[int, int] | None:
    """Convert fractions of the steps, such as (0.4, 1), to the first step inside and the first one after."""
    if value is None:
        return None
    ends = tuple(value) if isinstance(value, list | tuple | np.ndarray) else ()
    numbers = [x for x in ends if isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)]
    if len(ends) != 2 or len(numbers) != 2 or not 0 <= ends[0] < ends[1] <= 1:
        raise ValueError(f"{name} must be two rising numbers from 0 to 1, such as (0.4, 1), got {quote(value)}")
    first, last = round(float(ends[0]) * steps), round(float(ends[1]) * steps)
    if first == last:
        raise ValueError(
            f"{name}={quote(value)} holds none of {steps} steps; give a wider one, or a guidance_scale of 1"
        )
    return first, last


def strength(value: object, steps: int) -> int:
    """Return how many of a schedule's last steps are run at a strength: `int(steps * strength)`."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating) or not 0 < value <= 1:
        raise ValueError(f"strength must be a number above 0 and at most 1, got {quote(value)}")
    done = int(steps * value)
    if done < 1:
        raise ValueError(
            f"strength={value} of num_inference_steps={steps} leaves no step to do; needed is a product of at least 1"
        )
    return done


def skipped(value: object, steps: int) -> int:
    """Return how many of a schedule's first steps a strength skips; None skips none."""
    return 0 if value is None else steps - strength(value, steps)


def choice(value: object, name: str, allowed: Sequence[str]) -> str:
    """Check that a value is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{name}={quote(value)} is not supported, only {', '.join(map(repr, allowed))}")
    return str(value)


def callback(function: object, inputs: object, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the tensors that a callback asks for."""
    if function is not None and not callable(function):
        raise TypeError(f"callback_on_step_end must be callable, got {type(function).__name__}")
    if not (inputs is None or isinstance(inputs, list | tuple)):
        raise TypeError(f"callback_on_step_end_tensor_inputs must be a list of names, got {quote(inputs)}")
    names = CALLBACK_DEFAULT if inputs is None else tuple(inputs)
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {quote(unknown)}; there are {list(allowed)}")
    return names


def old_callback(function: object, every: object, other: Callback | None) -> Callback | None:
    """Wrap diffusers' older `callback(step, timestep, latents)` as a `callback_on_step_end`.

    Args:
        every: `callback_steps`.
        other: `callback_on_step_end`, which is returned where `function` is None.
    """
    if function is None:
        return other
    if other is not None:
        raise ValueError("give callback or callback_on_step_end, not both")
    if not callable(function):
        raise TypeError(f"callback must be callable, got {type(function).__name__}")
    every = count(every, "callback_steps")

    def on_step_end(pipe: object, step: int, timestep: int, tensors: dict[str, PyTree]) -> dict[str, PyTree]:
        if step % every == 0:
            function(step, timestep, tensors.get("latents"))
        return tensors

    return on_step_end


def latents(value: object, shape: tuple[int, ...]) -> np.ndarray | None:
    """Check latents given by the user, in PyTorch's order of axes."""
    if value is None:
        return None
    array = to_numpy(value, "latents").astype(np.float32)
    if array.shape != shape:
        raise ValueError(f"latents have shape {array.shape}, needed is {shape}")
    if not np.isfinite(array).all():
        raise ValueError("latents has numbers that are not finite")
    return array


def callback_halves(value: object, name: str, images: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Split a tensor that a callback returned into cond and uncond.

    Args:
        value: cond alone, `[images, ...]`, or uncond before cond, `[2 * images, ...]`.
    Returns:
        cond and uncond, `[images, ...]`; uncond is None where it is not given.
    """
    array = np.asarray(value)
    if array.ndim == 0 or len(array) not in (images, 2 * images):
        raise ValueError(
            f"the callback's {name} has shape {array.shape}; its first axis must be {images}, or {2 * images} with "
            "guidance"
        )
    return array[-images:], array[:images] if len(array) == 2 * images else None


def embeds(value: object, name: str, dim: int) -> np.ndarray:
    """Return image embeddings as float32 `[B, dim]`; a list is concatenated."""
    if isinstance(value, str):
        raise TypeError(
            f"{name} must be an array, got {shorten(value)!r}; a prior's output unpacks into its names, so call "
            "decoder(**output), or decoder(*output.to_tuple())"
        )
    parts = value if isinstance(value, list | tuple) else [value]
    if not parts:
        raise ValueError(f"{name} is an empty list")
    arrays = [to_numpy(part, name).astype(np.float32) for part in parts]
    for array in arrays:
        if array.ndim != 2 or array.shape[1] != dim:
            raise ValueError(f"{name} has shape {array.shape}, needed is [batch, {dim}]")
    joined = np.concatenate(arrays)
    if not np.isfinite(joined).all():
        raise ValueError(f"{name} has numbers that are not finite")
    return joined


def interpolation(items: Any, weights: Any) -> tuple[list[Any], list[float]]:
    """Check the items of `interpolate` and their weights."""
    for value, name in ((items, "images_and_prompts"), (weights, "weights")):
        if isinstance(value, str) or not (isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1):
            raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    if hasattr(weights, "__array__"):
        weights = to_numpy(weights, "weights").tolist()
    if len(items) != len(weights):
        raise ValueError(f"images_and_prompts has {len(items)} items, weights has {len(weights)}; give one for each")
    if not len(items):
        raise ValueError("images_and_prompts is an empty list; give one item or more")
    return list(items), [guidance(weight, f"weights[{i}]") for i, weight in enumerate(weights)]


def picture_count(found: int, name: str, prompts: int, repeats: int) -> None:
    """Raise ValueError unless there is one picture for all, one per prompt, or one per generated picture."""
    wanted = sorted({1, prompts, prompts * repeats})
    if found not in wanted:
        raise ValueError(
            f"{name} has {found} pictures for {prompts} prompts with num_images_per_prompt={repeats}; needed are "
            + " or ".join(map(str, wanted))
        )


def per_picture(array: np.ndarray, name: str, prompts: int, repeats: int) -> np.ndarray:
    """Repeat an array so that its first axis has one entry for every generated picture."""
    picture_count(len(array), name, prompts, repeats)
    return array if len(array) == prompts * repeats else np.repeat(array, prompts * repeats // len(array), axis=0)
