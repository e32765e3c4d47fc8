"""`kandinsky-jax img2img`: pictures and a prompt -> variations."""

from __future__ import annotations

from kandinsky_jax.cli.options import ImagePaths, Options, Prompt, Strength, takes_options
from kandinsky_jax.cli.running import generate_pictures
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.modes import MODES

EXAMPLE = 'Example: kandinsky-jax img2img "green heart" --image heart.png --strength 0.6 -o green.png --model tiny'


@takes_options
def img2img(prompt: Prompt, image: ImagePaths, options: Options, strength: Strength = 0.3) -> None:
    """Generate variations of pictures, guided by a prompt."""
    checks.strength(strength, options.steps_if_given)
    generate_pictures(prompt, options, MODES["img2img"], {"image": image}, strength=strength)
