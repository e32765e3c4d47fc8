"""The command line, `kandinsky-jax`: one command per mode."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import os
import secrets
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.cli.batch import EXAMPLE as BATCH_EXAMPLE
from kandinsky_jax.cli.batch import batch
from kandinsky_jax.cli.train import EXAMPLE as TRAIN_EXAMPLE
from kandinsky_jax.cli.train import train
from kandinsky_jax.cli.verify import EXAMPLE as VERIFY_EXAMPLE
from kandinsky_jax.cli.verify import verify
from kandinsky_jax.compilation import CACHE, OFF, set_compilation_cache
from kandinsky_jax.errors import quote
from kandinsky_jax.hub import CONTROLNET, DECODER, INPAINT, OFFICIAL
from kandinsky_jax.noise import Generator, TorchGenerator
from kandinsky_jax.pipelines import (
    CombinedPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22ControlnetImg2ImgCombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    checks,
)
from kandinsky_jax.schedulers import NAMES, scheduler_named
from kandinsky_jax.schedulers.names import SUFFIXES
from kandinsky_jax.sharding import Mesh, make_mesh
from kandinsky_jax.terminal import run

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Kandinsky 2.2 for JAX: generate pictures from prompts, pictures, masks and depth maps.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print("\n".join(f"{name} {importlib.metadata.version(name)}" for name in ("kandinsky_jax", "jax", "flax")))
        raise typer.Exit()


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the versions, and exit.")
    ] = False,
) -> None:
    """Handle options before a command's name."""


class Dtype(StrEnum):
    """Dtype of the networks."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every command that generates pictures."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help='"tiny" (embedded, offline), a folder, or a Hub repository; default: the official one.',
        ),
    ] = None
    prior: Annotated[
        str | None, typer.Option(help="Folder or Hub repository of the prior; default: the one the model names.")
    ] = None
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", "-n", help="What to avoid.")] = None
    height: Annotated[
        int | None, typer.Option(help="Pixels; default: that of the given picture, else the model's.")
    ] = None
    width: Annotated[int | None, typer.Option(help="Pixels; default: as for the height.")] = None
    steps: Annotated[int, typer.Option(help="Denoising steps of the decoder.")] = 50
    prior_steps: Annotated[int, typer.Option(help="Denoising steps of the prior.")] = 25
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"The decoder's solver: {', '.join(NAMES)}; some take -{', -'.join(SUFFIXES)} at the end, such as "
            "dpm++2m-karras; default: the model's own.",
        ),
    ] = None
    guidance_scale: Annotated[float, typer.Option(help="Of the decoder; guidance is on above 1.")] = 4.0
    guidance_interval: Annotated[
        str | None,
        typer.Option(help="Guidance only in this part of the decoder's steps, such as 0.4,1; default: all."),
    ] = None
    prior_guidance_scale: Annotated[float, typer.Option(help="Of the prior; guidance is on above 1.")] = 4.0
    seed: Annotated[int | None, typer.Option(help="Default: a fresh one, which is printed.")] = None
    torch_noise: Annotated[
        bool,
        typer.Option("--torch-noise", help="Use PyTorch's noise: the picture that diffusers generates with this seed."),
    ] = False
    num_images: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1
    dtype: Annotated[Dtype | None, typer.Option(help="Of the networks; default: float32 on a CPU, else bfloat16.")] = (
        None
    )
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="DATA,GUIDANCE,ROWS",
            help="Sharding over devices: of the batch, of guidance (1 or 2), of a picture's rows; 1,2,4 generates one "
            "picture on eight devices. Default: the batch over all devices.",
        ),
    ] = None
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG, JPEG or WebP; several pictures get -0, -1, ... in their names.")
    ] = Path("kandinsky.png")
    compilation_cache: Annotated[
        str | None,
        typer.Option(
            metavar=f"FOLDER|{OFF}",
            help=f"Cache of compiled programs; default: ${CACHE}, else in the user's cache folder.",
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False

    def check(self) -> None:
        """Check the options before a model is loaded."""
        images.check_writable(self.output)
        checks.count(self.num_images, "--num-images")
        for name, side in (("--height", self.height), ("--width", self.width)):
            if side is not None:
                checks.side(side, name)
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed={self.seed} is not a seed; needed is an integer from 0 to 2**63 - 1")
        checks.interval(self.interval(), max(self.steps, 1), "--guidance-interval")
        self.devices()
        if self.scheduler is not None:
            scheduler_named(self.scheduler, {}).steps(self.steps)

    def generate(self, cls: type[CombinedPipeline], repository: str, call: Callable[[Any, Generator], Any]) -> Any:
        """Load a pipeline while compiling for `call`, and return the seed and the result of the call."""
        if self.compilation_cache is not None:
            set_compilation_cache(None if self.compilation_cache == OFF else self.compilation_cache)
        seed = secrets.randbits(32) if self.seed is None else self.seed

        def run_call(pipe: CombinedPipeline) -> Any:
            if self.scheduler is not None:
                pipe.scheduler = scheduler_named(self.scheduler, pipe.scheduler.config)
            return call(pipe, self.generator(seed))

        pipe = cls.from_pretrained(
            self.model or f"{OFFICIAL}/{repository}",
            prior=self.prior,
            dtype=self.dtype and self.dtype.value,
            warmup=run_call,
            mesh=self.devices(),
        )
        pipe.set_progress_bar_config(disable=self.quiet)
        return seed, run_call(pipe)

    def size(self, pipe: CombinedPipeline, picture: Image.Image | None) -> dict[str, int]:
        """Return the size to generate: as given, else that of the given picture, else the model's."""
        native = (pipe.unet.config.sample_size or 64) * pipe.movq.config.scale_factor
        height, width = (native, native) if picture is None else images.fitting_size(picture, native)
        return {"height": self.height or height, "width": self.width or width}

    def interval(self) -> list[float] | None:
        """Return the interval of guidance as numbers."""
        return _numbers(self.guidance_interval, "--guidance-interval") if self.guidance_interval is not None else None

    def devices(self) -> Mesh | None:
        """Make the mesh of the `mesh` option, None without one."""
        if self.mesh is None:
            return None
        parts = _numbers(self.mesh, "--mesh")
        if len(parts) != 3 or any(part != int(part) for part in parts):
            raise ValueError(
                f"--mesh must be three whole numbers with commas between, such as 1,2,4, got {quote(self.mesh)}"
            )
        data, guidance, rows = map(int, parts)
        return make_mesh(data, guidance, rows)

    def generator(self, seed: int) -> Generator:
        """Return the generator of a seed."""
        return TorchGenerator(seed) if self.torch_noise else seed

    def prior_settings(self) -> dict[str, Any]:
        """Return the arguments of a prior."""
        return {"num_inference_steps": self.prior_steps, "guidance_scale": self.prior_guidance_scale}


def command(example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command that also takes `Options`, passed as its argument `options`."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function).parameters
        hints = get_type_hints(function, include_extras=True) | get_type_hints(Options, include_extras=True)
        shared = [field.name for field in dataclasses.fields(Options)]

        @functools.wraps(function)
        def whole(**given: Any) -> None:
            options = Options(**{name: given.pop(name) for name in shared})
            options.check()
            function(**given, options=options)

        parameters = [parameter.replace(annotation=hints[name]) for name, parameter in own.items() if name != "options"]
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in dataclasses.fields(Options)
        ]
        whole.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        whole.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(epilog=f"Example: kandinsky-jax {example} --model tiny")(whole)
        return function

    return add


Prompt = Annotated[list[str], typer.Argument(help="What to generate; several prompts are run as one batch.")]
ImagePaths = Annotated[
    list[Path], typer.Option("--image", "-i", help="A picture to start from; one for all prompts, or one for each.")
]
Strength = Annotated[float, typer.Option(help="How far to depart from the picture, above 0, at most 1.")]


@command('generate "purple heart" -o heart.png')
def generate(prompt: Prompt, options: Options) -> None:
    """Generate pictures from a prompt."""
    _generate(prompt, options, KandinskyV22CombinedPipeline, DECODER, {})


@command('img2img "green heart" --image heart.png --strength 0.6 -o green.png')
def img2img(prompt: Prompt, image: ImagePaths, options: Options, strength: Strength = 0.3) -> None:
    """Generate variations of pictures, guided by a prompt."""
    checks.strength(strength, options.steps)
    _generate(prompt, options, KandinskyV22Img2ImgCombinedPipeline, DECODER, {"image": image}, strength=strength)


@command('inpaint "smiling face with sunglasses" --image face.png --mask mask.png -o cool.png')
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
    _generate(prompt, options, KandinskyV22InpaintCombinedPipeline, INPAINT, files, paste_back=paste_back)


@command('controlnet "soccer ball" --hint depth.png -o ball.png')
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
        _generate(prompt, options, KandinskyV22ControlnetCombinedPipeline, CONTROLNET, {"hint": hint})
        return
    checks.strength(strength, options.steps)
    files = {"image": image, "hint": hint}
    _generate(prompt, options, KandinskyV22ControlnetImg2ImgCombinedPipeline, CONTROLNET, files, strength=strength)


@command('mix "dog face" cat.png --weights 0.6,0.4 -o mix.png')
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
    numbers = [1 / len(items)] * len(items) if weights is None else _numbers(weights, "--weights")
    checks.interpolation(mixed, numbers)

    def embed(pipe: Any, generator: Generator) -> Any:
        return pipe.prior_pipe.interpolate(
            mixed,
            numbers,
            num_images_per_prompt=options.num_images,
            negative_prompt=options.negative_prompt or "",
            generator=generator,
            **options.prior_settings(),
        )

    _generate_from_embeds(embed, options, [{"items": items, "weights": numbers}] * options.num_images)


@command('vary "blue heart" --image heart.png --strength 0.5 -o varied.png')
def vary(prompt: Prompt, image: ImagePaths, options: Options, strength: Strength = 0.3) -> None:
    """Generate variations of a picture by moving its image embedding towards a prompt."""
    checks.strength(strength, options.prior_steps)
    pictures = _read(prompt, options, {"image": image})["image"]

    def embed(pipe: Any, generator: Generator) -> Any:
        return KandinskyV22PriorEmb2EmbPipeline.from_pipe(pipe)(
            prompt,
            pictures,
            strength=strength,
            negative_prompt=options.negative_prompt,
            num_images_per_prompt=options.num_images,
            generator=generator,
            **options.prior_settings(),
        )

    facts = {"strength": strength, "files": _names({"image": image})}
    _generate_from_embeds(
        embed, options, [{"prompt": text} | facts for text in prompt for _ in range(options.num_images)]
    )


app.command(epilog=BATCH_EXAMPLE)(batch)
app.command(epilog=TRAIN_EXAMPLE)(train)
app.command(epilog=VERIFY_EXAMPLE)(verify)


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between, got {quote(text)}") from None


def _read(prompt: Sequence[str], options: Options, files: dict[str, list[Path]]) -> dict[str, list[Image.Image]]:
    """Read the pictures of a command, before a model is loaded."""
    checks.texts(prompt, "prompt")
    for name, paths in files.items():
        checks.picture_count(len(paths), name, len(prompt), options.num_images)
    return {name: [images.read(path, name) for path in paths] for name, paths in files.items()}


def _names(files: dict[str, list[Path]]) -> dict[str, list[str]]:
    return {name: [str(path) for path in paths] for name, paths in files.items()}


def _generate(
    prompt: list[str],
    options: Options,
    cls: type[CombinedPipeline],
    repository: str,
    files: dict[str, list[Path]],
    **settings: Any,
) -> None:
    """Load, generate and write, for commands that are one call of a combined pipeline."""
    pictures, repeats = _read(prompt, options, files), options.num_images
    first = next(iter(pictures.values()))[0] if pictures else None
    settings |= {
        "negative_prompt": options.negative_prompt,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "guidance_interval": options.interval(),
        "prior_guidance_scale": options.prior_guidance_scale,
        "prior_num_inference_steps": options.prior_steps,
    }

    def call(pipe: Any, generator: Generator) -> Any:
        settings.update(options.size(pipe, first))
        return pipe(prompt, num_images_per_prompt=repeats, generator=generator, **pictures, **settings).images

    seed, generated = options.generate(cls, repository, call)
    facts = settings | ({"files": _names(files)} if files else {})
    _write(generated, options, seed, [{"prompt": text, **facts} for text in prompt for _ in range(repeats)])


def _generate_from_embeds(
    embed: Callable[[Any, Generator], Any], options: Options, about: Sequence[dict[str, Any]]
) -> None:
    """Load, generate and write, for commands that compute image embeddings in their own way."""
    settings: dict[str, Any] = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "guidance_interval": options.interval(),
    }

    def call(pipe: Any, generator: Generator) -> Any:
        settings.update(options.size(pipe, None))
        return pipe.decoder_pipe(**embed(pipe, generator), generator=generator, **settings).images

    seed, generated = options.generate(KandinskyV22CombinedPipeline, DECODER, call)
    shared = {"negative_prompt": options.negative_prompt, "prior": options.prior_settings(), **settings}
    _write(generated, options, seed, [facts | shared for facts in about])


def _write(pictures: Sequence[Image.Image], options: Options, seed: int, about: Sequence[dict[str, Any]]) -> None:
    """Write the pictures with the settings that reproduce them."""
    for i, (picture, facts) in enumerate(zip(pictures, about, strict=True)):
        path = options.output
        path = path if len(pictures) == 1 else path.with_stem(f"{path.stem}-{i}")
        run = {"model": options.model, "seed": seed, "image": i, "torch_noise": options.torch_noise}
        run["scheduler"] = options.scheduler
        images.write(path, picture, facts | run)
        print(path)
    print(f"seed {seed}")


def main() -> None:
    """Run the `kandinsky-jax` command."""
    # Only the tokenizer of transformers is used, which otherwise warns on every run that PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    run(app)
