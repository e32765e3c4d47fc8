"""Load a model, generate, and write the pictures: what the commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.cli.options import CompletedOptions, Options
from kandinsky_jax.diffusion.rng import Generator
from kandinsky_jax.pipelines import CombinedPipeline, checks
from kandinsky_jax.pipelines.modes import Mode


def read_pictures(
    prompt: Sequence[str], options: Options, files: dict[str, list[Path]]
) -> dict[str, list[Image.Image]]:
    """Read the pictures of a command, before a model is loaded."""
    checks.texts(prompt, "prompt")
    for name, paths in files.items():
        checks.picture_count(len(paths), name, len(prompt), options.num_images)
    return {name: [images.read(path, name) for path in paths] for name, paths in files.items()}


def file_names(files: dict[str, list[Path]]) -> dict[str, list[str]]:
    """Return paths as they are recorded in a picture."""
    return {name: [str(path) for path in paths] for name, paths in files.items()}


def generate_pictures(
    prompt: list[str],
    given: Options,
    mode: Mode,
    files: dict[str, list[Path]],
    **settings: Any,
) -> None:
    """Load, generate and write, for commands that are one call of a combined pipeline."""
    pictures, repeats = read_pictures(prompt, given, files), given.num_images
    first = next(iter(pictures.values()))[0] if pictures else None
    options = given.completed(mode)
    if "strength" in settings:
        checks.strength(settings["strength"], options.steps_if_given)
    settings |= {
        "negative_prompt": options.negative_prompt,
        **options.decoder_settings(),
        **{f"prior_{name}": value for name, value in options.prior_settings().items()},
    }

    def call(pipe: Any, generator: Generator) -> Any:
        settings.update(options.size(pipe, first))
        return pipe(prompt, num_images_per_prompt=repeats, generator=generator, **pictures, **settings).images

    seed, generated = options.generate(call)
    facts = settings | ({"files": file_names(files)} if files else {})
    write_pictures(generated, options, seed, [{"prompt": text, **facts} for text in prompt for _ in range(repeats)])


def generate_from_embeds(
    embed: Callable[[CombinedPipeline, Generator], Any], options: CompletedOptions, about: Sequence[dict[str, object]]
) -> None:
    """Load, generate and write, for commands that compute image embeddings in their own way."""
    settings = options.decoder_settings()

    def call(pipe: CombinedPipeline, generator: Generator) -> list[Image.Image]:
        settings.update(options.size(pipe, None))
        return pipe.decoder_pipe(**embed(pipe, generator), generator=generator, **settings).images

    seed, generated = options.generate(call)
    shared = {"negative_prompt": options.negative_prompt, "prior": options.prior_settings(), **settings}
    write_pictures(generated, options, seed, [facts | shared for facts in about])


def write_pictures(
    pictures: Sequence[Image.Image], options: Options, seed: int, about: Sequence[dict[str, object]]
) -> None:
    """Write the pictures with the settings that reproduce them."""
    for i, (picture, facts) in enumerate(zip(pictures, about, strict=True)):
        path = options.output
        path = path if len(pictures) == 1 else path.with_stem(f"{path.stem}-{i}")
        run = {"model": options.model, "seed": seed, "image": i, "torch_noise": options.torch_noise}
        run |= {"scheduler": options.scheduler, "fast": options.fast}
        images.write(path, picture, facts | run)
        print(path)
    print(f"seed {seed}")
