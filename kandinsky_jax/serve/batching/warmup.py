"""Compiling a server's programs before they are needed: the usual request first, then everything that may be asked for.

A thread sends a small request of each kind through the same functions that serve them, beside the engine. Their
programs are compiled instead of run, see `kandinsky_jax.compilation.compiling_ahead`.
"""

from __future__ import annotations

import atexit
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from PIL import Image

from kandinsky_jax.checkpoint import CheckpointError
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.compilation import compiling_ahead
from kandinsky_jax.diffusion import Network
from kandinsky_jax.pipelines.modes import MODES
from kandinsky_jax.serve.batching.image_task import ImageTask
from kandinsky_jax.serve.batching.plan import RequestPlan
from kandinsky_jax.serve.batching.slots import SlotBatch, SlotJob
from kandinsky_jax.serve.preview import LatentPreview, preview_map
from kandinsky_jax.serve.requests import MIX, VARY, ImageRequest
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings, Size

OFF = 1.0  # a guidance scale
ASKED_SECONDS = 10.0  # after which nobody waits any more for what was asked for; an engine asks again at each turn


class BatchSizes(NamedTuple):
    """Padded numbers of images that share a step, over all devices, rising."""

    prior: tuple[int, ...]
    decoder: tuple[int, ...]

    @classmethod
    def of(cls, settings: ServerSettings, devices: int) -> BatchSizes:
        """Return the sizes of a server; the prior, whose programs are small, has powers of two between the others."""
        decoder = sorted(set(settings.batch_sizes))
        between = [2**i for i in range(16) if decoder[0] < 2**i < decoder[-1]]
        prior = sorted(set(settings.prior_batch_sizes) or {*decoder, *between})
        return cls(tuple(size * devices for size in prior), tuple(size * devices for size in decoder))


class Kind(NamedTuple):
    """Requests that share their programs."""

    mode: str
    size: Size
    guided: bool
    prior_guided: bool
    batch_size: int  # of the decoder, padded, over all devices
    prior_batch_size: int

    @property
    def prior_programs(self) -> Hashable:
        """A name of the programs of the prior."""
        return "prior", self.prior_guided, self.prior_batch_size

    @property
    def decoder_programs(self) -> Hashable:
        """A name of the programs of the decoder, and of what the mode needs besides."""
        return self.mode, self.size, self.guided, self.batch_size

    def programs(self) -> set[Hashable]:
        """Names of all programs."""
        return {self.prior_programs, self.decoder_programs}

    def __str__(self) -> str:
        """Words for an operator."""
        height, width = self.size
        guidance = "with" if self.guided else "without"
        return f"{self.mode} at {width}x{height} {guidance} guidance, {self.batch_size} at once"


class Warmup:
    """Compiles the programs of a server in a thread.

    What a request waits for comes first, in the order of asking, and then what was planned.

    Args:
        model, settings: what is served.
        sizes: padded batch sizes of prior and decoder, over all devices.
        changed: called when something is ready.
    """

    def __init__(self, model: ServedModel, settings: ServerSettings, sizes: BatchSizes, changed: Callable[[], None]):
        self.model, self.settings, self.changed = model, settings, changed
        # Pipelines keep results, which are zeros while compiling: those of others, with the same networks.
        self._twin = ServedModel([type(pipe).from_pipe(pipe) for pipe in model.by_repository.values()], model.name)
        self.kinds = kinds(model, settings, sizes)
        self._sizes = sizes
        self._failures: dict[Kind, str] = {}  # why what was planned could not be compiled
        self.preview: LatentPreview | None = None  # once it is read, or fitted
        self._planned: deque[Kind] = deque(self.kinds)
        self._asked: dict[Kind, float] = {}  # when somebody last waited for it
        self._ready: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._work = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="kandinsky-jax compile", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        atexit.register(self._end_with_process)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the programs that it compiles now."""
        with self._work:
            self._stopped = True
            self._work.notify_all()

    def _end_with_process(self) -> None:
        """Wait for programs that are being compiled: Python aborts where XLA returns to one that is ending."""
        self.stop()
        self._thread.join()

    @property
    def compiled(self) -> int:
        """Number of the planned kinds that can be served."""
        return sum(kind.programs() <= self._ready for kind in self.kinds)

    @property
    def is_ready(self) -> bool:
        """Whether all programs that were planned are compiled, but for those that cannot be."""
        tried = (kind in self._failures or kind.programs() <= self._ready for kind in self.kinds)
        return self.compiled > 0 and all(tried)

    @property
    def is_useless(self) -> bool:
        """Whether nothing of what was planned can be compiled."""
        return len(self._failures) >= len(self.kinds)

    @property
    def failures(self) -> tuple[str, ...]:
        """What was planned and cannot be compiled, with the reason."""
        failed = [pair for pair in list(self._failures.items()) if not pair[0].programs() <= self._ready]
        return tuple(dict.fromkeys(f"{kind}: {error}" for kind, error in failed))

    def is_compiled(self, plan: RequestPlan, stage: str, batch_size: int) -> bool:
        """Whether the programs of a stage are ready; where they are not, they are compiled soon."""
        own, factor = plan.decoder_request, plan.decoder.movq.config.scale_factor
        smallest = getattr(self._sizes, stage)[0]
        pair = (self._sizes.decoder[0], batch_size) if stage == "prior" else (batch_size, self._sizes.prior[0])
        size = own.h * factor, own.w * factor
        kind = Kind(plan.request.mode, size, plan.guided, plan.prior_guided, *pair)
        programs = kind.prior_programs if stage == "prior" else kind.decoder_programs
        if programs in self._ready:
            return True
        if programs in self._failed:
            return bool(batch_size == smallest)  # where the request says why
        with self._work:
            self._asked[kind] = time.monotonic()
            self._work.notify_all()
        return False

    def _loop(self) -> None:
        try:
            self._compile_all()
        finally:
            atexit.unregister(self._end_with_process)

    def _compile_all(self) -> None:
        while (kind := self._next()) is not None:
            try:
                self._ready |= compile_kind(self._twin, kind)
            except Exception as error:  # a request of this kind would say the same
                if not threading.main_thread().is_alive():
                    return  # the process ends, and no thread can be started
                self._failed |= kind.programs() - self._ready
                if kind in self.kinds:
                    self._failures[kind] = shorten(str(error), 300)
                warnings.warn(f"{kind}, cannot be compiled: {error}", stacklevel=2)
            self.changed()
            if self.preview is None:
                self.preview = self._fit_preview(kind.mode)

    def _next(self) -> Kind | None:
        """Wait for something to compile, and return it; None at the end."""
        with self._work:
            while not self._stopped:
                if (kind := self._waited_for()) is not None:
                    return kind
                while self._planned:
                    kind = self._planned.popleft()
                    if not kind.programs() <= self._ready:
                        return kind
                self._work.wait()
        return None

    def _waited_for(self) -> Kind | None:
        """Return what somebody has waited for longest, and forget what nobody waits for any more."""
        known, since = self._ready | self._failed, time.monotonic() - ASKED_SECONDS
        self._asked = {
            kind: last for kind, last in self._asked.items() if last > since and not kind.programs() <= known
        }
        return next(iter(self._asked), None)

    def _fit_preview(self, mode: str) -> LatentPreview | None:
        try:
            return preview_map(self.model.pipe(mode).movq)
        except CheckpointError as error:
            warnings.warn(f"there are no previews: {error}", stacklevel=2)
            return None


def kinds(model: ServedModel, settings: ServerSettings, sizes: BatchSizes) -> list[Kind]:
    """Return all kinds of requests that a server announces, the usual ones first."""
    found: list[Kind] = []
    for mode in model.modes:
        own = model.settings(mode)
        usual = [(own.guidance_scale or 0) > OFF, (own.prior_guidance_scale or 0) > OFF]
        for size in settings.sizes or (model.native_size(mode),):
            for i, guided in enumerate((usual[0], not usual[0])):
                prior_guided = usual[1] if i == 0 else not usual[1]
                for pair in _pairs(sizes) if mode == model.modes[0] else zip(sizes.decoder, sizes.decoder, strict=True):
                    found.append(Kind(mode, size, guided, prior_guided, *pair))
    first = [kind for kind in found if kind.mode == found[0].mode and kind.guided == found[0].guided]
    return first + [kind for kind in found if kind not in first]


def _pairs(sizes: BatchSizes) -> list[tuple[int, int]]:
    """Return pairs of a decoder's and a prior's batch size in which each size is."""
    longest = max(len(sizes.decoder), len(sizes.prior))
    decoder, prior = ([*own, *[own[-1]] * (longest - len(own))] for own in (sizes.decoder, sizes.prior))
    return list(zip(decoder, prior, strict=True))


def compile_kind(model: ServedModel, kind: Kind) -> set[Hashable]:
    """Compile what a request of a kind runs, and return the names of these programs.

    On a mesh they are run, since a slot's arrays are sharded along several axes, of which a rehearsal knows one.
    """
    if model.network(model.pipe(kind.mode).unet)[0].mesh is not None:
        return _run_kind(model, kind)
    found: set[Hashable] = set()
    with compiling_ahead(lambda: found.update(_run_kind(model, kind)), quiet=False):
        pass
    return found


def _run_kind(model: ServedModel, kind: Kind) -> set[Hashable]:
    """Send a small request of a kind through prior, decoder and MoVQ."""
    plan = RequestPlan(model, model.complete(_request(model, kind), ServerSettings(any_size=True)))
    task = ImageTask(plan, 0)
    _run_jobs(task.start_prior(), plan.pipe.prior_prior, plan.prior_guided, kind.prior_batch_size)
    job = task.start_decoder()
    _run_jobs([job], plan.decoder.unet, plan.guided, kind.batch_size)
    np.asarray(task.decode(job).array)
    return kind.programs()


def _run_jobs(jobs: Sequence[SlotJob], module: nnx.Module, guided: bool, batch_size: int) -> None:
    network, params = Network.split(module)
    for job in jobs:
        batch = SlotBatch(network, params, batch_size, guided)
        batch.add(job)
        while batch.jobs:
            batch.advance()
        batch.predicted(0)


def _request(model: ServedModel, kind: Kind) -> ImageRequest:
    """Return a request of a kind with as few steps as it takes."""
    picture = Image.new("RGB", (64, 64), (90, 120, 150))
    given: dict[str, Any] = {"items": ("a", picture), "weights": (0.5, 0.5)} if kind.mode == MIX else {}
    pictures = {"image": picture, "mask_image": Image.linear_gradient("L"), "hint": Image.linear_gradient("L")}
    needed = ("image",) if kind.mode == VARY else MODES[kind.mode].pictures if kind.mode in MODES else ()
    return ImageRequest(
        mode=kind.mode,
        prompt="a",
        height=kind.size[0],
        width=kind.size[1],
        seed=0,
        torch_noise=not kind.guided,
        num_inference_steps=2,
        prior_num_inference_steps=2,
        strength=1.0,
        guidance_scale=2.0 if kind.guided else OFF,
        prior_guidance_scale=2.0 if kind.prior_guided else OFF,
        **given | {name: pictures[name] for name in needed},
    )
