"""The way of one image: prompt -> prior -> embedding -> decoder -> latents -> MoVQ -> picture, as jobs for slots.

Everything before and after the loops is computed for one image at a time by the pipelines' own functions, so that it
does not depend on which images come together.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from kandinsky_jax.diffusion import DECODER_STREAM, PRIOR_STREAM, GivenNoise, noise_source
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.diffusion.rng import Generator, TorchGenerator, image_keys
from kandinsky_jax.pipelines.decoder import DecoderInputs, PendingImages
from kandinsky_jax.pipelines.prior import PriorInputs
from kandinsky_jax.schedulers import Schedule
from kandinsky_jax.serve.batching.plan import PriorPlan, RequestPlan
from kandinsky_jax.serve.batching.slots import SlotJob
from kandinsky_jax.serve.requests import MIX


class ImageTask:
    """One image of a request.

    Args:
        plan: of the request.
        index: number of the image in the request.
    """

    def __init__(self, plan: RequestPlan, index: int):
        self.plan, self.index = plan, index
        seed = plan.request.seed
        assert seed is not None
        self._generator: Generator = TorchGenerator(seed) if plan.request.torch_noise else image_keys([seed], [index])
        self._prior_jobs: list[list[SlotJob]] = []  # of each prior plan
        self._inputs: DecoderInputs | None = None

    def start_prior(self) -> list[SlotJob]:
        """Return the jobs of the prior; none where the embedding needs none."""
        self._prior_jobs = [self._jobs_of(plan) for plan in self.plan.priors]
        request = self.plan.request
        if request.torch_noise and request.mode == MIX and not request.negative_prompt:
            # The reference generates an embedding of "" here and drops it, but its generator has advanced.
            schedule = self.plan.pipe.prior_scheduler.schedule(request.prior_num_inference_steps)
            source = noise_source(self._generator, 1, PRIOR_STREAM)
            source.skip(1 + int(schedule.draws_noise.sum()), (1, self.plan.pipe.prior_prior.config.embedding_dim))
        return [job for jobs in self._prior_jobs for job in jobs]

    def _jobs_of(self, plan: PriorPlan) -> list[SlotJob]:
        """Return the jobs of one term: the prompt's, and that of its negative prompt."""
        request, pipe = plan.request, plan.pipe
        if request is None:
            return []
        assert plan.rows is not None
        source = noise_source(self._generator, 1, PRIOR_STREAM)
        network, params = self.plan.model.network(pipe.prior)
        inputs = PriorInputs(pipe, request, *plan.encoded()).loop_inputs(network, params, request.guidance.uses_uncond)
        starts = pipe._initial_latents(request, source)
        noises = _noises(source, request.schedule, (1, pipe.prior.config.embedding_dim), len(inputs))
        return [
            SlotJob(own, start, plan.rows, *noise) for own, start, noise in zip(inputs, starts, noises, strict=True)
        ]

    def _embeds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the image embedding and the negative one, float32 `[1, D]`, once the prior's jobs are done."""
        request, prior = self.plan.request, self.plan.pipe.prior_pipe
        found = [
            [plan.picture_embed()] if plan.request is None else [self._embed(plan, job) for job in jobs]
            for plan, jobs in zip(self.plan.priors, self._prior_jobs, strict=True)
        ]
        if request.mode != MIX:
            [embeds] = found
            return embeds[0], embeds[1] if len(embeds) > 1 else prior._zero_embed()
        mixed = np.zeros((1, prior.prior.config.embedding_dim), np.float32)
        for embeds, weight in zip(found, request.weights, strict=False):
            mixed += np.float32(weight) * embeds[0]
        return mixed, found[-1][0] if request.negative_prompt else prior._zero_embed()

    def _embed(self, plan: PriorPlan, job: SlotJob) -> np.ndarray:
        """Return the embedding of a finished job, float32 `[1, D]`; waits for the device."""
        network, params = self.plan.model.network(plan.pipe.prior)
        return np.asarray(call(network, params, job.result, method="post_process_latents"), np.float32)[:1]

    def start_decoder(self) -> SlotJob:
        """Return the job of the decoder, once those of the prior are done."""
        plan = self.plan
        cond, negative = self._embeds()
        own = plan.decoder_request
        source = noise_source(self._generator, 1, DECODER_STREAM)
        shape = (1, own.h, own.w, plan.decoder.movq.config.latent_channels)
        inputs = self._inputs = plan.decoder._inputs(own, source.initial(shape)[0], cond, negative)
        network, params = plan.model.network(plan.decoder.unet)
        [loop_inputs] = inputs.loop_inputs(network, params, plan.guided)
        [noise] = _noises(source, own.schedule, shape, 1)
        return SlotJob(loop_inputs, inputs.start, plan.decoder_rows, *noise)

    def decode(self, job: SlotJob) -> PendingImages:
        """Start MoVQ's decoding of the decoder's finished job."""
        assert self._inputs is not None
        assert job.result is not None
        network, params = self.plan.model.network(self.plan.decoder.movq)
        latents = self._inputs.finish(job.result)
        return PendingImages(self.plan.decoder_request, call(network, params, latents, method="decode_in_groups"))


def _noises(
    source: Any, schedule: Schedule, shape: tuple[int, ...], batches: int
) -> list[tuple[jax.Array, np.ndarray | None]]:
    """Return the noise of each batch's steps: a key `[1]`, and for PyTorch's numbers the noise, `[steps, ...]`."""
    count, chunk = len(schedule), source.chunk or len(schedule)
    parts = [
        source.steps(first, min(chunk, count - first), schedule.draws_noise, shape, batches)
        for first in range(0, count, chunk)
    ]
    if not isinstance(parts[0][0], GivenNoise):
        return [(noise.keys, None) for noise in parts[0]]
    given = [np.concatenate([np.asarray(part[i].values)[:, 0] for part in parts])[:count] for i in range(batches)]
    return [(image_keys([0], [0]), values) for values in given]
