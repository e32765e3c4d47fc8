"""What there is to train: the prior or the decoder, whole or by LoRA. What a batch becomes, and its loss.

    pictures -> MoVQ latents ------------------> decoder's loss
    pictures -> CLIP vision -> image embedding --^---> prior's loss
    captions -> CLIP text ----------------------------^

The towers and MoVQ are not trained. What they make of a batch (`encode`) depends on nothing that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kandinsky_jax import lora
from kandinsky_jax.lora import LoraConfig
from kandinsky_jax.pipelines import KandinskyV22CombinedPipeline
from kandinsky_jax.sampling import Network, Params, call
from kandinsky_jax.schedulers import DDPMScheduler
from kandinsky_jax.training.data import Reader
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.losses import decoder_loss, prior_loss

# The reference trains the prior under this schedule, and the decoder under its own.
PRIOR_SCHEDULE = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")


@dataclass(frozen=True)
class Task:
    """One kind of training on one model.

    Args:
        pipe: the model, float32.
        kind: what is trained.
        snr_gamma: of min-SNR weighting; None is none.
        condition_dropout: the share of examples that are trained without their condition, for guidance: the decoder
            then sees the vision tower's embedding of zeros, the prior the empty prompt.
        lora: where the kind is one of LoRA.
    """

    pipe: KandinskyV22CombinedPipeline
    kind: Kind
    snr_gamma: float | None = None
    condition_dropout: float = 0.0
    lora: LoraConfig = field(default_factory=LoraConfig)
    _apart: dict[str, tuple[Network, Params]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def of_prior(self) -> bool:
        """Whether the prior is trained, and not the decoder's UNet."""
        return self.kind in (Kind.PRIOR, Kind.LORA_PRIOR)

    @property
    def of_lora(self) -> bool:
        """Whether the network itself stays as it is."""
        return self.kind in (Kind.LORA_PRIOR, Kind.LORA_DECODER)

    @property
    def module(self) -> Any:
        """The network that is trained."""
        return self.pipe.prior_prior if self.of_prior else self.pipe.unet

    def initial(self, key: jax.Array) -> Any:
        """What is trained, before the first step."""
        params = Network.split(self.module)[1]
        return lora.init(params, self.lora, key) if self.of_lora else params

    def network_params(self, trained: Any) -> Params:
        """The network's parameters with what is trained."""
        if not self.of_lora:
            return trained
        return lora.merged(Network.split(self.module)[1], trained, self.lora.scale)

    def reader(self, resolution: int, **options: Any) -> Reader:
        """Makes the arrays that `encode` wants."""
        pipe = self.pipe
        text = (
            {"tokenizer": pipe.prior_tokenizer, "length": pipe.prior_text_encoder.config.max_position_embeddings}
            if self.of_prior
            else {}
        )
        return Reader(resolution, pipe.prior_image_processor, **text, **options)

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """What the towers and MoVQ make of a batch of the reader's: the arguments of the loss that are data."""
        embeds = self._frozen("prior_image_encoder", jnp.asarray(batch["clip_pixels"]))
        found = {"image_embeds": embeds.astype(jnp.float32)}
        if not self.of_prior:
            pixels = jnp.asarray(batch["pixels"], jnp.float32) / 127.5 - 1
            latents = self._frozen("movq", pixels, method="encode")
            return found | {"latents": latents.astype(jnp.float32)}
        return found | self._text(batch["input_ids"], batch["text_mask"])

    def _frozen(self, name: str, *args: jax.Array, method: str = "__call__") -> Any:
        """Run a network that is not trained; taking one apart costs the host 7 ms, so it is done once."""
        if name not in self._apart:
            self._apart[name] = Network.split(getattr(self.pipe, name))
        return call(*self._apart[name], *args, method=method)

    def _text(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
        output = self._frozen("prior_text_encoder", jnp.asarray(ids))
        return {
            "prompt_embeds": output.text_embeds,
            "text_encoder_hidden_states": output.last_hidden_state,
            "text_mask": jnp.asarray(mask),
        }

    def loss(self) -> Any:
        """(what is trained, encoded batch, key) -> loss; the key decides timesteps, noise and dropout."""
        network = Network.split(self.module)[0]
        schedule = PRIOR_SCHEDULE if self.of_prior else self.pipe.scheduler
        alphas = jnp.asarray(schedule.alphas_cumprod(), jnp.float32)
        empty = self._empty()

        def loss(trained: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
            of_time, of_noise, of_dropout = jax.random.split(key, 3)
            given = dict(batch)
            clean = given["image_embeds"] if self.of_prior else given["latents"]
            given["noise"] = jax.random.normal(of_noise, clean.shape, jnp.float32)
            given["timesteps"] = jax.random.randint(of_time, (len(clean),), 0, len(alphas))
            if self.condition_dropout:
                dropped = jax.random.bernoulli(of_dropout, self.condition_dropout, (len(clean),))
                for name, value in empty.items():
                    given[name] = jnp.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), value, given[name])
            function = prior_loss if self.of_prior else decoder_loss
            params = self.network_params(trained)
            return function(network, params, **given, alphas_cumprod=alphas, snr_gamma=self.snr_gamma)

        return loss

    def _empty(self) -> dict[str, jax.Array]:
        """What stands in the place of a condition that is dropped, `[1, ...]`."""
        if not self.condition_dropout:
            return {}
        if not self.of_prior:
            return {"image_embeds": jnp.asarray(self.pipe.prior_pipe._zero_embed(), jnp.float32)}
        return self._text(*self.pipe.prior_pipe._tokenize([""]))
