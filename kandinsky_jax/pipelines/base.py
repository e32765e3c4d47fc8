"""Base of all pipelines: components, progress bars, and the denoising loop with callbacks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeVar

import jax
import numpy as np
from flax import nnx
from PIL import Image
from tqdm.auto import tqdm

from kandinsky_jax.checkpoint import (
    CheckpointError,
    LazyNetwork,
    move_network,
    recommended_settings,
)
from kandinsky_jax.checkpoint.recommended_settings import NO_SETTINGS, RecommendedSettings
from kandinsky_jax.common.arrays import to_numpy
from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.compilation import compiling_ahead, use_compilation_cache
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.diffusion.rng import Source
from kandinsky_jax.parallel.mesh import Mesh
from kandinsky_jax.parallel.sharding import Rules
from kandinsky_jax.pipelines import checks
from kandinsky_jax.pipelines.compatibility import DiffusionPipeline
from kandinsky_jax.pipelines.components import as_component
from kandinsky_jax.pipelines.denoising import Conditioning, LoopInputs, denoise_batches
from kandinsky_jax.pipelines.fast import remember_folder
from kandinsky_jax.pipelines.guidance import Guidance
from kandinsky_jax.pipelines.loading import PretrainedMixin, component_names
from kandinsky_jax.pipelines.loading_arguments import without_diffusers_arguments
from kandinsky_jax.pipelines.options import Callback
from kandinsky_jax.pipelines.quantization import Quantizer
from kandinsky_jax.schedulers import Schedule

ConditioningT = TypeVar("ConditioningT", bound=Conditioning)


class LazyComponent:
    """Descriptor of a component that loads a `LazyNetwork` on first access."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, pipe: object, owner: type | None = None) -> Any:
        part = self if pipe is None else vars(pipe)[self._name]
        return part.load() if isinstance(part, LazyNetwork) else part

    def __set__(self, pipe: object, part: object) -> None:
        vars(pipe)[self._name] = part


class Pipeline(Quantizer, PretrainedMixin, DiffusionPipeline):
    """Base of the pipelines.

    The constructor of a subclass takes components by diffusers' names and passes them to `_register`.
    """

    REPOSITORY: ClassVar[str]  # name of the official repository, and of the subfolder of a model family
    PREFIX: ClassVar[str] = ""  # of its components' names within a combined pipeline
    STAGE: ClassVar[str] = ""  # label of the progress bar
    _recommended: RecommendedSettings | CheckpointError = NO_SETTINGS  # of a decoder's or a prior's folder

    def _register(self, **components: object) -> None:
        use_compilation_cache()
        for name, component in components.items():
            setattr(self, name, component)
        self._component_names = tuple(components)
        self._progress_bar_config: dict[str, object] = {}
        self._call_state: dict[str, Any] = {}  # of the current or last call

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; a value that is not valid for a component is refused at once, see `as_component`."""
        super().__setattr__(name, as_component(self, name, value) if name in self._component_slots() else value)

    @classmethod
    @functools.cache
    def _component_slots(cls) -> tuple[str, ...]:
        return component_names(cls)

    @property
    def components(self) -> dict[str, Any]:
        """Components by the constructor's names; lazy ones are loaded."""
        return {name: getattr(self, name) for name in self._component_names}

    @classmethod
    def _load(cls, *arguments: Any) -> Self:
        stores, *_ = arguments
        pipe = super()._load(*arguments)
        pipe._name_or_path = str(stores[-1].folder)
        for store in stores:
            stage: Any = pipe._stages()[-1 if store.prefix else 0]
            try:
                stage._recommended = recommended_settings.read(store.folder)
            except CheckpointError as error:  # which is the business of those who ask for the settings
                stage._recommended = error
        held = pipe._held()
        for store in stores:
            for name in store.folders:
                remember_folder(held[name], store.folder, name.removeprefix(store.prefix))
        return pipe

    @property
    def recommended_settings(self) -> RecommendedSettings:
        """Settings that the model's folder recommends; the pipeline itself keeps diffusers' defaults.

        `pipe(prompt, **pipe.recommended_settings.arguments())` uses them. In a combined pipeline those of the decoder,
        and for the prior first its own.

        Raises:
            CheckpointError: where the folder's file is not valid.
        """
        found = NO_SETTINGS
        for i, stage in enumerate(self._stages()):
            if isinstance(stage._recommended, CheckpointError):
                raise stage._recommended
            found = found.with_prior(stage._recommended) if i else stage._recommended
        return found

    def _held(self) -> dict[str, Any]:
        """Return the components without loading lazy ones."""
        return {name: vars(self)[name] for name in self._component_names}

    @classmethod
    def from_pipe(cls, *pipes: Pipeline, **components: object) -> Self:
        """Build another pipeline from the same components; nothing is loaded and no array is copied.

        Args:
            pipes: one or more, such as a decoder and a prior for a combined pipeline; where two have a component of the
                same name, the last one takes precedence.
            components: by the constructor's names; they take precedence over the pipes'. `dtype` or `torch_dtype`
                converts all networks in place, as in diffusers.
        Raises:
            TypeError: for a component that is missing or unknown.
            CheckpointError: for a UNet of another mode.
        """
        check_pipelines(f"{cls.__name__}.from_pipe", pipes)
        names = component_names(cls)
        components = without_diffusers_arguments(components, f"{cls.__name__}.from_pipe")
        dtypes = [x for name in ("dtype", "torch_dtype") if (x := components.pop(name, None)) is not None]
        if len(dtypes) > 1:
            raise TypeError("dtype and torch_dtype are two names of one argument: give one of them")
        if unknown := components.keys() - set(names):
            raise TypeError(f"{cls.__name__} has no component {shorten(sorted(unknown))}; it has {list(names)}")
        found = {pipe.PREFIX + name: part for pipe in pipes for name, part in pipe._held().items()}
        ready = {name: found[cls.PREFIX + name] for name in names if cls.PREFIX + name in found} | components
        if missing := [name for name in names if name not in ready]:
            given = " and ".join(type(pipe).__name__ for pipe in pipes) or "nothing"
            raise TypeError(
                f"{cls.__name__} needs {', '.join(missing)}, which {given} does not have; name them, or give another "
                f"pipeline that has them: {cls.__name__}.from_pipe(pipe, other_pipe)"
            )
        new = cls(**ready)
        if pipes:
            new.set_progress_bar_config(**pipes[0]._progress_bar_config)
            new._name_or_path = pipes[0]._name_or_path
            new._keep_settings(pipes)
        return new.to(*dtypes) if dtypes else new

    # Compiling ahead ----------------------------------------------------------------------------------------------

    def warmup(self, height: int = 512, width: int = 512, batch: int = 1, **arguments: object) -> None:
        """Compile the programs of a call in threads, without running them; the call then compiles nothing.

        Args:
            height, width: of the pictures, in pixels; ignored by a prior.
            batch: number of prompts of the call, or for a decoder of image embeddings.
            arguments: further arguments of the call, where they select other programs: `num_images_per_prompt`,
                `guidance_scale` and `prior_guidance_scale` (1 turns guidance off), a `TorchGenerator` as `generator`,
                `output_type="latent"`, a callback.
        """
        picture = Image.new("RGB", (64, 64))
        defaults: dict[str, object] = {"height": height, "width": width, "generator": 0, "prompt": [""] * batch}
        defaults |= {"image": picture, "mask_image": Image.linear_gradient("L"), "hint": picture.convert("L")}
        defaults |= self._stand_ins(batch)
        # A second pipeline of the same components: pipelines cache results, and here these are zeros.
        twin: Any = type(self)(**self._held())
        twin.set_progress_bar_config(disable=True)
        twin._keep_settings([self])
        call = {name: value for name, value in defaults.items() if name in inspect.signature(twin.__call__).parameters}
        with compiling_ahead(lambda: twin(**call | arguments)):
            pass

    def _stand_ins(self, batch: int) -> dict[str, object]:
        """Return placeholder arguments for `warmup` that depend on the components."""
        return {}

    # Devices ------------------------------------------------------------------------------------------------------

    def shard(self, mesh: Mesh | None, shard_rules: Rules = ()) -> None:
        """Move the networks, which other pipelines may share, to a mesh or to JAX's default device.

        Args:
            mesh: see `kandinsky_jax.make_mesh`.
            shard_rules: see `from_pretrained`.
        """
        for part in self._held().values():
            if isinstance(part, LazyNetwork):
                part.move(mesh, shard_rules)
            elif isinstance(part, nnx.Module):
                move_network(part, mesh, shard_rules)

    # Progress -----------------------------------------------------------------------------------------------------

    def set_progress_bar_config(self, **config: object) -> None:
        """Arguments of `tqdm` for the progress bars; `disable=True` turns them off."""
        self._progress_bar_config = config

    # Sampling -----------------------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """Scale of the guider of the current or last call.

        A `callback_on_step_end` may set it (`pipe.guidance_scale = 2.0`) for the following steps; values up to 1 turn
        classifier-free guidance off. `_guidance_scale`, as in diffusers, is an alias.
        """
        return _of_a_call(self, "guidance").scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        scale = checks.guidance(value)
        self._call_state["guidance"] = _of_a_call(self, "guidance").with_scale(scale)

    _guidance_scale = guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether unconditional predictions are evaluated in the next step of the current call, or were in the last one
        of the last call."""
        return _of_a_call(self, "guidance").uses_uncond

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call."""
        return _of_a_call(self, "num_timesteps")

    def _denoise(
        self,
        module: nnx.Module,
        conditioning: ConditioningT,
        schedule: Schedule,
        latents: Sequence[jax.Array],
        source: Source,
        guidance: Guidance,
        callback: Callback | None,
        callback_inputs: Sequence[str],
        guidance_interval: tuple[int, int] | None = None,
        cache_interval: int = 1,
    ) -> tuple[list[jax.Array], ConditioningT]:
        """Run the loop under a progress bar, with the user's callback after each step.

        Args:
            latents: each batch's first sample.
            guidance: at the first step; a callback may change its scale.
            guidance_interval, cache_interval: see `denoise_batches`.
        Returns:
            each batch's last sample, and the conditioning as callbacks have left it.
        """
        network, params = Network.split(module)
        weak = None if guidance.weak is None else Network.split(guidance.weak)
        guided = guidance.uses_uncond
        inputs, given = _loop_inputs(conditioning, network, params, guided, weak), conditioning
        state: dict[str, Any] = {"guidance": guidance, "num_timesteps": len(schedule)}
        self._call_state = state
        original = {} if callback is None else conditioning.callback_tensors(guided)
        tensors, guided_at_first = dict(original), guided

        def call_back(done: int, samples: list[jax.Array]) -> list[jax.Array] | None:
            nonlocal inputs, guidance, guided, given
            seen = tensors | {"latents": _join(samples)}
            requested = {name: seen[name] for name in callback_inputs}
            assert callback is not None
            self._call_state = state  # a call in another thread may have replaced it
            returned = callback(self, done - 1, schedule.timesteps[done - 1].item(), requested)
            if not isinstance(returned, dict):
                raise TypeError(
                    f"callback_on_step_end must return a dict, returned {type(returned).__name__}; return its fourth "
                    "argument, or {}"
                )
            changed = {k: to_numpy(v, k) for k, v in returned.items() if k in seen and v is not seen[k]}
            new = {k: v for k, v in changed.items() if k != "latents"}
            before, guidance = guided, state["guidance"]
            guided = guidance.uses_uncond
            if new or before != guided:
                tensors.update(new)
                changes = {k: v for k, v in tensors.items() if v is not original[k]}
                given = conditioning.with_callback_tensors(changes, guided_at_first)
                inputs = _loop_inputs(given, network, params, guided, weak)
            return _part(changed["latents"], samples) if "latents" in changed else None

        with tqdm(**({"total": len(schedule), "desc": self.STAGE} | self._progress_bar_config)) as bar:

            def after(done: int, samples: list[jax.Array]) -> list[jax.Array] | None:
                bar.update(done - bar.n)
                return call_back(done, samples) if callback is not None else None

            last = denoise_batches(
                network,
                params,
                lambda: (inputs, guidance.guider if guidance.is_on else None),
                schedule,
                latents,
                source,
                weak=weak,
                interval=guidance_interval,
                cache_interval=cache_interval,
                after=after,
                every_step=callback is not None,
            )
        return last, given


def _loop_inputs(
    conditioning: Conditioning, network: Network, params: Params, guided: bool, weak: tuple[Network, Params] | None
) -> list[LoopInputs]:
    """Compute the inputs of each batch, and what the weak model of autoguidance takes."""
    inputs = list(conditioning.loop_inputs(network, params, guided))
    if weak is None:
        return inputs
    others = conditioning.loop_inputs(*weak, False)
    return [one._replace(weak=other.cond) for one, other in zip(inputs, others, strict=True)]


def is_guided(scale: float) -> bool:
    """Whether classifier-free guidance is on at a scale; 1 would be the conditional prediction alone."""
    return scale > 1


def _of_a_call(pipe: Pipeline, name: str) -> Any:
    if name not in pipe._call_state:
        raise AttributeError(f"{type(pipe).__name__}.{name} is available after the pipeline has been called")
    return pipe._call_state[name]


def _join(samples: Sequence[jax.Array]) -> np.ndarray:
    """Concatenate the samples of all batches as callbacks see them, in PyTorch's order of axes."""
    joined = np.concatenate([np.asarray(x) for x in samples])
    return joined.transpose(0, 3, 1, 2) if joined.ndim == 4 else joined


def _part(latents: object, samples: Sequence[jax.Array]) -> list[jax.Array]:
    """Split the latents that a callback returned into the samples of all batches."""
    array = np.asarray(latents, np.float32)
    if array.shape != _join(samples).shape:
        raise ValueError(f"the callback's latents have shape {array.shape}, needed is {_join(samples).shape}")
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    return [jax.numpy.asarray(part) for part in np.split(array, len(samples))]


def check_pipelines(function: str, pipes: Sequence[Pipeline]) -> None:
    """Raise TypeError for arguments that are not pipelines of this package."""
    for pipe in pipes:
        if not isinstance(pipe, Pipeline):
            raise TypeError(
                f"{function} takes pipelines of kandinsky_jax, such as from_pretrained gives, got {quote(pipe, 80)}"
            )
