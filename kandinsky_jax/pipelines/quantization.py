"""Quantization of a pipeline's networks, calibrated by a few pictures that the pipeline generates.

Calibration notes the range of the inputs of each layer that will be quantized. It runs the pipeline itself, with
networks whose layers report what they get, so every mode, scheduler and guider is calibrated as it is used.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax.checkpoint import CheckpointError, hub
from kandinsky_jax.checkpoint.conversion import Quantization, convert
from kandinsky_jax.checkpoint.quantization import (
    QUANTIZABLE,
    InputRanges,
    check_dtype,
    check_quantizable,
    is_quantized,
    quantize_network,
)
from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.common.reading import ReadError, of_file, read_text
from kandinsky_jax.common.storage import read_json
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.models.quantized import float_layers, layers_to_ignore
from kandinsky_jax.models.structure import copy_structure, replace_module
from kandinsky_jax.pipelines.adapters import adapters_of
from kandinsky_jax.pipelines.fast import FastLoader, keep_folder
from kandinsky_jax.pipelines.modes import modes_of, pipeline_named, repository_of

# What is generated where the user names no prompts: pictures of many kinds.
PROMPTS = (
    "red cat, 4k photo",
    "a portrait of an old fisherman, oil painting",
    "an aerial view of a city at night",
    "a bowl of fruit on a white table",
    "a green mountain landscape with a lake, watercolor",
    "a purple heart icon on a plain background",
    "a black and white drawing of a tree",
    "a smiling face with sunglasses",
)
STEPS = 10  # of either stage: from the first timestep to the last, which the range of the inputs depends on

RangeOf = Callable[[jax.Array], jax.Array]  # of an input of any shape, its range [2]


def least_and_largest(x: jax.Array) -> jax.Array:
    """Return the least and the largest value of an array, float32 `[2]`."""
    return jnp.stack([jnp.min(x), jnp.max(x)]).astype(jnp.float32)


class _Observed(nnx.Module):
    """Stands in a layer's place and reports the range of its input."""

    def __init__(self, layer: nnx.Module, range_of: RangeOf, report: Callable[[np.ndarray], None]):
        self.layer, self.range_of, self.report = layer, range_of, report

    def __call__(self, x: jax.Array, **options: object) -> PyTree:
        jax.debug.callback(self.report, self.range_of(x))
        return self.layer(x, **options)


class Observation:
    """A network like a given one, with the same arrays, that notes the inputs of its layers as it runs.

    Args:
        network: a UNet, a prior or MoVQ.
        range_of: a layer's input; the widest of all calls is kept.

    Attributes:
        network: to run in the place of the given one.
        ranges: of inputs, by the names of the layers that the network's rule quantizes, and that have been called.
    """

    def __init__(self, network: nnx.Module, range_of: RangeOf = least_and_largest):
        self.ranges: dict[str, tuple[float, float]] = {}
        self.network = copy_structure(network)
        ignored = set(layers_to_ignore(network))
        for name, layer in list(float_layers(self.network)):
            if name not in ignored:
                replace_module(self.network, name, _Observed(layer, range_of, self._reporter(name)))

    def _reporter(self, name: str) -> Callable[[np.ndarray], None]:
        def report(value: np.ndarray) -> None:
            self.ranges[name] = _widest(self.ranges.get(name), (float(value[0]), float(value[1])))

        return report


def _widest(one: tuple[float, float] | None, other: tuple[float, float]) -> tuple[float, float]:
    return other if one is None else (min(one[0], other[0]), max(one[1], other[1]))


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    range_of: RangeOf = least_and_largest,
    **arguments: Any,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Generate a few pictures, and return the ranges of the inputs of the layers to quantize.

    Args:
        pipe: a combined pipeline of any mode, or a prior; it is as before. Networks that are quantized already run as
            they are. Where its model has a fast adapter, pictures are generated with it too.
        prompts: None is `PROMPTS`.
        range_of: an input; the widest of all calls is kept.
        arguments: of the calls, such as the size or the numbers of steps, instead of what the model recommends.
    Returns:
        by component and layer, what `kandinsky_jax.checkpoint.quantization.quantize_network` takes.
    Raises:
        ValueError: for a decoder without a prior.
    """
    pipe = _first_mode(pipe)
    held = {name: part for name, part in pipe._held().items() if type(part).__name__ in QUANTIZABLE}
    networks = {name: part for name, part in held.items() if not is_quantized(part)}
    found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in networks}
    texts = list(PROMPTS if prompts is None else as_list("prompts", prompts))

    def observe() -> None:
        seen = {name: Observation(network, range_of) for name, network in networks.items()}
        twin = type(pipe)(**pipe._held() | {name: one.network for name, one in seen.items()})
        twin.set_progress_bar_config(**pipe._progress_bar_config)
        _generate(twin, texts, _settings(pipe) | arguments | pipe._call_defaults())
        jax.effects_barrier()
        for name, one in seen.items():
            for layer, seen_here in one.ranges.items():
                found[name][layer] = _widest(found[name].get(layer), seen_here)

    observe()
    if pipe.has_fast_adapter and not pipe._call_defaults():
        pipe.load_fast()
        try:
            observe()
        finally:
            pipe.unload_fast()
    return found


def as_list(name: str, values: Sequence[str]) -> list[str]:
    """Return an argument's strings; a single one stands for itself.

    Raises:
        ValueError: where there is none.
    """
    found = [values] if isinstance(values, str) else list(values)
    if not found:
        raise ValueError(f"{name} is empty: give one or more, or leave it out")
    return found


def check_no_calibration(prompts: object, prior: object) -> None:
    """Raise ValueError for arguments that would be ignored, since scales come from the inputs at run time."""
    if prompts is not None or prior is not None:
        raise ValueError("dynamic=True or --dynamic needs no calibration: leave prompts and prior out")


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Return the prompts of a text file, one a line.

    Raises:
        ValueError: for a file without any, or that cannot be read.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ReadError) as error:
        raise ValueError(of_file(path, error)) from None
    if not (found := [line for line in lines if line]):
        raise ValueError(of_file(path, "has no prompts; needed is one a line"))
    return found


def convert_quantized(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: str = "int8",
    *,
    prior: str | os.PathLike[str] | None = None,
    prompts: Sequence[str] | None = None,
    dynamic: bool = False,
    components: Sequence[str] | None = None,
    revision: str | None = None,
    **options: Any,
) -> Path:
    """Convert a model, with its UNet, prior and MoVQ's decoder quantized.

    Args:
        source, target, revision: see `kandinsky_jax.checkpoint.conversion.convert`.
        dtype: "int8" or "float8_e4m3fn", of quantized weights and inputs.
        prior: of a decoder, for calibration alone: folder or repository; None finds it as a combined pipeline does.
        prompts, dynamic, components: see `Quantizer.quantize`.
        options: further ones of `convert`; its `dtype`, here `weights_dtype`, is that of what is not quantized.
    Returns:
        the target.
    Raises:
        CheckpointError: for a decoder whose prior is not found, and as `convert`.
        ValueError: for components that the model lacks or that cannot be quantized, and as `Quantizer.quantize`.
    """
    folder = hub.resolve(source, hub.DECODER, revision=revision)
    able = [name for name, cls in hub.components(folder).items() if cls in QUANTIZABLE]
    check_dtype(dtype)
    if dynamic:
        check_no_calibration(prompts, prior)
    chosen = able if components is None else as_list("components", components)
    for name in able:
        path = hub.component_folder(folder, name) / "config.json"
        if read_json(path).get("quantization_config") is not None:
            raise CheckpointError(of_file(path, "describes quantized weights; convert the full ones"))
    if unknown := [name for name in chosen if name not in able]:
        raise ValueError(f"{quote(unknown)} cannot be quantized in {folder}, only {able}")
    texts = None if prompts is None else as_list("prompts", prompts)

    def input_ranges() -> Mapping[str, InputRanges | None]:
        if dynamic:
            return dict.fromkeys(chosen)
        pipe = _to_calibrate(folder, prior)
        pipe.set_progress_bar_config(disable=not options.get("progress", True))
        found = calibrate(pipe, texts)
        return {name: found[name] for name in chosen}

    options["dtype"] = options.pop("weights_dtype", None)
    return convert(folder, target, quantization=Quantization(dtype, input_ranges), **options)


def _to_calibrate(folder: Path, prior: str | os.PathLike[str] | None) -> Any:
    """Load the pipeline that calibrates a model."""
    repository = repository_of(hub.pipeline_class(folder))
    if repository is None:
        raise CheckpointError(f"{folder} holds a {shorten(hub.pipeline_class(folder))}, which cannot be calibrated")
    if repository == hub.PRIOR:
        return pipeline_named("KandinskyV22PriorPipeline").from_pretrained(folder)  # type: ignore[union-attr]
    try:
        hub.with_prior(folder, prior)
    except CheckpointError as error:
        if prior is not None:
            raise
        raise CheckpointError(
            f"{folder} is calibrated with the embeddings of a prior, and does not say of which: name one (--prior "
            "FOLDER_OR_REPOSITORY), or scale inputs at run time (--dynamic)"
        ) from error
    return modes_of(repository)[0].combined_class.from_pretrained(folder, prior=prior)


def _first_mode(pipe: Any) -> Any:
    """Return a pipeline of the same networks that needs the fewest inputs."""
    held = pipe._held()
    if "prior" in held:
        cls: Any = pipeline_named("KandinskyV22PriorPipeline")
    elif "prior_prior" in held:
        cls = modes_of(pipe.REPOSITORY)[0].combined_class
    else:
        raise ValueError(
            f"a {type(pipe).__name__} needs image embeddings to be calibrated: give a prior's pipeline, as "
            "quantize(prior=...), or scale inputs at run time, by quantize(dynamic=True)"
        )
    return pipe if type(pipe) is cls else cls.from_pipe(pipe)


def _settings(pipe: Any) -> dict[str, Any]:
    """Return the arguments of calls that calibrate a pipeline: what its model recommends, in few steps."""
    settings = pipe.recommended_settings.arguments()
    settings |= {"num_inference_steps": STEPS, "prior_num_inference_steps": STEPS}
    if "unet" not in pipe._held():
        return {name.removeprefix("prior_"): value for name, value in settings.items() if name.startswith("prior_")}
    side = pipe.decoder_pipe.native_side
    return {"height": side, "width": side} | settings


def _generate(pipe: Any, prompts: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Call a pipeline of any mode; whatever it needs besides prompts is made here."""
    parameters = inspect.signature(pipe.__call__).parameters
    call = {"generator": 0, "output_type": "np", **settings, "prompt": list(prompts)}
    if "hint" in parameters:
        call["hint"] = _ball(call["height"], call["width"])
    if "mask_image" not in parameters:
        pipe(**call)
        return
    rows, columns = np.indices((call["height"], call["width"])) / np.reshape((call["height"], call["width"]), (2, 1, 1))
    grey = np.full((*rows.shape, 3), 0.5, np.float32)
    pictures = pipe(**call, image=grey, mask_image=rows > 0.125).images  # almost all of it: pictures of the prompts
    pipe(**call, image=list(pictures), mask_image=(abs(rows - 0.5) < 0.25) & (abs(columns - 0.5) < 0.25))


def _ball(height: int, width: int) -> np.ndarray:
    """Return the depth map of a ball before a wall, uint8 `[height, width]`, near is bright."""
    rows, columns = np.indices((height, width)) / np.reshape((height, width), (2, 1, 1))
    far = np.hypot(rows - 0.5, columns - 0.5) / 0.4
    return np.where(far < 1, 240 - 60 * far**4, 25).astype(np.uint8)


class Quantizer(FastLoader):
    """Mixin of pipelines that quantize their networks."""

    def quantize(
        self,
        dtype: str = "int8",
        *,
        prompts: Sequence[str] | None = None,
        dynamic: bool = False,
        components: Sequence[str] | None = None,
        prior: Any = None,
        **arguments: Any,
    ) -> None:
        """Quantize the UNet, the prior and MoVQ's decoder: weights and inputs of their large layers to 8 bits.

        The full networks are replaced, in this pipeline alone. `save_pretrained` writes the quantized ones, which
        `from_pretrained` loads like any others.

        Args:
            dtype: "int8", or "float8_e4m3fn" for chips that have it.
            prompts: for calibration, of the kind that will be generated; None is a few of many kinds.
            dynamic: scale inputs by their own maximum at run time, without calibration.
            components: which networks, by their names in the pipeline; None is all that can be.
            prior: for a decoder: the pipeline of a prior, for calibration alone.
            arguments: of the calls that calibrate, such as height and width.
        Raises:
            ValueError: for networks that are quantized already, a decoder without a prior, LoRA that is loaded, or
                prompts or a prior without calibration.
        """
        if dynamic:
            check_no_calibration(prompts, prior)
        networks = self._to_quantize(dtype, components)
        ranges: Mapping[str, InputRanges | None] = dict.fromkeys(networks)
        if not dynamic:
            ranges = calibrate(self._with_prior(prior), prompts, **arguments)
        made = {name: quantize_network(network, ranges[name], dtype) for name, network in networks.items()}
        for name, network in made.items():
            keep_folder(networks[name], network)
            setattr(self, name, network)

    def _to_quantize(self, dtype: str, components: Sequence[str] | None) -> dict[str, nnx.Module]:
        """Return the networks to quantize, checked."""
        held = self._held()
        able = {name: part for name, part in held.items() if type(part).__name__ in QUANTIZABLE}
        if components is None:
            components = list(able)
        # A combined pipeline's own names, and those of the prior's pipeline and of files.
        prefixed = {name.removeprefix("prior_"): name for name in able}
        components = [prefixed.get(name, name) for name in as_list("components", components)]
        if unknown := [name for name in components if name not in able]:
            raise ValueError(f"{quote(unknown)} cannot be quantized in a {type(self).__name__}, only {list(able)}")
        for name in components:
            check_quantizable(able[name], dtype, name)
            if loaded := list(adapters_of(able[name]).loaded):
                raise ValueError(
                    f"the {name} has the adapters {shorten(loaded)}: unload_lora_weights() first, after fuse_lora() to "
                    "keep what they change"
                )
        return {name: able[name] for name in components}

    def _with_prior(self, prior: Any) -> Any:
        if prior is None:
            return self
        if "unet" not in self._held() or "prior_prior" in self._held():
            raise ValueError(f"prior= is for decoders; a {type(self).__name__} has a prior of its own")
        own: Any = self
        return modes_of(own.REPOSITORY)[0].combined_class.from_pipe(own, prior)
