"""One side of `benchmark.py` in a process of its own: loads, warms up, times, prints one line of JSON.

Not for use by hand. Timed are the pipelines that users call; a callback after each step takes the time of the steps.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kandinsky_jax import hub

PROMPTS = (
    "red cat, 4k photo",
    "an oil painting of a lighthouse in a storm, dramatic light, by a Dutch master",
    "portrait of an old sailor, film grain, 35 mm",
    "isometric view of a small town in winter, highly detailed, soft colours, snow on the roofs",
)
COMPILED = "diffusers, torch.compile"

Tick = Callable[..., dict[str, Any]]  # a pipeline's callback_on_step_end
# A call of the stage: (steps of the decoder or of the one loop, of the prior in front of it, a tick for each loop).
Call = Callable[[int, int, "Tick | None", "Tick | None"], Any]


class Job(NamedTuple):
    """What to measure; `benchmark.py` writes it as JSON."""

    side: str
    stage: str  # prior, unet, movq or text2img
    models: str
    batch: int
    size: int
    steps: int  # of the loop that is timed
    repeats: int
    dtype: str
    device: str
    prior_steps: int  # before it, in text2img
    each_step: bool  # time every step by a callback, which on an accelerator would hold it up

    @property
    def prompts(self) -> list[str]:
        return [PROMPTS[i % len(PROMPTS)] for i in range(self.batch)]

    @property
    def repository(self) -> str:
        return hub.PRIOR if self.stage == "prior" else hub.DECODER


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


def our_call(job: Job) -> Call:
    """The pipeline of a stage, ours."""
    import jax.numpy as jnp

    import kandinsky_jax as kj
    from kandinsky_jax.sampling import Network, call

    classes = {"prior": kj.KandinskyV22PriorPipeline, "text2img": kj.KandinskyV22CombinedPipeline}
    cls: Any = classes.get(job.stage, kj.KandinskyV22Pipeline)
    pipe = cls.from_pretrained(
        job.models if job.models == "tiny" else Path(job.models) / job.repository, dtype=job.dtype
    )
    pipe.set_progress_bar_config(disable=True)
    if job.stage == "prior":
        return lambda n, m, tick, prior_tick: pipe(
            job.prompts, num_inference_steps=n, generator=0, output_type="np", callback_on_step_end=tick
        )
    if job.stage == "unet":
        inputs = decoder_inputs(job, pipe.unet.config.encoder_hid_dim)
        return lambda n, m, tick, prior_tick: np.asarray(
            pipe(**inputs, num_inference_steps=n, generator=0, callback_on_step_end=tick).images
        )
    if job.stage == "movq":
        network, params = Network.split(pipe.movq)
        nhwc = jnp.asarray(latents(job).transpose(0, 2, 3, 1))
        return lambda n, m, tick, prior_tick: np.asarray(call(network, params, nhwc, method="decode"))
    return lambda n, m, tick, prior_tick: pipe(job.prompts, generator=0, **text2img(job, n, m, tick, prior_tick))


def their_call(job: Job) -> Call:
    """The pipeline of a stage, the reference's, as its users run it best on this device."""
    import diffusers
    import torch

    classes = {"prior": diffusers.KandinskyV22PriorPipeline, "text2img": diffusers.KandinskyV22CombinedPipeline}
    cls: Any = classes.get(job.stage, diffusers.KandinskyV22Pipeline)
    root = hub.EMBEDDED["tiny"] if job.models == "tiny" else Path(job.models)
    dtype = getattr(torch, job.dtype)
    if job.stage == "text2img":
        prior = diffusers.KandinskyV22PriorPipeline.from_pretrained(root / hub.PRIOR, torch_dtype=dtype)
        decoder = diffusers.KandinskyV22Pipeline.from_pretrained(root / hub.DECODER, torch_dtype=dtype)
        parts = {f"prior_{name}": part for name, part in prior.components.items()}
        pipe = cls(**decoder.components, **parts).to(job.device)
    else:
        pipe = cls.from_pretrained(root / job.repository, torch_dtype=dtype).to(job.device)
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "movq"):
        if job.device != "cpu" and hasattr(pipe, name):
            getattr(pipe, name).to(memory_format=torch.channels_last)
    if job.side == COMPILED:
        for name in ("unet", "movq", "prior", "prior_prior"):
            if isinstance(getattr(pipe, name, None), torch.nn.Module):
                getattr(pipe, name).compile()

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


def peak_gb(job: Job) -> float:
    """The most memory that this process has had: of the device, where there is one, otherwise of the machine."""
    if job.device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux's unit
    if job.side == "ours":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9
    import torch

    return torch.cuda.max_memory_allocated() / 1e9


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


def matmul_tflops(job: Job) -> float:
    """What this device's matrix products reach, in the dtype of the job."""
    import jax
    import jax.numpy as jnp

    n = 2048 if job.device == "cpu" else 8192
    a = jnp.ones((n, n), job.dtype)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(a))
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / float(np.median(seconds)) / 1e12


def main() -> None:
    """Run the job that stands on standard input."""
    job = Job(**json.load(sys.stdin))
    began = time.perf_counter()
    call = (our_call if job.side == "ours" else their_call)(job)
    loaded = time.perf_counter()
    timed(call, job._replace(steps=2, prior_steps=2))
    warm = time.perf_counter()
    found: dict[str, Any] = {"load_s": loaded - began, "warm_up_s": warm - loaded}
    found["calls"] = [timed(call, job) for _ in range(job.repeats)]
    found["peak_gb"] = peak_gb(job)
    if job.side == "ours" and job.stage == "unet":
        found["matmul_tflops"] = matmul_tflops(job)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
