"""`kandinsky-jax controlnet`: depth maps and a prompt -> pictures with that layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kandinsky_jax.cli.options import Options, Prompt, Strength, takes_options
from kandinsky_jax.cli.running import generate_pictures
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.modes import MODES

EXAMPLE = 'Example: kandinsky-jax controlnet "soccer ball" --hint depth.png -o ball.png --model tiny'


@takes_options
def controlnet(
    prompt: Prompt,
    hint: Annotated[
        list[Path], typer.Option("--hint", help="A depth map, near bright; one for all prompts, or one for each.")
    ],
    options: Options,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture to start from, for image-to-image.")
    ] = None,
    strength: Strength = 0.3,
) -> None:
    """Generate pictures from a prompt, with the layout of a depth map."""
    if not image:
        generate_pictures(prompt, options, MODES["controlnet"], {"hint": hint})
        return
    checks.strength(strength, options.steps_if_given)
    files = {"image": image, "hint": hint}
    generate_pictures(prompt, options, MODES["controlnet-img2img"], files, strength=strength)
