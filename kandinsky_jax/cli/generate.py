"""`kandinsky-jax generate`: a prompt -> pictures."""

from __future__ import annotations

from kandinsky_jax.cli.options import Options, Prompt, takes_options
from kandinsky_jax.cli.running import generate_pictures
from kandinsky_jax.pipelines.modes import MODES

EXAMPLE = 'Example: kandinsky-jax generate "purple heart" -o heart.png --model tiny'


@takes_options
def generate(prompt: Prompt, options: Options) -> None:
    """Generate pictures from a prompt."""
    generate_pictures(prompt, options, MODES["generate"], {})
