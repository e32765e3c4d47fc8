"""One side of `benchmark.py` in a process of its own: loads, warms up, times, answers in lines of JSON.

Not for use by hand. Timed are the pipelines that users call; on a CPU a callback after each step takes its time.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a machine without our package installed

from kandinsky_jax.checkpoint import hub

PROMPTS = (
    "red cat, 4k photo",
    "an oil painting of a lighthouse in a storm, dramatic light, by a Dutch master",
    "portrait of an old sailor, film grain, 35 mm",
    "isometric view of a small town in winter, highly detailed, soft colours, snow on the roofs",
)
OURS, THEIRS = "ours", "diffusers"
# Further sides: diffusers with torch.compile, in this mode.
COMPILED = {"compiled": "default", "compiled-graphs": "reduce-overhead", "compiled-tuned": "max-autotune"}
OPENVINO = "openvino"  # a further side, for CPUs: diffusers whose networks OpenVINO runs

Tick = Callable[..., dict[str, Any]]  # a pipeline's callback_on_step_end
# A call of the stage: (steps of the decoder or of the one loop, of the prior in front of it, a tick for each loop).
Call = Callable[[int, int, "Tick | None", "Tick | None"], Any]


class Job(NamedTuple):
    """What to measure; `benchmark.py` writes it as JSON."""

    side: str
    stage: str  # prior, unet, movq, text2img; first, parity, profile
    models: str
    batch: int
    size: int
    steps: int  # of the loop that is timed
    repeats: int
    dtype: str
    device: str
    prior_steps: int  # before it, in text2img
    each_step: bool  # time every step by a callback, which on an accelerator would hold it up
    resident: bool  # the process measures several stages, and loads all networks at once
    folder: str = ""  # where parity and profile leave their files

    @property
    def prompts(self) -> list[str]:
        return [PROMPTS[i % len(PROMPTS)] for i in range(self.batch)]


def decoder_inputs(job: Job, dim: int) -> dict[str, Any]:
    """Arguments of a decoder."""
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((2, job.batch, dim), np.float32)
    size = {"height": job.size, "width": job.size, "output_type": "latent"}
    return {"image_embeds": embeds[0], "negative_image_embeds": embeds[1], **size}


def latents(job: Job) -> np.ndarray:
    """For MoVQ, `[B, 4, h, w]`."""
    return np.random.default_rng(0).standard_normal((job.batch, 4, job.size // 8, job.size // 8), np.float32)


def text2img(job: Job, n: int, m: int, tick: Tick | None, prior_tick: Tick | None) -> dict[str, Any]:
    """Arguments of a combined pipeline."""
    return {
        "height": job.size,
        "width": job.size,
        "num_inference_steps": n,
        "prior_num_inference_steps": m,
        "callback_on_step_end": tick,
        "prior_callback_on_step_end": prior_tick,
    }


# The pipeline that a stage is about; the other stages need both.
PIPELINES = {"prior": "prior", "unet": "decoder", "movq": "decoder", "profile": "decoder"}


def loaded(job: Job) -> str:
    """Which pipeline a process loads: "prior", "decoder", or "combined", whose parts the other two are."""
    return "combined" if job.resident else PIPELINES.get(job.stage, "combined")


def chosen(job: Job, pipe: Any) -> Any:
    """The pipeline of the job's stage, out of what was loaded."""
    own = PIPELINES.get(job.stage, "combined")
    return pipe if own == loaded(job) else getattr(pipe, f"{own}_pipe")


@functools.cache
def our_pipeline(models: str, dtype: str, which: str) -> Any:
    """Ours, of a folder with both repositories or of the small model."""
    import kandinsky_jax as kj

    classes = {"prior": kj.KandinskyV22PriorPipeline, "combined": kj.KandinskyV22CombinedPipeline}
    cls: Any = classes.get(which, kj.KandinskyV22Pipeline)
    repository = hub.PRIOR if which == "prior" else hub.DECODER
    pipe = cls.from_pretrained(models if models == "tiny" else Path(models) / repository, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def our_call(job: Job) -> Call:
    """The call that a stage times, ours."""
    import jax.numpy as jnp

    from kandinsky_jax.diffusion import Network
    from kandinsky_jax.diffusion.calls import call

    pipe = chosen(job, our_pipeline(job.models, job.dtype, loaded(job)))
    if job.stage == "prior":
        return lambda n, m, tick, prior_tick: pipe(
            job.prompts, num_inference_steps=n, generator=0, output_type="np", callback_on_step_end=tick
        )
    if job.stage in ("unet", "profile"):
        inputs = decoder_inputs(job, pipe.unet.config.encoder_hid_dim)
        return lambda n, m, tick, prior_tick: np.asarray(
            pipe(**inputs, num_inference_steps=n, generator=0, callback_on_step_end=tick).images
        )
    if job.stage == "movq":
        network, params = Network.split(pipe.movq)
        nhwc = jnp.asarray(latents(job).transpose(0, 2, 3, 1))
        return lambda n, m, tick, prior_tick: np.asarray(call(network, params, nhwc, method="decode"))
    return lambda n, m, tick, prior_tick: pipe(job.prompts, generator=0, **text2img(job, n, m, tick, prior_tick))


@functools.cache
def their_pipeline(models: str, dtype: str, which: str, device: str, mode: str | None) -> Any:
    """The reference's, as its users run it best on this device.

    Args:
        mode: of torch.compile, or `OPENVINO`; None is neither.
    """
    import diffusers
    import torch
    import transformers

    torch.backends.cudnn.benchmark = True
    root = hub.EMBEDDED["tiny"] if models == "tiny" else Path(models)

    def load(cls: Any, repository: str) -> Any:
        folder, parts = root / repository, {}
        if mode == OPENVINO:
            from openvino_pipeline import METHODS, without_weights

            index = json.loads((folder / "model_index.json").read_text())
            for name in METHODS.keys() & index.keys():
                library, kind = index[name]
                network = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
                parts[name] = without_weights(network, folder / name, Path(os.environ["OPENVINO_PROGRAMS"]))
        return cls.from_pretrained(folder, dtype=getattr(torch, dtype), **parts)

    if which == "prior":
        pipe = load(diffusers.KandinskyV22PriorPipeline, hub.PRIOR)
    elif which == "decoder":
        pipe = load(diffusers.KandinskyV22Pipeline, hub.DECODER)
    else:
        prior = load(diffusers.KandinskyV22PriorPipeline, hub.PRIOR)
        decoder = load(diffusers.KandinskyV22Pipeline, hub.DECODER)
        components = {f"prior_{name}": part for name, part in prior.components.items()}
        pipe = diffusers.KandinskyV22CombinedPipeline(**decoder.components, **components)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if mode == OPENVINO:
        return pipe
    networks = {name: getattr(pipe, name, None) for name in ("unet", "movq", "prior", "prior_prior")}
    for name in ("unet", "movq"):
        if device != "cpu" and networks[name] is not None:
            networks[name].to(memory_format=torch.channels_last)
    if mode is not None:
        # A program for each batch and size, as ours; PyTorch would make the second one of any size.
        torch._dynamo.config.automatic_dynamic_shapes = False
        for network in networks.values():
            if isinstance(network, torch.nn.Module):
                network.compile(mode=mode, dynamic=False)
        if networks["movq"] is not None:  # the pipeline calls `decode`, which `compile` leaves alone
            networks["movq"].decode = torch.compile(networks["movq"].decode, mode=mode, dynamic=False)
    return pipe


def their_call(job: Job) -> Call:
    """The call that a stage times, the reference's."""
    import torch

    mode = OPENVINO if job.side == OPENVINO else COMPILED.get(job.side)
    pipe = chosen(job, their_pipeline(job.models, job.dtype, loaded(job), job.device, mode))
    dtype = getattr(torch, job.dtype)

    def generator() -> Any:
        return torch.Generator("cpu").manual_seed(0)

    if job.stage == "prior":
        return lambda n, m, tick, prior_tick: pipe(
            job.prompts, num_inference_steps=n, generator=generator(), callback_on_step_end=tick
        ).image_embeds.cpu()
    if job.stage == "unet":
        inputs = {
            name: torch.from_numpy(value).to(job.device, dtype) if isinstance(value, np.ndarray) else value
            for name, value in decoder_inputs(job, pipe.unet.config.encoder_hid_dim).items()
        }
        return lambda n, m, tick, prior_tick: pipe(
            **inputs, num_inference_steps=n, generator=generator(), callback_on_step_end=tick
        ).images.cpu()
    if job.stage == "movq":
        nchw = torch.from_numpy(latents(job)).to(job.device, dtype)

        def decode(n: int, m: int, tick: Tick | None, prior_tick: Tick | None) -> Any:
            with torch.inference_mode():
                return pipe.movq.decode(nchw, force_not_quantize=True).sample.cpu()

        return decode
    return lambda n, m, tick, prior_tick: pipe(
        job.prompts, generator=generator(), **text2img(job, n, m, tick, prior_tick)
    )


def call_of(job: Job) -> Call:
    """The call that a stage times, of either side."""
    return (our_call if job.side == OURS else their_call)(job)


def peak_gb(device: str, ours: bool) -> float:
    """The most memory that this process has had: of the device, where there is one, otherwise of the machine.

    PyTorch's is that since it was last reset, JAX's that since the process began.
    """
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux's unit
    if ours:
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9
    import torch

    return torch.cuda.max_memory_allocated() / 1e9


_PEAKS = [0.0]  # of JAX, in this process


def own_peak_gb(job: Job) -> float | None:
    """The most memory of a job; None where an earlier job of this process has had as much, and hides it."""
    peak = peak_gb(job.device, job.side == OURS)
    if job.device != "cpu" and job.side == OURS:
        _PEAKS.append(max(_PEAKS[-1], peak))
        return peak if peak > _PEAKS[-2] else None
    return peak


def timed(call: Call, job: Job) -> dict[str, Any]:
    """Seconds of one call, and of each of its steps but a loop's first, which has the way to it in front."""
    moments: dict[str, list[float]] = {"steps": [], "prior_steps": []}

    def ticker(loop: str) -> Tick | None:
        def tick(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            moments[loop].append(time.perf_counter())
            return tensors

        return tick if job.each_step else None

    began = time.perf_counter()
    call(job.steps, job.prior_steps, ticker("steps"), ticker("prior_steps"))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, **{loop: np.diff(times).tolist() for loop, times in moments.items()}}


@functools.cache
def matmul_tflops(device: str, dtype: str) -> float:
    """What this device's products of square matrices of random numbers reach, in JAX."""
    import jax
    import jax.numpy as jnp

    n, products = (2048, 1) if device == "cpu" else (8192, 10)
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype(dtype) for i in (0, 1))
    product = jax.jit(lambda x, y: x @ y)
    jax.block_until_ready(product(a, b))
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(products)])
        seconds.append((time.perf_counter() - began) / products)
    return 2 * n**3 / float(np.median(seconds)) / 1e12


_WARM: set[Job] = set()  # what this process has run


def steady(job: Job) -> dict[str, Any]:
    """Times of calls that have everything compiled, and what came before the first of them."""
    if job.device != "cpu" and job.side != OURS:
        import torch

        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    call = call_of(job)
    read = time.perf_counter()
    if job not in _WARM:
        timed(call, job._replace(steps=2, prior_steps=2))
        _WARM.add(job)
    warm = time.perf_counter()
    found: dict[str, Any] = {"load_s": read - began, "warm_up_s": warm - read}
    found["calls"] = [timed(call, job) for _ in range(job.repeats)]
    found["peak_gb"] = own_peak_gb(job)
    if job.side == OURS and job.stage == "unet":
        found["matmul_tflops"] = matmul_tflops(job.device, job.dtype)
    return found


def first(job: Job) -> dict[str, Any]:
    """The first picture of a process."""
    return {"calls": [timed(call_of(job), job)], "peak_gb": own_peak_gb(job)}


def parity(job: Job) -> dict[str, Any]:
    """A prompt's embedding, latents and picture by PyTorch's random numbers, in a file; float32 is no TF32."""
    if job.side == OURS:
        import jax

        import kandinsky_jax as kj

        if job.dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")
        pipe = our_pipeline(job.models, job.dtype, "combined")
        generator: Any = kj.TorchGenerator
        host: Any = np.asarray
    else:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        mode = OPENVINO if job.side == OPENVINO else None
        pipe = their_pipeline(job.models, job.dtype, "combined", job.device, mode)
        generator = torch.Generator("cpu").manual_seed

        def host(tensor: Any) -> np.ndarray:
            return tensor if isinstance(tensor, np.ndarray) else tensor.float().cpu().numpy()

    embeds = pipe.prior_pipe(job.prompts, num_inference_steps=job.prior_steps, generator=generator(0))
    arrays = {"embedding": host(embeds.image_embeds)}
    for name, kind in (("latents", "latent"), ("picture", "np")):
        call = {"height": job.size, "width": job.size, "num_inference_steps": job.steps, "output_type": kind}
        given = {"image_embeds": embeds.image_embeds, "negative_image_embeds": embeds.negative_image_embeds}
        arrays[name] = host(pipe.decoder_pipe(**given, **call, generator=generator(1)).images)
    path = Path(job.folder) / f"{job.side}-{job.dtype}.npz"
    np.savez(path, **{name: np.asarray(value, np.float32) for name, value in arrays.items()})
    return {"arrays": str(path), "peak_gb": own_peak_gb(job)}


def profile(job: Job) -> dict[str, Any]:
    """Where our UNet's steps spend their time, kernel by kernel; the trace for a viewer stays in the job's folder."""
    import jax
    from kernel_times import kernel_times

    call = call_of(job)
    call(2, 0, None, None)
    with jax.profiler.trace(job.folder):
        call(job.steps, 0, None, None)
    return {"kernels": kernel_times(Path(job.folder)), "peak_gb": own_peak_gb(job)}


def main() -> None:
    """Run each job that comes on standard input, and answer with what was found, or with what went wrong."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    others = {"first": first, "parity": parity, "profile": profile}
    for line in sys.stdin:
        job = Job(**json.loads(line))
        try:
            found = others.get(job.stage, steady)(job)
        except Exception:  # one job that does not fit the device is not the end of the others
            found = {"error": traceback.format_exc()[-3000:]}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
