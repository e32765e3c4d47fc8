"""`kandinsky-jax inpaint`: pictures, masks and a prompt -> repainted pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kandinsky_jax.cli.options import ImagePaths, Options, Prompt, takes_options
from kandinsky_jax.cli.running import generate_pictures
from kandinsky_jax.pipelines.modes import MODES

EXAMPLE = (
    'Example: kandinsky-jax inpaint "smiling face with sunglasses" --image face.png --mask mask.png'
    " -o cool.png --model tiny"
)


@takes_options
def inpaint(
    prompt: Prompt,
    image: ImagePaths,
    mask: Annotated[
        list[Path], typer.Option("--mask", help="White is repainted; one for all prompts, or one for each.")
    ],
    options: Options,
    paste_back: Annotated[
        bool, typer.Option("--paste-back", help="Put the picture's own pixels back where the mask is black.")
    ] = False,
) -> None:
    """Repaint the masked part of pictures, guided by a prompt."""
    files = {"image": image, "mask_image": mask}
    generate_pictures(prompt, options, MODES["inpaint"], files, paste_back=paste_back)
