"""`kandinsky-jax mix`: prompts and pictures -> a picture between them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kandinsky_jax import images
from kandinsky_jax.cli.options import Options, numbers, takes_options
from kandinsky_jax.cli.running import generate_from_embeds
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines import CombinedPipeline, checks
from kandinsky_jax.pipelines.modes import MODES
from kandinsky_jax.pipelines.outputs import KandinskyPriorPipelineOutput

EXAMPLE = 'Example: kandinsky-jax mix "dog face" cat.png --weights 0.6,0.4 -o mix.png --model tiny'


@takes_options
def mix(
    items: Annotated[
        list[str], typer.Argument(help=f"Prompts and pictures; names in {', '.join(images.WRITABLE)} are pictures.")
    ],
    options: Options,
    weights: Annotated[
        str | None, typer.Option(help="A number for each, with commas between; default: equal ones.")
    ] = None,
) -> None:
    """Generate a picture from a mix of prompts and pictures."""
    mixed = [images.read(x, "item") if Path(x).suffix.lower() in images.WRITABLE else x for x in items]
    shares = [1 / len(items)] * len(items) if weights is None else numbers(weights, "--weights")
    checks.interpolation(mixed, shares)

    completed = options.completed(MODES["generate"], guides_prior=False)

    def embed(pipe: CombinedPipeline, generator: Generator) -> KandinskyPriorPipelineOutput:
        return pipe.prior_pipe.interpolate(
            mixed,
            shares,
            num_images_per_prompt=options.num_images,
            negative_prompt=options.negative_prompt or "",
            generator=generator,
            **completed.prior_settings(),
        )

    generate_from_embeds(embed, completed, [{"items": items, "weights": shares}] * options.num_images)
