"""Training of a diffusion network, the prior or the decoder's UNet: what both have in common."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.checkpoint.recommended_settings import NO_SETTINGS, RecommendedSettings
from kandinsky_jax.checkpoint.tokenizer import tokenize
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.pipelines import Pipeline
from kandinsky_jax.pipelines.fast import without_fast_adapter
from kandinsky_jax.pipelines.modes import modes_of, repository_of
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import TEXT_ARRAYS, Captioned, Reader
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.tasks.base import Draw, Loss, TrainingTask, contact_sheet, reader_of

SAMPLE_STEPS = 25


@dataclass(frozen=True)
class DiffusionTask(TrainingTask):
    """Base of the tasks that train a diffusion network; the towers and MoVQ are frozen, so `encode` can be cached.

    With `condition_dropout`, some conditions are replaced as in classifier-free guidance, by `dropped_condition`.
    """

    component: ClassVar[str]  # the trained network, by its name in a pipeline of its own
    lora_kind: ClassVar[Kind]  # the same training with LoRA
    prediction_type: ClassVar[Literal["epsilon", "sample"]]  # of the network

    _split: dict[str, tuple[Network, Params]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def load(cls, config: Config) -> Pipeline:
        found = hub.pipeline_class(hub.resolve(config.model, hub.DECODER))
        modes = modes_of(repository_of(found) or hub.DECODER) or modes_of(hub.DECODER)
        return modes[0].combined_class.from_pretrained(config.model, prior=config.prior, dtype="float32")

    @property
    @abstractmethod
    def module(self) -> nnx.Module:
        """The trained network."""

    @property
    @abstractmethod
    def stage(self) -> Pipeline:
        """The pipeline of the trained network's stage, which is exported."""

    @property
    @abstractmethod
    def encoders(self) -> dict[str, nnx.Module]:
        """The networks that `encode` runs."""

    @property
    def encoding_settings(self) -> dict[str, object]:
        """What determines the result of `encode` besides the reader's settings and the encoders' weights."""
        return {}

    @abstractmethod
    def alphas_cumprod(self) -> np.ndarray:
        """Return the noise schedule to train with, `[T]`."""

    @abstractmethod
    def dropped_condition(self) -> dict[str, jax.Array]:
        """Return the values that replace dropped conditions in a batch, `[1, ...]` each."""

    def draw_also(self, batch: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """Draw what else is random, besides noise and timesteps, for each example."""
        return {}

    @abstractmethod
    def condition(self, module: Any, batch: Mapping[str, jax.Array]) -> PyTree:
        """Compute the network's conditioning of a batch."""

    @abstractmethod
    def normalized(self, module: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return `clean` samples as the network diffuses them."""

    @abstractmethod
    def loss_of_batch(
        self, network: Network, params: Params, batch: Mapping[str, jax.Array], alphas: jax.Array
    ) -> jax.Array:
        """Compute the loss of a batch from `draw`, a float32 scalar."""

    @property
    def modules(self) -> dict[str, nnx.Module]:
        return {self.component: self.module}

    @property
    def networks(self) -> dict[str, nnx.Module]:
        return self.modules | self.encoders

    def initial(self, key: jax.Array) -> Params:
        return self.initial_of(Network.split(self.module)[1], key)

    def initial_of(self, params: Params, key: jax.Array) -> PyTree:
        """Return the initial values of the trained parameters, for a network with these parameters."""
        return params

    def frozen(self) -> PyTree:
        return self.frozen_of(Network.split(self.module)[1])

    def frozen_of(self, params: Params) -> PyTree:
        """Return what `frozen` returns, for a network with these parameters."""
        return None

    def weights(self, trained: PyTree) -> dict[str, Params]:
        return {self.component: trained}

    def offload(self, networks: Mapping[str, nnx.Module]) -> None:
        self._split.clear()
        super().offload(networks)

    def split(self, name: str) -> tuple[Network, Params]:
        """Split a frozen network of the pipeline, only once, because that takes 7 ms on the host."""
        if name not in self._split:
            self._split[name] = Network.split(getattr(self.pipe, name))
        return self._split[name]

    def encoded_by(self, name: str, *args: jax.Array, method: str = "__call__") -> PyTree:
        """Run a frozen network of the pipeline."""
        return call(*self.split(name), *args, method=method)

    def text_reader(self, **options: Any) -> Reader:
        """Return a reader of captions too; `options` are those of `reader_of`."""
        length = self.config.text_length or self.pipe.prior_text_encoder.config.max_position_embeddings
        return reader_of(self.config, tokenizer=self.pipe.prior_tokenizer, length=length, **options)

    def encode_text(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
        """Encode captions `[B, T]` of the reader with the text tower."""
        output = self.encoded_by("prior_text_encoder", jnp.asarray(ids))
        return {
            "prompt_embeds": output.text_embeds,
            "text_encoder_hidden_states": output.last_hidden_state,
            "text_mask": jnp.asarray(mask),
        }

    def encode_empty_prompt(self) -> dict[str, jax.Array]:
        """Encode the empty prompt, `[1, ...]` each, at the length of `text_reader`."""
        ids, mask = tokenize(
            self.pipe.prior_tokenizer, [""], self.pipe.prior_text_encoder.config.max_position_embeddings
        )
        length = self.config.text_length
        return self.encode_text(ids[:, :length], mask[:, :length])

    def draw(self) -> Draw:
        dropout = self.config.condition_dropout
        dropped_condition = self.dropped_condition() if dropout else {}

        def draw(batch: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
            of_time, of_noise, of_dropout = jax.random.split(key, 3)
            given = {**batch, **self.draw_also(batch, key)}
            clean = self.clean(batch)
            given["noise"] = jax.random.normal(of_noise, clean.shape, jnp.float32)
            given |= self.draw_timesteps(of_time, len(clean))
            if dropout:
                dropped = jax.random.bernoulli(of_dropout, dropout, (len(clean),))
                for name, value in unpadded(dropped_condition, given).items():
                    given[name] = jnp.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), value, given[name])
            return given

        return draw

    def draw_timesteps(self, key: jax.Array, count: int) -> dict[str, jax.Array]:
        """Draw the timestep of each of `count` examples."""
        return {"timesteps": jax.random.randint(key, (count,), 0, len(self.alphas_cumprod()))}

    def loss(self) -> Loss:
        network, alphas = Network.split(self.module)[0], jnp.asarray(self.alphas_cumprod(), jnp.float32)

        def loss(trained: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
            return self.loss_of_batch(network, trained, batch, alphas)

        return loss

    @abstractmethod
    def clean(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return what noise is added to, of an encoded batch."""

    def sample(self, items: Sequence[Captioned]) -> Image.Image:
        side = self.config.resolution
        prompts = list(self.config.validation_prompts) or [items[0].text]
        options = {"height": side, "width": side, "return_dict": False} | self.sample_options()
        seeds = [self.config.seed] * len(prompts)
        [generated] = self.pipe(prompts, generator=seeds, **self.sample_pictures(items, len(prompts)), **options)
        return contact_sheet([generated])

    def sample_options(self) -> dict[str, Any]:
        """Return further arguments of the call that generates sample pictures."""
        return {"num_inference_steps": SAMPLE_STEPS}

    def sample_pictures(self, items: Sequence[Captioned], count: int) -> dict[str, np.ndarray | list[Image.Image]]:
        """Return the pictures that the pipeline needs for `count` sample pictures, by its arguments."""
        return {}

    def recommended(self) -> RecommendedSettings:
        """Return the settings that the result recommends: those of the folder of the network that was trained."""
        own = self.stage._recommended
        return dataclasses.replace(own, fast=None) if isinstance(own, RecommendedSettings) else NO_SETTINGS

    def export(self, target: Path, trained: PyTree, items: Sequence[Captioned]) -> None:
        stage, before = self.stage, self.stage._recommended
        stage._recommended = self.recommended()
        try:
            with without_fast_adapter(self.module):
                stage.save_pretrained(target, overwrite=True)
        finally:
            stage._recommended = before


def unpadded(
    text: Mapping[str, jax.Array | np.ndarray], batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array | np.ndarray]:
    """Cut arrays of a caption `[1, T, ...]` to the length of a batch's, which leaves out padding."""
    return {n: x[:, : batch[n].shape[1]] if n in TEXT_ARRAYS else x for n, x in text.items()}
