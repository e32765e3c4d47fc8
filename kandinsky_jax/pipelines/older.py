"""Names of Kandinsky 2.1's pipelines, which diffusers' documentation also uses with 2.2's repositories."""

from __future__ import annotations

from typing import NoReturn

from kandinsky_jax.pipelines.text2emb import KandinskyV22PriorPipeline

KandinskyPriorPipeline = KandinskyV22PriorPipeline  # the same calls, with 2.2's repositories

_OF_2_1 = (
    "KandinskyPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintPipeline",
    "KandinskyCombinedPipeline",
    "KandinskyImg2ImgCombinedPipeline",
    "KandinskyInpaintCombinedPipeline",
)


class _Kandinsky21Pipeline:
    """Placeholder of an unsupported class; its error names the class of 2.2 to use."""

    def __init__(self, *_: object, **__: object) -> None:
        _refuse(type(self).__name__)

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> NoReturn:
        """Raise NotImplementedError."""
        _refuse(cls.__name__)

    from_pipe = from_pretrained


def _refuse(name: str) -> NoReturn:
    newer = name.replace("Kandinsky", "KandinskyV22")
    prompt = "" if "Combined" in name else "; its decoder takes image_embeds and no prompt"
    raise NotImplementedError(
        f"{name} is for Kandinsky 2.1, which is not supported: for the repositories of 2.2, such as "
        f"kandinsky-community/kandinsky-2-2-decoder, write {newer}{prompt}"
    )


def class_of_2_1(name: str) -> type | None:
    """Return the placeholder for a class of Kandinsky 2.1, None for any other name."""
    return type(name, (_Kandinsky21Pipeline,), {"__module__": __name__}) if name in _OF_2_1 else None
