"""Distillation of the prior and the decoder: a student of few evaluations, without guidance, from a guided teacher.

The data, encoders and sample pictures are those of the task that trains the network itself, except that a decoder may
be given embeddings that the prior generates (`distillation.embeddings`); the loss and what is drawn
for it are `training.distillation`'s. `LoraTask` trains a LoRA by it, which is what `distillation.lora` asks for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from kandinsky_jax.checkpoint.recommended_settings import RecommendedSettings
from kandinsky_jax.diffusion import Network, Params, per_image, split_output
from kandinsky_jax.schedulers import scheduler_named
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Captioned, Reader
from kandinsky_jax.training.distillation import Draws, Evaluate, consistency_loss, draw_steps
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.tasks.base import Loss
from kandinsky_jax.training.tasks.decoder import DecoderTask
from kandinsky_jax.training.tasks.diffusion import DiffusionTask, unpadded
from kandinsky_jax.training.tasks.generated_embeds import EmbedsGenerator
from kandinsky_jax.training.tasks.prior import PriorTask


@dataclass(frozen=True)
class DistillationTask(DiffusionTask):
    """What distillation changes in the training of a diffusion network; the teacher is the network as it was loaded."""

    def __post_init__(self) -> None:
        check_unused(self.config, self.kind, len(self.alphas_cumprod()))

    def draw_timesteps(self, key: jax.Array, count: int) -> dict[str, jax.Array]:
        return draw_steps(key, count, len(self.alphas_cumprod()), self.config.distillation)._asdict()

    def frozen_of(self, params: Params) -> Params:
        """Return the teacher's parameters, in the dtype of computation."""
        return jax.tree.map(lambda leaf: leaf.astype(self.config.optimizer.dtype), params)

    @property
    def uses_average(self) -> bool:
        return self.config.distillation.ema_target

    def loss(self) -> Loss:
        network, config = Network.split(self.module)[0], self.config.distillation
        alphas = jnp.asarray(self.alphas_cumprod(), jnp.float32)
        # On the host: arrays that lie on a mesh of their own have no place in a loss on the mesh of training.
        without = jax.tree.map(np.asarray, self.dropped_condition()) if self._is_guided else None

        def loss(
            trained: Params, batch: Mapping[str, jax.Array], frozen: Params, average: Params | None = None
        ) -> jax.Array:
            draws = Draws(*(batch[name] for name in Draws._fields))
            student = self._evaluate(network, trained, batch)
            target = student if average is None else self._evaluate(network, average, batch)
            teacher = self._guided(network, frozen, batch, without)
            clean = self.normalized(network.bind(frozen), batch)
            return consistency_loss(
                student, target, teacher, clean, batch["noise"], draws, alphas, self.prediction_type, config
            )

        return loss

    @property
    def _is_guided(self) -> bool:
        config = self.config.distillation
        return max(config.guidance_scale, config.guidance_scale_max or 0) > 1

    def _evaluate(self, network: Network, params: Params, batch: Mapping[str, jax.Array]) -> Evaluate:
        """Return evaluations of the network, conditioned on a batch."""
        module: Any = network.bind(params)
        condition = self.condition(module, batch)

        def evaluate(noisy: jax.Array, timesteps: jax.Array) -> jax.Array:
            return split_output(module(noisy, timesteps, condition), noisy.shape[-1])[0]

        return evaluate

    def _guided(
        self,
        network: Network,
        params: Params,
        batch: Mapping[str, jax.Array],
        without: Mapping[str, np.ndarray] | None,
    ) -> Evaluate:
        """Return guided evaluations of the teacher, with cond and uncond in one batch.

        Args:
            without: the condition to be guided away from, `[1, ...]` each; None where guidance is off.
        """
        if without is None:
            return self._evaluate(network, params, batch)
        dropped = {name: jnp.broadcast_to(x, batch[name].shape) for name, x in unpadded(without, batch).items()}
        both = jax.tree.map(lambda *x: jnp.concatenate(x), dict(batch), {**batch, **dropped})
        evaluate, scale = self._evaluate(network, params, both), batch["guidance_scale"]

        def evaluate_guided(noisy: jax.Array, timesteps: jax.Array) -> jax.Array:
            outputs = evaluate(jnp.concatenate([noisy] * 2), jnp.concatenate([timesteps] * 2))
            cond, uncond = jnp.split(outputs, 2)
            return uncond + per_image(scale, noisy.ndim) * (cond - uncond)

        return evaluate_guided


@dataclass(frozen=True)
class DistillDecoderTask(DistillationTask, DecoderTask):
    """Distillation of the decoder's UNet, given image embeddings of the pictures or those that the prior generates."""

    kind = Kind.DISTILL_DECODER
    lora_kind = Kind.DISTILL_DECODER

    @property
    def _generates_embeds(self) -> bool:
        return self.config.distillation.embeddings == "prior"

    @functools.cached_property
    def _generator(self) -> EmbedsGenerator:
        return EmbedsGenerator(self)

    @property
    def encoders(self) -> dict[str, nnx.Module]:
        if not self._generates_embeds:
            return super().encoders
        return {"text_encoder": self.pipe.prior_text_encoder, "prior": self.pipe.prior_prior, "movq": self.pipe.movq}

    @property
    def encoding_settings(self) -> dict[str, object]:
        return {"embeddings": "prior"} | self._generator.settings if self._generates_embeds else {}

    @property
    def further_settings(self) -> dict[str, object]:
        if not self._generates_embeds:
            return {}
        names = ("guidance_scale", "schedule")
        return {f"{name} of the embeddings": self._generator.settings[name] for name in names}

    def reader(self) -> Reader:
        return self.text_reader(hints=self.takes_hint) if self._generates_embeds else super().reader()

    def encode_embeds(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
        if not self._generates_embeds:
            return super().encode_embeds(batch)
        return self._generator(batch["input_ids"], batch["text_mask"])

    def sample_options(self) -> dict[str, Any]:
        return {"num_inference_steps": self.config.distillation.num_inference_steps, "guidance_scale": 1.0}

    def sample(self, items: Sequence[Captioned]) -> Image.Image:
        before = self.pipe.scheduler
        self.pipe.scheduler = scheduler_named(self.config.distillation.method, before.config)
        try:
            return super().sample(items)
        finally:
            self.pipe.scheduler = before

    def recommended(self) -> RecommendedSettings:
        config = self.config.distillation
        return dataclasses.replace(
            super().recommended(),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=1.0,
            scheduler=config.method,
        )


@dataclass(frozen=True)
class DistillPriorTask(DistillationTask, PriorTask):
    """Distillation of the prior, which keeps its scheduler."""

    kind = Kind.DISTILL_PRIOR
    lora_kind = Kind.DISTILL_PRIOR

    def sample_options(self) -> dict[str, Any]:
        steps = self.config.distillation.num_inference_steps
        return super().sample_options() | {"prior_num_inference_steps": max(2, steps), "prior_guidance_scale": 1.0}

    def recommended(self) -> RecommendedSettings:
        steps = self.config.distillation.num_inference_steps
        own = {"prior_num_inference_steps": max(2, steps), "prior_guidance_scale": 1.0}
        return dataclasses.replace(super().recommended(), **own)  # type: ignore[arg-type]


def check_unused(config: Config, kind: Kind, train_timesteps: int) -> None:
    """Raise ValueError for settings that distillation does not use, or that lack what they need."""
    faults = []
    if train_timesteps % (steps := config.distillation.original_inference_steps):
        faults.append(
            f"distillation.original_inference_steps={steps} does not divide the {train_timesteps} timesteps, so the "
            "noisiest would be left out; give one that does, such as 20"
        )
    if config.condition_dropout:
        faults.append(f"condition_dropout is of no use for {kind}: the student runs without guidance; leave it out")
    if config.snr_gamma is not None:
        faults.append(f"snr_gamma is of no use for {kind}: its losses are not weighted; leave it out")
    if kind == Kind.DISTILL_PRIOR and config.distillation.embeddings != "pictures":
        faults.append(
            f"distillation.embeddings={config.distillation.embeddings!r} is of no use for {kind}: the prior learns to "
            "generate the embeddings of pictures; leave it out"
        )
    if config.distillation.ema_target and config.optimizer.ema_decay is None:
        faults.append("distillation.ema_target needs the average of the weights; set optimizer.ema_decay, such as 0.95")
    if faults:
        raise ValueError("\n  ".join(faults))
