"""Options of every command that generates pictures."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import secrets
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.checkpoint import fast_adapters, hub
from kandinsky_jax.checkpoint.hub import OFFICIAL
from kandinsky_jax.checkpoint.recommended_settings import (
    BY_OPTION,
    FALLBACK,
    RecommendedSettings,
    default_text,
)
from kandinsky_jax.common.errors import quote
from kandinsky_jax.compilation import CACHE, OFF, set_compilation_cache
from kandinsky_jax.diffusion import GUIDERS, Guider, guider_named
from kandinsky_jax.diffusion.rng import Generator, TorchGenerator
from kandinsky_jax.parallel.mesh import Mesh, make_mesh
from kandinsky_jax.pipelines import CombinedPipeline, checks
from kandinsky_jax.pipelines.guidance import Guidance
from kandinsky_jax.pipelines.modes import Mode
from kandinsky_jax.schedulers import NAMES, scheduler_named
from kandinsky_jax.schedulers.names import SUFFIXES

T = TypeVar("T")
GUIDER_HELP = (
    f"The decoder's guider: {', '.join(GUIDERS)}, with settings such as apg:eta=0,momentum=-0.5; default: cfg."
)
INTERVAL_HELP = "Guidance only in this part of the decoder's steps, such as 0.4,1; default: all."
PRIOR_GUIDER_HELP = "The prior's guider, as --guider; default: cfg."
PRIOR_INTERVAL_HELP = "Guidance only in this part of the prior's steps; default: all."
CACHE_INTERVAL_HELP = "Run the decoder's deep blocks in one of so many steps, and keep their output; default: in each."


ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help='"tiny" (embedded, offline), a folder, or a Hub repository; default: the official one.',
    ),
]
PriorName = Annotated[
    str | None, typer.Option(help="Folder or Hub repository of the prior; default: the one the model names.")
]


class Dtype(StrEnum):
    """Dtype of the networks."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every command that generates pictures."""

    model: ModelName = None
    prior: PriorName = None
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", "-n", help="What to avoid.")] = None
    height: Annotated[
        int | None, typer.Option(help="Pixels; default: that of the given picture, else the model's.")
    ] = None
    width: Annotated[int | None, typer.Option(help="Pixels; default: as for the height.")] = None
    steps: Annotated[int | None, typer.Option(help=f"Denoising steps of the decoder; {default_text('steps')}.")] = None
    prior_steps: Annotated[
        int | None, typer.Option(help=f"Denoising steps of the prior; {default_text('prior_steps')}.")
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"The decoder's solver: {', '.join(NAMES)}; some take -{', -'.join(SUFFIXES)} at the end, such as "
            "dpm++2m-karras; default: the model's own.",
        ),
    ] = None
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Use the model's fast adapter and, where nothing is said, the steps and guidance of it."
        ),
    ] = False
    guidance_scale: Annotated[
        float | None, typer.Option(help=f"Of the decoder; guidance is on above 1; {default_text('guidance_scale')}.")
    ] = None
    guider: Annotated[str | None, typer.Option(metavar="NAME", help=GUIDER_HELP)] = None
    guidance_interval: Annotated[str | None, typer.Option(metavar="FROM,TO", help=INTERVAL_HELP)] = None
    cache_interval: Annotated[int, typer.Option(help=CACHE_INTERVAL_HELP)] = 1
    prior_guidance_scale: Annotated[
        float | None,
        typer.Option(help=f"Of the prior; guidance is on above 1; {default_text('prior_guidance_scale')}."),
    ] = None
    prior_guider: Annotated[str | None, typer.Option(metavar="NAME", help=PRIOR_GUIDER_HELP)] = None
    prior_guidance_interval: Annotated[str | None, typer.Option(metavar="FROM,TO", help=PRIOR_INTERVAL_HELP)] = None
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
            metavar=f"FOLDER|URL|{OFF}",
            help=f"Cache of compiled programs; hosts share a URL's; default: ${CACHE}, else the user's folder.",
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
        checks.interval(self.interval(), max(self.steps_if_given, 1), "--guidance-interval")
        prior_steps = max(self.prior_steps_if_given, 1)
        checks.interval(self.prior_interval(), prior_steps, "--prior-guidance-interval")
        named_guider(self.guider, self.guidance_scale, "--guider")
        named_guider(self.prior_guider, self.prior_guidance_scale, "--prior-guider")
        checks.count(self.cache_interval, "--cache-interval")
        self.devices()
        if self.scheduler is not None:
            scheduler = scheduler_named(self.scheduler, {})
            if self.steps is not None:
                scheduler.steps(self.steps)

    @property
    def steps_if_given(self) -> int:
        """The decoder's steps, else a number that fits every check, before the model is found."""
        return checks.LARGEST if self.steps is None else self.steps

    @property
    def prior_steps_if_given(self) -> int:
        """The same of the prior."""
        return checks.LARGEST if self.prior_steps is None else self.prior_steps

    def completed(self, mode: Mode, guides_prior: bool = True) -> CompletedOptions:
        """Find the model, and use its recommended settings where nothing is given; first those of its fast adapter.

        Args:
            guides_prior: whether the negative prompt guides the prior too, not the decoder alone.
        Raises:
            CheckpointError: for a model that does not exist or has no fast adapter, or recommended settings that are
                not valid.
        """
        with hub.hint_for_cached_files():
            folder = hub.resolve(self.model or f"{OFFICIAL}/{mode.repository}", mode.repository)
            folders, found = hub.with_prior(folder, self.prior), dict(vars(self))
            own = fast_adapters.settings_of_model(folders, self.fast)
        for name, setting in BY_OPTION.items():
            choices = (found[name], getattr(own, setting), getattr(FALLBACK, setting))
            found[name] = next(value for value in choices if value is not None)
        found["scheduler"] = self.scheduler or own.scheduler
        completed = CompletedOptions(**found, folder=folder, mode=mode, recommended=own)
        completed.check()  # now with the steps that are run
        completed.warn_without_guidance(guides_prior)
        return completed

    def interval(self) -> list[float] | None:
        """Return the interval of guidance as numbers."""
        return numbers(self.guidance_interval, "--guidance-interval") if self.guidance_interval is not None else None

    def prior_interval(self) -> list[float] | None:
        """Return the interval of the prior's guidance as numbers."""
        given = self.prior_guidance_interval
        return numbers(given, "--prior-guidance-interval") if given is not None else None

    def devices(self) -> Mesh | None:
        """Make the mesh of the `mesh` option, None without one."""
        return mesh_of_option(self.mesh)

    def generator(self, seed: int) -> Generator:
        """Return the generator of a seed."""
        return TorchGenerator(seed) if self.torch_noise else seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletedOptions(Options):
    """Options without gaps: as given, else recommended by the model, else the usual ones."""

    folder: Path  # of the model
    mode: Mode
    recommended: RecommendedSettings

    def warn_without_guidance(self, guides_prior: bool) -> None:
        """Warn of what is given and has no effect without guidance, as fast models run."""
        own = Guidance(named_guider(self.guider, self.guidance_scale, "--guider"))
        prior = Guidance(named_guider(self.prior_guider, self.prior_guidance_scale, "--prior-guider"))
        unused = []
        if self.negative_prompt and not own.uses_uncond and not (prior.uses_uncond and guides_prior):
            unused.append("--negative-prompt")
        if self.guidance_interval is not None and not own.is_on:
            unused.append("--guidance-interval")
        if self.guider is not None and not own.is_on:
            unused.append("--guider")
        if unused:
            warnings.warn(
                f"{' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect without guidance: "
                f"{'leave --fast out, or ' * self.fast}give --guidance-scale above 1, it is {self.guidance_scale:g}",
                stacklevel=3,
            )
        if self.fast and (own.is_on or prior.is_on):
            warnings.warn(
                "the fast adapter has been distilled for no guidance and may give noise with it: leave --fast out, or "
                "the guiders and scales of guidance",
                stacklevel=3,
            )

    def generate(self, call: Callable[[CombinedPipeline, Generator], T]) -> tuple[int, T]:
        """Load a pipeline while compiling for `call`, and return the seed and the result of the call."""
        if self.compilation_cache is not None:
            set_compilation_cache(None if self.compilation_cache == OFF else self.compilation_cache)
        seed = secrets.randbits(32) if self.seed is None else self.seed

        def run_call(pipe: CombinedPipeline) -> T:
            if self.scheduler is not None:
                pipe.scheduler = scheduler_named(self.scheduler, pipe.scheduler.config)
            return call(pipe, self.generator(seed))

        pipe = self.mode.combined_class.from_pretrained(
            self.folder, prior=self.prior, dtype=self.dtype and self.dtype.value, warmup=run_call, mesh=self.devices()
        )
        pipe.set_progress_bar_config(disable=self.quiet)
        if self.fast:  # only weights change, so what was compiled serves
            pipe.load_fast()
        return seed, run_call(pipe)

    def size(self, pipe: CombinedPipeline, picture: Image.Image | None) -> dict[str, int]:
        """Return the size to generate: as given, else that of the given picture, else the model's."""
        native = pipe.decoder_pipe.native_side
        if picture is None:
            height, width = self.recommended.height or native, self.recommended.width or native
        else:
            height, width = images.fitting_size(picture, native)
        return {"height": self.height or height, "width": self.width or width}

    def decoder_settings(self) -> dict[str, Any]:
        """Return the arguments of a decoder."""
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "guider": self.guider,
            "guidance_interval": self.interval(),
            "cache_interval": self.cache_interval,
        }

    def prior_settings(self) -> dict[str, Any]:
        """Return the arguments of a prior."""
        return {
            "num_inference_steps": self.prior_steps,
            "guidance_scale": self.prior_guidance_scale,
            "guider": self.prior_guider,
            "guidance_interval": self.prior_interval(),
        }


def takes_options(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command that also takes `Options`, passed on as its argument `options`."""
    own = inspect.signature(function).parameters
    hints = get_type_hints(function, include_extras=True) | get_type_hints(Options, include_extras=True)
    shared = dataclasses.fields(Options)

    @functools.wraps(function)
    def whole(**given: Any) -> None:
        options = Options(**{field.name: given.pop(field.name) for field in shared})
        options.check()
        function(**given, options=options)

    parameters = [parameter.replace(annotation=hints[name]) for name, parameter in own.items() if name != "options"]
    parameters += [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in shared
    ]
    whole.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    whole.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return whole


Prompt = Annotated[list[str], typer.Argument(help="What to generate; several prompts are run as one batch.")]
ImagePaths = Annotated[
    list[Path], typer.Option("--image", "-i", help="A picture to start from; one for all prompts, or one for each.")
]
Strength = Annotated[float, typer.Option(help="How far to depart from the picture, above 0, at most 1.")]


def named_guider(text: str | None, scale: float | None, name: str) -> Guider:
    """Return a guider by its name, None for classifier-free guidance; ValueError names the option."""
    try:
        return guider_named("cfg" if text is None else text, scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def mesh_of_option(text: str | None) -> Mesh | None:
    """Make the mesh that `--mesh` describes, None without it; ValueError for what is none."""
    if text is None:
        return None
    parts = numbers(text, "--mesh")
    if len(parts) != 3 or any(part != int(part) for part in parts):
        raise ValueError(f"--mesh must be three whole numbers with commas between, such as 1,2,4, got {quote(text)}")
    data, guidance, rows = map(int, parts)
    return make_mesh(data, guidance, rows)


def numbers(text: str, name: str) -> list[float]:
    """Read the numbers of an option, with commas between; ValueError names the option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between, got {quote(text)}") from None
