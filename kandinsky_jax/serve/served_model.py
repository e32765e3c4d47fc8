"""The pipelines that a server runs: one network of each kind, and what its requests may ask for."""

from __future__ import annotations

import dataclasses
import os
import secrets
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from kandinsky_jax import images
from kandinsky_jax.checkpoint import CheckpointError, hub, lora_files
from kandinsky_jax.checkpoint.recommended_settings import FALLBACK, MAX_SCALE, NO_SETTINGS, RecommendedSettings
from kandinsky_jax.common.errors import quote, shorten
from kandinsky_jax.compilation import use_compilation_cache
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.parallel.mesh import Mesh
from kandinsky_jax.pipelines import CombinedPipeline, KandinskyV22PriorEmb2EmbPipeline, checks
from kandinsky_jax.pipelines.base import check_pipelines
from kandinsky_jax.pipelines.modes import MODES, modes_of, repository_of
from kandinsky_jax.pipelines.options import StrengthOption
from kandinsky_jax.schedulers import NAMES, SchedulerError, scheduler_named
from kandinsky_jax.schedulers.names import SUFFIXES
from kandinsky_jax.serve.requests import MIX, VARY, ImageRequest, RequestError
from kandinsky_jax.serve.server_settings import ServerSettings, Size

DEFAULT_STRENGTH = StrengthOption.strength  # the pipelines'
INDEX = "model_index.json"
LORA_FILES = (".safetensors", ".bin")
MOST_CHARACTERS = 10_000  # of a prompt, of which CLIP reads 77 tokens
MOST_DECODERS = 64  # that are kept, one for each mode and scheduler


class ServedModel:
    """A family of pipelines that share their prior and MoVQ.

    Args:
        pipes: combined pipelines, one for each UNet; the first one is the default.
        name: of the model, as requests and records call it.
        lora_folder: whose files requests may use by their names; None for none.
        modes: to be served; None for all that the pipelines have.
    Attributes:
        modes: that are served.
    """

    def __init__(
        self,
        pipes: Sequence[CombinedPipeline],
        name: str,
        lora_folder: Path | None = None,
        modes: Sequence[str] | None = None,
    ):
        check_pipelines("serve", pipes)
        if not pipes:
            raise ValueError("there is no pipeline to serve; give one such as KandinskyV22CombinedPipeline")
        for pipe in pipes:
            if not isinstance(pipe, CombinedPipeline):
                raise TypeError(
                    f"a {type(pipe).__name__} has no prior or no decoder; serve a combined pipeline, which "
                    "KandinskyV22CombinedPipeline.from_pipe(decoder, prior) makes"
                )
        self.name = name
        self.by_repository: dict[str, CombinedPipeline] = {}
        for pipe in pipes:
            if self.by_repository.setdefault(pipe.REPOSITORY, pipe) is not pipe:
                raise ValueError(f"there are two pipelines with the UNet of {pipe.REPOSITORY}; give one of each kind")
        first = next(iter(self.by_repository.values()))
        for repository, pipe in self.by_repository.items():
            if pipe.prior_prior is not first.prior_prior:
                raise ValueError(
                    f"the pipelines must share one prior, but that of {repository} is another network than the first "
                    "pipeline's: make the others by from_pipe"
                )
        own = [mode.name for repository in self.by_repository for mode in modes_of(repository)]
        own += [MIX, VARY] if hub.DECODER in self.by_repository else []
        if lacking := [mode for mode in modes or () if mode not in own]:
            raise ValueError(f"there is no pipeline for {', '.join(lacking)}; those given are for {', '.join(own)}")
        self.modes = tuple(mode for mode in own if modes is None or mode in modes)
        self.lora_files = find_loras(lora_folder)
        self._pipes: dict[str, CombinedPipeline] = {}
        self._decoders: dict[tuple[str, str], Any] = {}
        self._networks: dict[int, tuple[Network, Params]] = {}
        self.lock = threading.RLock()  # of the networks' weights
        self._vary_prior: KandinskyV22PriorEmb2EmbPipeline | None = None

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        prior: str | os.PathLike[str] | None = None,
        modes: Sequence[str] | None = None,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        lora_folder: Path | None = None,
    ) -> ServedModel:
        """Load the networks of the modes.

        Args:
            model: "tiny", a folder of a model or a family of them, a Hub repository; None is the official one.
            prior: folder or repository of the prior, None for the one that the model names.
            modes: to be served, and no others; None is all whose UNet the model has, and for official weights those of
                the decoder.
            dtype, mesh: see `Pipeline.from_pretrained`.
            lora_folder: see the class.
        Raises:
            CheckpointError: where the model, or the UNet of a mode, is not there or damaged.
            ValueError: for an unknown mode.
        """
        use_compilation_cache()
        name = "kandinsky-2-2" if model is None else str(model)
        if model is not None and os.path.isdir(model):
            name = Path(model).resolve().name  # clients need not know where it is
        repositories = _repositories(modes)
        if repositories is None:
            repositories = [hub.DECODER] if model is None else _members(model)  # the official ones are 5 GB each
        found: list[CombinedPipeline] = []
        for repository in repositories:
            source = model if model is not None else f"{hub.OFFICIAL}/{repository}"
            shared = _shared_components(found[0]) if found else {"prior": prior}
            cls_ = modes_of(repository)[0].combined_class
            found.append(cls_.from_pretrained(source, dtype=dtype, mesh=mesh, **shared))
        for pipe in found:
            pipe.set_progress_bar_config(disable=True)
        return cls(found, name, lora_folder, modes)

    # What there is ------------------------------------------------------------------------------------------------

    @property
    def schedulers(self) -> tuple[str, ...]:
        """Short names of schedulers; some take a suffix."""
        return tuple(NAMES)

    @property
    def scheduler_suffixes(self) -> tuple[str, ...]:
        """What may follow a scheduler's short name, after a hyphen."""
        return tuple(SUFFIXES)

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of the LoRA files that requests may use."""
        return tuple(self.lora_files)

    def has_fast(self, mode: str) -> bool:
        """Whether a mode's model has a fast adapter."""
        return self.pipe(mode).has_fast_adapter

    def pipe(self, mode: str) -> Any:
        """Return the combined pipeline of a mode; "mix" and "vary" are the first mode's of the decoder."""
        if mode not in self._pipes:
            entry = MODES["generate" if mode in (MIX, VARY) else mode]
            own = self.by_repository[entry.repository]
            cls = entry.combined_class
            self._pipes[mode] = own if type(own) is cls else cls.from_pipe(own)
        return self._pipes[mode]

    def network(self, module: nnx.Module) -> tuple[Network, Params]:
        """Split a network of a pipeline, as `Network.split`; kept until `weights_changed`."""
        with self.lock:
            found = self._networks.get(id(module))
            if found is None:
                found = self._networks[id(module)] = Network.split(module)
        return found

    def weights_changed(self) -> None:
        """Look at the networks anew, since their weights have changed."""
        with self.lock:
            self._networks = {}

    @property
    def vary_prior(self) -> KandinskyV22PriorEmb2EmbPipeline:
        """The prior of "vary"."""
        if self._vary_prior is None:
            self._vary_prior = KandinskyV22PriorEmb2EmbPipeline.from_pipe(self.pipe(VARY))
        return self._vary_prior

    def settings(self, mode: str, fast: bool = False) -> RecommendedSettings:
        """Return the settings of requests that say nothing; size and scheduler may be None.

        Raises:
            RequestError: where there is no fast adapter.
        """
        pipe = self.pipe(mode)
        found = pipe.recommended_settings
        if fast:
            if not pipe.has_fast_adapter:
                raise RequestError(f"the model {shorten(self.name, 60)} has no fast adapter", "fast")
            adapters = pipe._own_adapters()
            of_decoder, of_prior = (adapters.get(stage) for stage in (pipe.decoder_pipe, pipe.prior_pipe))
            found = found.with_fast(of_decoder.settings) if of_decoder else found
            found = found.with_fast(of_prior.settings) if of_prior else found.with_prior(pipe._of_prior())
        usual = {name: getattr(FALLBACK, name) for name in FALLBACK.arguments()}
        given = {name: value for name, value in dataclasses.asdict(found).items() if value is not None}
        return dataclasses.replace(NO_SETTINGS, **(usual | given | {"fast": found.fast}))

    def native_size(self, mode: str) -> Size:
        """Return the height and width of pictures that the model recommends."""
        own, native = self.settings(mode), self.pipe(mode).decoder_pipe.native_side
        return own.height or native, own.width or native

    def usual_size(self, mode: str, settings: ServerSettings) -> Size:
        """Return the size of requests that say nothing: the recommended one, where that is served."""
        native = self.native_size(mode)
        return settings.sizes[0] if settings.sizes and native not in settings.sizes else native

    def decoder(self, request: ImageRequest) -> Any:
        """Return the decoder pipeline of a complete request, with the scheduler that it asks for."""
        own = self.pipe(request.mode).decoder_pipe
        if request.scheduler is None:
            return own
        key = request.mode, request.scheduler
        if key not in self._decoders:
            if len(self._decoders) >= MOST_DECODERS:
                self._decoders.clear()
            scheduler = scheduler_named(request.scheduler, own.scheduler.config)
            self._decoders[key] = type(own).from_pipe(own, scheduler=scheduler)
        return self._decoders[key]

    # Requests -----------------------------------------------------------------------------------------------------

    def complete(self, request: ImageRequest, settings: ServerSettings) -> ImageRequest:
        """Check a request, and fill in what it leaves open.

        Args:
            request: from a client.
            settings: of the server, which has limits.
        Returns:
            the same with sizes, steps, scales, seed and strength.
        Raises:
            RequestError: naming the field that is wrong.
        """
        if request.mode not in self.modes:
            raise RequestError(f"mode {quote(request.mode)} is not served; there are {', '.join(self.modes)}", "mode")
        _check_pictures(request)
        own = self.settings(request.mode, request.fast)
        size = self._size(request, self.sizes(request.mode, settings), self.usual_size(request.mode, settings))
        from_picture = request.mode == VARY or (request.mode in MODES and MODES[request.mode].takes_strength)
        filled = dataclasses.replace(
            request,
            height=size[0],
            width=size[1],
            seed=secrets.randbits(32) if request.seed is None else request.seed,
            num_inference_steps=_first(request.num_inference_steps, own.num_inference_steps),
            guidance_scale=_first(request.guidance_scale, own.guidance_scale),
            prior_num_inference_steps=_first(request.prior_num_inference_steps, own.prior_num_inference_steps),
            prior_guidance_scale=_first(request.prior_guidance_scale, own.prior_guidance_scale),
            scheduler=_first(request.scheduler, own.scheduler),
            strength=_first(request.strength, DEFAULT_STRENGTH) if from_picture else None,
            loras=dict(request.loras),
        )
        settings.check(filled)
        self._check(filled)
        return filled

    def sizes(self, mode: str, settings: ServerSettings) -> Sequence[Size] | None:
        """Return the sizes that a server generates in a mode; None for any."""
        return None if settings.any_size else settings.sizes or (self.native_size(mode),)

    def _size(self, request: ImageRequest, sizes: Sequence[Size] | None, native: Size) -> Size:
        """Return the size of a request's pictures.

        Args:
            sizes: that are served, None for any.
            native: where the request says nothing.
        """
        picture = request.image or request.hint
        given = request.height, request.width
        if request.mode != VARY and picture is not None and given == (None, None):
            if sizes is None:
                return _field("image", images.fitting_size, picture, round((native[0] * native[1]) ** 0.5))
            ratio = picture.height / picture.width
            return min(sizes, key=lambda size: (max(size[0] / size[1] / ratio, ratio * size[1] / size[0]), size))
        side = self.pipe(request.mode).movq.config.scale_factor ** 2
        for name, value in zip(("height", "width"), given, strict=True):
            if value is not None:
                _field(name, checks.side, value, name)
        height, width = (_first(value, usual) for value, usual in zip(given, native, strict=True))
        if sizes is not None and (height, width) not in sizes:
            there = ", ".join(f"{w}x{h}" for h, w in sizes)
            raise RequestError(f"size {width}x{height} is not served; there are {there} (the server's --size)", "size")
        if height % side or width % side:
            raise RequestError(f"size {width}x{height} is not served; needed are multiples of {side}", "size")
        return height, width

    def _check(self, request: ImageRequest) -> None:
        """Check the values of a complete request."""
        if request.mode == MIX:
            _field("items", checks.interpolation, list(request.items), list(request.weights))
            if (most := 16) < len(request.items):
                raise RequestError(f"items has {len(request.items)} items, at most are {most}", "items")
            for weight in request.weights:
                _check_weight(weight, "weights", "a weight of the mix")
        elif not request.prompt.strip() and request.mode != VARY:
            raise RequestError("prompt is empty; say what to generate", "prompt")
        texts = [("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")]
        for name, text in texts + [("items", item) for item in request.items if isinstance(item, str)]:
            if len(text) > MOST_CHARACTERS:
                raise RequestError(f"{name} has {len(text)} characters; at most are {MOST_CHARACTERS}", name)
            _field(name, checks.texts, text, name)
        if isinstance(request.seed, bool) or not isinstance(request.seed, int) or not 0 <= request.seed < 2**63:
            raise RequestError(f"seed is {quote(request.seed)}; needed is an integer from 0 to 2**63 - 1", "seed")
        _field("num_images", checks.count, request.num_images, "num_images")
        if request.torch_noise and request.num_images > 1:
            raise RequestError("torch_noise is for one picture at a time; ask for each by itself", "num_images")
        for name in ("guidance_scale", "prior_guidance_scale"):
            scale = _field(name, checks.guidance, getattr(request, name), name)
            if not 0 <= scale <= MAX_SCALE:
                raise RequestError(f"{name} is {scale:g}; needed is a number from 0 to {MAX_SCALE:g}", name)
        scheduler = _field("scheduler", self.decoder, request).scheduler
        prior = self.pipe(request.mode).prior_scheduler
        for name, one, strength in (
            ("num_inference_steps", scheduler, request.strength if request.mode != VARY else None),
            ("prior_num_inference_steps", prior, request.strength if request.mode == VARY else None),
        ):
            steps = _field(name, one.steps, _field(name, checks.count, getattr(request, name), name))
            _field(name, one.schedule, getattr(request, name), _field("strength", checks.skipped, strength, steps))
        for name, weight in request.loras.items():
            if name not in self.lora_files:
                there = f"there are {shorten(', '.join(self.lora_files), 200)}"
                if not self.lora_files:
                    there = "this server has none (its --lora-folder)"
                raise RequestError(f"there is no LoRA {quote(name, 60)}; {there}", "loras")
            words = f"the weight of {quote(name, 60)}"
            _check_weight(_field("loras", checks.guidance, weight, words), "loras", words)


def find_loras(folder: Path | None) -> dict[str, Path]:
    """Return the LoRA files in a folder by the names that requests use; links that leave it are left out.

    Files that cannot be read are left out with a warning.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; needed is one with LoRA files")
    root = folder.resolve()
    files = [path for path in sorted(root.iterdir()) if path.suffix in LORA_FILES and path.is_file()]
    return {path.stem: path for path in files if path.resolve().parent == root and _can_be_read(path)}


def _can_be_read(path: Path) -> bool:
    """Return whether a LoRA file can be opened; warn where it cannot."""
    try:
        lora_files.open_file(path)
    except CheckpointError as error:
        warnings.warn(f"a LoRA file is left out: {error}", stacklevel=4)
        return False
    return True


def _repositories(modes: Sequence[str] | None) -> list[str] | None:
    """Return the repositories of modes, each once; None for None."""
    if modes is None:
        return None
    known = (*MODES, MIX, VARY)
    if unknown := [mode for mode in modes if mode not in known]:
        raise ValueError(f"there is no mode {', '.join(map(quote, unknown))}; there are {', '.join(known)}")
    return list(dict.fromkeys(MODES.get(mode, MODES["generate"]).repository for mode in modes))


def _members(model: str | os.PathLike[str]) -> list[str]:
    """Return the official names of the decoders that a model has: one, or those of a family in a folder.

    Raises:
        CheckpointError: where there is none.
    """
    known = list(dict.fromkeys(mode.repository for mode in MODES.values()))
    root = model if os.path.exists(model) else hub.EMBEDDED.get(str(model), model)
    if not os.path.isfile(os.path.join(root, INDEX)):
        family = [repository for repository in known if os.path.isfile(os.path.join(root, repository, INDEX))]
        if family:
            return family
    kind = hub.pipeline_class(hub.resolve(model, hub.DECODER))
    own = repository_of(kind)
    if own is None or own not in known:
        raise CheckpointError(f"{shorten(str(model), 240)} holds a {shorten(kind, 80)}, which is no decoder to serve")
    return [own]


def _shared_components(pipe: CombinedPipeline) -> dict[str, Any]:
    """Return the components that pipelines of one family share."""
    return {name: part for name, part in pipe._held().items() if name == "movq" or name.startswith("prior_")}


def _check_pictures(request: ImageRequest) -> None:
    """Raise RequestError unless a request has the pictures that its mode needs, and no others."""
    needed: tuple[str, ...] = ()
    if request.mode == VARY:
        needed = ("image",)
    elif request.mode in MODES:
        needed = MODES[request.mode].pictures
    for name in ("image", "mask_image", "hint"):
        there = getattr(request, name) is not None
        if there != (name in needed):
            what = "is not used by" if there else "is missing, which is needed by"
            raise RequestError(f"{name} {what} the mode {request.mode}", name)
    if (request.items or request.weights) and request.mode != MIX:
        raise RequestError(f"items and weights are not used by the mode {request.mode}", "items")


def _check_weight(weight: float, field: str, name: str) -> None:
    """Raise RequestError for a weight by which numbers could overflow."""
    if abs(weight) > MAX_SCALE:
        raise RequestError(f"{name} is {weight:g}; needed is a number from {-MAX_SCALE:g} to {MAX_SCALE:g}", field)


def _first(given: Any, usual: Any) -> Any:
    return usual if given is None else given


def _field(name: str, check: Any, *args: Any) -> Any:
    """Run a check; what it raises names the field."""
    try:
        return check(*args)
    except (ValueError, TypeError, ArithmeticError, SchedulerError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(shorten(str(error), 400), name) from None
