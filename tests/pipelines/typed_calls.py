"""Calls that mypy accepts, and those that it has to refuse; mypy reads this file with the package.

A call that is refused no longer makes its `ignore` an error of mypy's (`warn_unused_ignores`).
"""

from __future__ import annotations

import numpy as np

import kandinsky_jax as kj


def accepted(pipe: kj.KandinskyV22Pipeline, combined: kj.KandinskyV22InpaintCombinedPipeline) -> None:
    embeds = np.zeros((1, 8))
    pipe(embeds, embeds, 512, 512, 50, 2.0, 1, 0)
    combined("a", "a.png", "b.png", ["c"], 50, height=64, generator=[1, 2], paste_back=True)
    pipe(embeds, embeds).images[0].save("picture.png")
    pipe(embeds, embeds, return_dict=False)[0][0].save("picture.png")
    automatic = kj.AutoPipelineForText2Image.from_pretrained("tiny")
    automatic("red heart").images[0].save("picture.png")
    kj.AutoPipelineForText2Image.from_pipe(automatic)("red heart").images[0].save("picture.png")


def refused(pipe: kj.KandinskyV22Pipeline, combined: kj.KandinskyV22InpaintCombinedPipeline) -> None:
    embeds = np.zeros((1, 8))
    pipe(embeds, embeds, "tall")  # type: ignore[arg-type]
    pipe(embeds)  # type: ignore[call-arg]
    pipe(embeds, embeds, strength=0.5)  # type: ignore[call-arg]
    pipe(embeds, embeds).image.save("picture.png")  # type: ignore[union-attr]
    combined("a", "a.png", "b.png", None, 2.5)  # type: ignore[arg-type]
    combined("a", "a.png", "b.png", paste_back="yes")  # type: ignore[arg-type]
