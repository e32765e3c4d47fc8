"""`kandinsky-jax vary`: a picture moved towards a prompt."""

from __future__ import annotations

from kandinsky_jax.cli.options import ImagePaths, Options, Prompt, Strength, takes_options
from kandinsky_jax.cli.running import file_names, generate_from_embeds, read_pictures
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines import CombinedPipeline, KandinskyV22PriorEmb2EmbPipeline, checks
from kandinsky_jax.pipelines.modes import MODES
from kandinsky_jax.pipelines.outputs import PriorResult

EXAMPLE = 'Example: kandinsky-jax vary "blue heart" --image heart.png --strength 0.5 -o varied.png --model tiny'


@takes_options
def vary(prompt: Prompt, image: ImagePaths, options: Options, strength: Strength = 0.3) -> None:
    """Generate variations of a picture by moving its image embedding towards a prompt."""
    checks.strength(strength, options.prior_steps_if_given)
    pictures = read_pictures(prompt, options, {"image": image})["image"]
    completed = options.completed(MODES["generate"])
    checks.strength(strength, completed.prior_steps_if_given)

    def embed(pipe: CombinedPipeline, generator: Generator) -> PriorResult:
        return KandinskyV22PriorEmb2EmbPipeline.from_pipe(pipe)(
            prompt,
            pictures,
            strength=strength,
            negative_prompt=options.negative_prompt,
            num_images_per_prompt=options.num_images,
            generator=generator,
            **completed.prior_settings(),
        )

    facts = {"strength": strength, "files": file_names({"image": image})}
    generate_from_embeds(
        embed, completed, [{"prompt": text} | facts for text in prompt for _ in range(options.num_images)]
    )
