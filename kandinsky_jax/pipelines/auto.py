"""AutoPipelines: choose the class for a task and a repository, a folder or a pipeline.

Reference: diffusers' AutoPipelineForText2Image, AutoPipelineForImage2Image and AutoPipelineForInpainting.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
from flax import nnx

from kandinsky_jax.checkpoint import CheckpointError, WeightSelection, hub
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.models import UNet2DConditionModel
from kandinsky_jax.parallel.mesh import mesh_of
from kandinsky_jax.pipelines.base import Pipeline, check_pipelines
from kandinsky_jax.pipelines.combined import CombinedPipeline
from kandinsky_jax.pipelines.decoder import DecoderPipeline, unet_kind
from kandinsky_jax.pipelines.modes import MODES, class_names, pipeline_named, repository_of


def _resolve(name: str | os.PathLike[str], repository: str, arguments: Mapping[str, Any]) -> Path:
    """Return the folder that `from_pretrained` reads when called with these arguments."""
    names = {field.name for field in dataclasses.fields(hub.HubOptions)} - {"selection"}
    where = {key: arguments[key] for key in names & arguments.keys()}
    selection = WeightSelection(arguments.get("variant"), arguments.get("use_safetensors"))
    return hub.resolve(name, repository, **where, selection=selection)


class _AutoPipeline:
    """Base of the classes that choose a combined pipeline; never instantiated."""

    TASK: ClassVar[str]  # of the modes to choose from

    @classmethod
    def _combined(cls) -> dict[str, type[CombinedPipeline]]:
        """Return the classes for the task by repository; the first one is the default."""
        return {mode.repository: mode.combined_class for mode in MODES.values() if mode.task == cls.TASK}

    @classmethod
    def _default(cls) -> str:
        """Return the repository that a name of a model family stands for."""
        return next(iter(cls._combined()))

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is not a pipeline; {name}.from_pretrained(...) and .from_pipe(...) give one")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **arguments: Any) -> CombinedPipeline:
        """Load the combined pipeline that fits a folder or repository.

        Args:
            name: "tiny" (embedded) or one of its family, a folder, or a Hub repository, of a decoder.
            arguments: of the class's own `from_pretrained`, such as `prior`, `dtype` and `revision`.
        Raises:
            CheckpointError: for a checkpoint of another task; the message names the class to use.
        """
        folder = _resolve(name, cls._default(), arguments)
        found = hub.pipeline_class(folder)
        return cls._pick(repository_of(found), f"{folder} holds a {found}").from_pretrained(
            folder, **{key: value for key, value in arguments.items() if key not in ("revision", "subfolder")}
        )

    @classmethod
    def from_pipe(cls, *pipes: Pipeline, **components: Any) -> DecoderPipeline | CombinedPipeline:
        """Build the pipeline for this task from the components of others, see `Pipeline.from_pipe`.

        A decoder gives a decoder; a combined pipeline, or a decoder and a prior, give a combined pipeline. A task that
        needs another UNet takes `unet`, or reads it from the folder next to the pipeline's own.

        Args:
            components: by the constructor's names; `dtype` or `torch_dtype` converts all networks, in place.
        Raises:
            CheckpointError: where no UNet for this task is found.
        """
        if not pipes:
            raise TypeError(f"{cls.__name__}.from_pipe needs a pipeline")
        check_pipelines(f"{cls.__name__}.from_pipe", pipes)
        kinds = [pipe.REPOSITORY for pipe in pipes]
        decoders: list[Any] = [pipe for pipe in pipes if pipe.REPOSITORY != hub.PRIOR]
        kind = decoders[0].REPOSITORY if decoders else hub.PRIOR
        if decoders and isinstance(components.get("unet"), UNet2DConditionModel):
            kind = unet_kind(components["unet"], decoders[0].movq.config.latent_channels) or kind
        elif decoders and kind not in cls._combined() and "unet" not in components:
            components["unet"], kind = cls._sibling_unet(decoders[0]), cls._default()
        combined = cls._pick(kind, f"this is a {' and a '.join(type(pipe).__name__ for pipe in pipes)}")
        whole = hub.PRIOR in kinds or any(isinstance(pipe, CombinedPipeline) for pipe in pipes)
        return (combined if whole else combined.DECODER).from_pipe(*pipes, **components)

    @classmethod
    def _sibling_unet(cls, pipe: DecoderPipeline | CombinedPipeline) -> UNet2DConditionModel:
        """Load the UNet for this task from the folder next to the one that a pipeline was loaded from.

        Raises:
            CheckpointError: where there is none; the message shows how to pass one.
        """
        decoder = cls._combined()[cls._default()].DECODER
        folder = Path(pipe.name_or_path or ".")
        repository = cls._default()
        if not class_names(folder.name) or not (folder.parent / repository / "unet").is_dir():
            others = [other.__name__ for other in AUTO if pipe.REPOSITORY in other._combined()]
            raise CheckpointError(
                f"the unet of this {type(pipe).__name__} is not for {cls.TASK}; use {' or '.join(others)}, or give "
                f"one: {cls.__name__}.from_pipe(pipe, unet={decoder.__name__}.from_pretrained("
                f"'{hub.OFFICIAL}/{repository}', movq=pipe.movq).unet)"
            )
        mesh = mesh_of(jax.tree.leaves(nnx.state(pipe.unet, nnx.Param))[0])
        loaded: Any = decoder.from_pretrained(
            folder.parent / repository, movq=pipe.movq, scheduler=pipe.scheduler, dtype=pipe.unet.dtype, mesh=mesh
        )
        return loaded.unet

    @classmethod
    def _pick(cls, kind: str | None, what: str) -> type[CombinedPipeline]:
        classes = cls._combined()
        if kind in classes:
            return classes[kind]
        others = [other.__name__ for other in AUTO if kind in other._combined()]
        hint = f"use {' or '.join(others)}" if others else f"needed is a {' or '.join(classes)}"
        raise CheckpointError(f"{cls.__name__} is for {cls.TASK}, and {what}; {hint}")


class AutoPipelineForText2Image(_AutoPipeline):
    """prompt -> picture; with a controlnet checkpoint, prompt and hint -> picture."""

    TASK = "text-to-image"


class AutoPipelineForImage2Image(_AutoPipeline):
    """prompt and picture -> picture; with a controlnet checkpoint, prompt, picture and hint -> picture."""

    TASK = "image-to-image"


class AutoPipelineForInpainting(_AutoPipeline):
    """prompt, picture and mask -> picture."""

    TASK = "inpainting"


def pipeline_for(name: str | os.PathLike[str], arguments: Mapping[str, Any]) -> Pipeline:
    """Load a model with the class that its `model_index.json` names; see `DiffusionPipeline.from_pretrained`."""
    folder = _resolve(name, hub.DECODER, arguments)
    found = hub.pipeline_class(folder)
    cls = pipeline_named(found)
    if cls is None:
        raise CheckpointError(
            f"{folder} holds a {shorten(found)}, which is not a pipeline of Kandinsky 2.2, such as KandinskyV22Pipeline"
        )
    return cls.from_pretrained(name, **arguments)


AUTO = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)
