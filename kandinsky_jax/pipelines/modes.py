"""The registry of modes: what the hub, the auto classes, batch jobs, training and the command line know of each.

A new mode is a file with its classes, see `inpaint.py`, and an entry here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kandinsky_jax.checkpoint import hub

if TYPE_CHECKING:
    from kandinsky_jax.pipelines.base import Pipeline
    from kandinsky_jax.pipelines.combined import CombinedPipeline
    from kandinsky_jax.pipelines.decoder import DecoderPipeline

# Arguments that are pictures, and the columns of a batch job's rows that hold them.
PICTURE_COLUMNS = {"image": "image", "mask_image": "mask", "hint": "hint"}


@dataclass(frozen=True)
class Mode:
    """One way to generate pictures.

    Args:
        name: of the mode in batch jobs, and of the command.
        task: of the auto class that chooses it, as in diffusers.
        repository: name of the official repository whose UNet it needs.
        module: the file of its classes in `kandinsky_jax.pipelines`, or a dotted name of one elsewhere.
        decoder, combined: names of its classes.
        pictures: arguments that are pictures, keys of `PICTURE_COLUMNS`.
        takes_strength: whether it starts from a picture, a part of the way.
        command: of the command line; "" is one of the mode's name.
        example: the command with its arguments, for its help.
    """

    name: str
    task: str
    repository: str
    module: str
    decoder: str
    combined: str
    pictures: tuple[str, ...] = ()
    takes_strength: bool = False
    command: str = ""
    example: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a batch job's rows that hold pictures."""
        return tuple(PICTURE_COLUMNS[name] for name in self.pictures)

    @property
    def decoder_class(self) -> type[DecoderPipeline]:
        """The class that takes image embeddings."""
        return getattr(self._module, self.decoder)

    @property
    def combined_class(self) -> type[CombinedPipeline]:
        """The class that takes prompts."""
        return getattr(self._module, self.combined)

    @property
    def _module(self) -> object:
        return importlib.import_module(self.module if "." in self.module else f"kandinsky_jax.pipelines.{self.module}")


_ENTRIES = (
    Mode(
        "generate",
        task="text-to-image",
        repository=hub.DECODER,
        module="text2img",
        decoder="KandinskyV22Pipeline",
        combined="KandinskyV22CombinedPipeline",
    ),
    Mode(
        "img2img",
        task="image-to-image",
        repository=hub.DECODER,
        module="img2img",
        decoder="KandinskyV22Img2ImgPipeline",
        combined="KandinskyV22Img2ImgCombinedPipeline",
        pictures=("image",),
        takes_strength=True,
    ),
    Mode(
        "inpaint",
        task="inpainting",
        repository=hub.INPAINT,
        module="inpaint",
        decoder="KandinskyV22InpaintPipeline",
        combined="KandinskyV22InpaintCombinedPipeline",
        pictures=("image", "mask_image"),
    ),
    Mode(
        "controlnet",
        task="text-to-image",
        repository=hub.CONTROLNET,
        module="controlnet",
        decoder="KandinskyV22ControlnetPipeline",
        combined="KandinskyV22ControlnetCombinedPipeline",
        pictures=("hint",),
    ),
    Mode(
        "controlnet-img2img",
        task="image-to-image",
        repository=hub.CONTROLNET,
        module="controlnet",
        decoder="KandinskyV22ControlnetImg2ImgPipeline",
        combined="KandinskyV22ControlnetImg2ImgCombinedPipeline",
        pictures=("image", "hint"),
        takes_strength=True,
        command="controlnet",
    ),
)
MODES: dict[str, Mode] = {mode.name: mode for mode in _ENTRIES}

PRIORS = {  # class -> its file
    "KandinskyV22PriorPipeline": "text2emb",
    "KandinskyV22PriorEmb2EmbPipeline": "emb2emb",
    "KandinskyPriorPipeline": "older",
}


def modes_of(repository: str) -> list[Mode]:
    """Return the modes that use the UNet of a repository; the first one needs the fewest inputs."""
    return [mode for mode in MODES.values() if mode.repository == repository]


def class_names(repository: str) -> list[str]:
    """Return the classes that a repository's `model_index.json` may name: decoders, then combined ones; or priors."""
    if repository == hub.PRIOR:
        return list(PRIORS)
    modes = modes_of(repository)
    return [mode.decoder for mode in modes] + [mode.combined for mode in modes]


def repository_of(class_name: str) -> str | None:
    """Return the repository whose models a pipeline class loads; None for the name of no class."""
    repositories = (hub.PRIOR, *dict.fromkeys(mode.repository for mode in MODES.values()))
    return next((name for name in repositories if class_name in class_names(name)), None)


def pipeline_named(name: str) -> type[Pipeline] | None:
    """Return a pipeline class by its name; None for the name of no class."""
    if name in PRIORS:
        return getattr(importlib.import_module(f"kandinsky_jax.pipelines.{PRIORS[name]}"), name)
    for mode in MODES.values():
        if name in (mode.decoder, mode.combined):
            return mode.decoder_class if name == mode.decoder else mode.combined_class
    return None
