"""The command line, `kandinsky-jax`."""

from __future__ import annotations

import secrets
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kandinsky_jax import images
from kandinsky_jax.hub import DECODER, OFFICIAL
from kandinsky_jax.noise import Generator, TorchGenerator
from kandinsky_jax.pipelines import KandinskyV22CombinedPipeline, checks
from kandinsky_jax.terminal import run

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Kandinsky 2.2 for JAX: pictures from prompts.",
)


class Dtype(StrEnum):
    """Of the networks."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def _group() -> None:
    # With a single command, typer would otherwise drop its name from the command line.
    pass


@app.command(epilog='Example: kandinsky-jax generate "a red circle on a blue background" --model tiny -o circle.png')
def generate(
    prompt: Annotated[list[str], typer.Argument(help="What to draw; several prompts are drawn as one batch.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help='"tiny" (embedded, offline), a folder, or a Hub repository.')
    ] = f"{OFFICIAL}/{DECODER}",
    prior: Annotated[
        str | None, typer.Option(help="Folder or Hub repository of the prior; default: the one the model names.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "-n", help="What to keep away from.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the size the model was trained at.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the size the model was trained at.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the decoder.")] = 50,
    prior_steps: Annotated[int, typer.Option(help="Denoising steps of the prior.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Of the decoder; guidance is on above 1.")] = 4.0,
    prior_guidance_scale: Annotated[float, typer.Option(help="Of the prior; guidance is on above 1.")] = 4.0,
    seed: Annotated[int | None, typer.Option(help="Default: a fresh one, which is printed.")] = None,
    torch_noise: Annotated[
        bool, typer.Option("--torch-noise", help="Draw PyTorch's noise: the picture that diffusers makes of this seed.")
    ] = False,
    num_images: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the networks; default: float32 on a CPU, else bfloat16.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG, JPEG or WebP; several pictures get -0, -1, ... in their names.")
    ] = Path("kandinsky.png"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Draw pictures from a prompt."""
    images.check_writable(output)
    checks.texts(prompt, "prompt")
    number = len(prompt) * checks.count(num_images, "--num-images")
    for name, side in (("--height", height), ("--width", width)):
        if side is not None:
            checks.side(side, name)
    seed = secrets.randbits(32) if seed is None else seed
    generator: Generator = TorchGenerator(seed) if torch_noise else seed

    pipe = KandinskyV22CombinedPipeline.from_pretrained(model, prior=prior, dtype=dtype and dtype.value)
    pipe.set_progress_bar_config(disable=quiet)
    native = (pipe.unet.config.sample_size or 64) * pipe.movq.config.scale_factor
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height or native,
        "width": width or native,
        "prior_guidance_scale": prior_guidance_scale,
        "prior_num_inference_steps": prior_steps,
    }
    [pictures] = pipe(prompt, num_images_per_prompt=num_images, generator=generator, return_dict=False, **settings)
    for i, picture in enumerate(pictures):
        path = output if number == 1 else output.with_stem(f"{output.stem}-{i}")
        about = {"prompt": prompt[i // num_images], "model": model, "seed": seed, "image": i, **settings}
        images.write(path, picture, about | {"torch_noise": torch_noise})
        print(path)
    print(f"seed {seed}")


def main() -> None:
    """The entry point of the `kandinsky-jax` command."""
    run(app)


if __name__ == "__main__":
    main()
