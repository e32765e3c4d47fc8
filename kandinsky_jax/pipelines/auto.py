"""Which class a repository, a folder or a pipeline needs for a task.

Reference: diffusers' AutoPipelineForText2Image, AutoPipelineForImage2Image and AutoPipelineForInpainting.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from kandinsky_jax import hub
from kandinsky_jax.checkpoint import CheckpointError
from kandinsky_jax.pipelines.base import Pipeline
from kandinsky_jax.pipelines.combined import (
    CombinedPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
)
from kandinsky_jax.pipelines.combined_controlnet import (
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22ControlnetImg2ImgCombinedPipeline,
)


class _AutoPipeline:
    """Picks the combined pipeline of a task; it is never an object itself."""

    TASK: ClassVar[str]
    DEFAULT: ClassVar[str] = hub.DECODER  # which member of a family, where a name stands for several
    COMBINED: ClassVar[dict[str, type[CombinedPipeline]]]  # by kind of checkpoint

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is no pipeline; {name}.from_pretrained(...) and .from_pipe(...) give one")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **arguments: Any) -> CombinedPipeline:
        """Load the combined pipeline for what a folder or repository holds.

        Args:
            name: "tiny" (embedded) or one of its family, a folder, or a Hub repository, of a decoder.
            arguments: of the class's own `from_pretrained`, such as `prior`, `dtype` and `revision`.
        Raises:
            CheckpointError: where it holds nothing for this task; the message names the class that can use it.
        """
        where = {key: arguments[key] for key in ("revision", "cache_dir") if key in arguments}
        folder = hub.resolve(name, cls.DEFAULT, **where)
        return cls._pick(hub.kind(folder), f"{folder} holds a {hub.pipeline_class(folder)}").from_pretrained(
            folder, **{key: value for key, value in arguments.items() if key != "revision"}
        )

    @classmethod
    def from_pipe(cls, *pipes: Pipeline, **components: Any) -> Pipeline:
        """The pipeline for this task with the components of others, see `Pipeline.from_pipe`.

        Of a decoder alone it is a decoder; of a combined pipeline, or a decoder and a prior, a combined one.
        """
        if not pipes:
            raise TypeError(f"{cls.__name__}.from_pipe needs a pipeline")
        kinds = [pipe.REPOSITORY for pipe in pipes]
        kind = next((k for k in kinds if k != hub.PRIOR), hub.PRIOR)
        combined = cls._pick(kind, f"this is a {' and a '.join(type(pipe).__name__ for pipe in pipes)}")
        whole = hub.PRIOR in kinds or any(isinstance(pipe, CombinedPipeline) for pipe in pipes)
        return (combined if whole else combined.DECODER).from_pipe(*pipes, **components)

    @classmethod
    def _pick(cls, kind: str | None, what: str) -> type[CombinedPipeline]:
        if kind in cls.COMBINED:
            return cls.COMBINED[kind]
        others = [other.__name__ for other in AUTO if kind in other.COMBINED]
        hint = f"use {' or '.join(others)}" if others else f"needed is a {' or '.join(cls.COMBINED)}"
        raise CheckpointError(f"{cls.__name__} is for {cls.TASK}, and {what}; {hint}")


class AutoPipelineForText2Image(_AutoPipeline):
    """prompt -> picture; with a controlnet checkpoint, prompt and hint -> picture."""

    TASK = "text-to-image"
    COMBINED: ClassVar[dict[str, type[CombinedPipeline]]] = {
        hub.DECODER: KandinskyV22CombinedPipeline,
        hub.CONTROLNET: KandinskyV22ControlnetCombinedPipeline,
    }


class AutoPipelineForImage2Image(_AutoPipeline):
    """prompt and picture -> picture; with a controlnet checkpoint, prompt, picture and hint -> picture."""

    TASK = "image-to-image"
    COMBINED: ClassVar[dict[str, type[CombinedPipeline]]] = {
        hub.DECODER: KandinskyV22Img2ImgCombinedPipeline,
        hub.CONTROLNET: KandinskyV22ControlnetImg2ImgCombinedPipeline,
    }


class AutoPipelineForInpainting(_AutoPipeline):
    """prompt, picture and mask -> picture."""

    TASK = "inpainting"
    DEFAULT = hub.INPAINT
    COMBINED: ClassVar[dict[str, type[CombinedPipeline]]] = {hub.INPAINT: KandinskyV22InpaintCombinedPipeline}


AUTO = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)
