"""Training tasks: encoding of batches, losses, sample pictures, and export of the result.

    pictures -> MoVQ latents ------------------> decoder's loss
    pictures -> CLIP vision -> image embedding --^---> prior's loss
    captions -> CLIP text ----------------------------^

The prior and the decoder are trained here, fully or with LoRA. The towers and MoVQ are then frozen, so the encoding of
a batch (`encode`) can be computed once. Those are trained in `foundations.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from kandinsky_jax import lora
from kandinsky_jax.checkpoint import hub, lora_files
from kandinsky_jax.diffusion import Network, Params
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.pipelines.modes import modes_of, repository_of
from kandinsky_jax.schedulers import DDPMScheduler
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import TEXT_ARRAYS, Captioned, Reader, Skipped
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.losses import decoder_loss, prior_loss
from kandinsky_jax.training.tasks.base import TrainingTask, contact_sheet, first_readable, reader_of, to_movq_pixels

# The reference trains the prior with this noise schedule, and the decoder with its own.
PRIOR_SCHEDULE = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
SAMPLE_STEPS = 25


# The prior and the decoder ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiffusionTask(TrainingTask):
    """Training of the prior or the decoder's UNet, fully or with LoRA.

    With `condition_dropout`, some conditions are replaced as in classifier-free guidance: a decoder's by the vision
    tower's embedding of zeros, a prior's by the empty prompt. An inpainting UNet gets a random mask for each picture: a
    rectangle, or, for one picture in eight, the whole picture.
    """

    _apart: dict[str, tuple[Network, Params]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def load(cls, config: Config) -> Any:
        found = hub.pipeline_class(hub.resolve(config.model, hub.DECODER))
        modes = modes_of(repository_of(found) or hub.DECODER) or modes_of(hub.DECODER)
        return modes[0].combined_class.from_pretrained(config.model, prior=config.prior, dtype="float32")

    @property
    def of_prior(self) -> bool:
        """Whether the prior is trained, rather than the decoder's UNet."""
        return self.kind in (Kind.PRIOR, Kind.LORA_PRIOR)

    @property
    def of_lora(self) -> bool:
        """Whether LoRA is trained, and the network is frozen."""
        return self.kind in (Kind.LORA_PRIOR, Kind.LORA_DECODER)

    @property
    def module(self) -> Any:
        """The trained network."""
        return self.pipe.prior_prior if self.of_prior else self.pipe.unet

    @property
    def modules(self) -> dict[str, Any]:
        return {"prior" if self.of_prior else "unet": self.module}

    @property
    def encoders(self) -> dict[str, Any]:
        """The networks that `encode` runs."""
        pipe = self.pipe
        towers = {"image_encoder": pipe.prior_image_encoder}
        return towers | ({"text_encoder": pipe.prior_text_encoder} if self.of_prior else {"movq": pipe.movq})

    @property
    def _inpaints(self) -> bool:
        return not self.of_prior and self.pipe.decoder_pipe.REPOSITORY == hub.INPAINT

    @property
    def _takes_hint(self) -> bool:
        return not self.of_prior and self.pipe.unet.config.takes_hint

    def initial(self, key: jax.Array) -> Any:
        return self.initial_of(Network.split(self.module)[1], key)

    def initial_of(self, params: Params, key: jax.Array) -> Any:
        """Return the initial values of the trained parameters, for a network with these parameters."""
        return lora.init(params, self.config.lora, key) if self.of_lora else params

    def frozen(self) -> Params | None:
        return Network.split(self.module)[1] if self.of_lora else None

    def network_params(self, trained: Any, frozen: Params | None) -> Params:
        """Return the network's parameters for trained values."""
        return trained if frozen is None else lora.merged(frozen, trained, self.config.lora.scale)

    def weights(self, trained: Any) -> dict[str, Params]:
        return {name: self.network_params(trained, self.frozen()) for name in self.modules}

    # Batches ------------------------------------------------------------------------------------------------------

    def reader(self) -> Reader:
        pipe = self.pipe
        options: dict[str, Any] = {"hints": self._takes_hint}
        if self.of_prior:
            length = pipe.prior_text_encoder.config.max_position_embeddings
            options = {"tokenizer": pipe.prior_tokenizer, "length": self.config.text_length or length}
        return reader_of(self.config, pipe.prior_image_processor, **options)

    @property
    def networks(self) -> dict[str, Any]:
        return self.modules | self.encoders

    def usable(self, items: Sequence[Captioned], skipped: Skipped) -> list[Captioned]:
        found = [item for item in items if item.hint is not None or not self._takes_hint]
        for item in items:
            if item.hint is None and self._takes_hint:
                skipped.add(f"{item.name}: it has no hint, which this UNet takes")
        return found

    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        embeds = self._encoded_by("prior_image_encoder", jnp.asarray(batch["clip_pixels"]))
        found = {"image_embeds": embeds.astype(jnp.float32)}
        if self.of_prior:
            return found | self._text(batch["input_ids"], batch["text_mask"])
        latents = self._encoded_by("movq", to_movq_pixels(batch["pixels"]), method="encode")
        found["latents"] = latents.astype(jnp.float32)
        return found | ({"hint": jnp.asarray(batch["hint"])} if self._takes_hint else {})

    def _encoded_by(self, name: str, *args: jax.Array, method: str = "__call__") -> Any:
        """Run a frozen network; it is split only once, because that takes 7 ms on the host."""
        if name not in self._apart:
            self._apart[name] = Network.split(getattr(self.pipe, name))
        return call(*self._apart[name], *args, method=method)

    def _text(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
        output = self._encoded_by("prior_text_encoder", jnp.asarray(ids))
        return {
            "prompt_embeds": output.text_embeds,
            "text_encoder_hidden_states": output.last_hidden_state,
            "text_mask": jnp.asarray(mask),
        }

    def loss(self) -> Any:
        network = Network.split(self.module)[0]
        schedule = PRIOR_SCHEDULE if self.of_prior else self.pipe.scheduler
        alphas = jnp.asarray(schedule.alphas_cumprod, jnp.float32)
        empty, dropout, gamma = self._empty(), self.config.condition_dropout, self.config.snr_gamma

        def loss(
            trained: Any, batch: Mapping[str, jax.Array], key: jax.Array, frozen: Params | None = None
        ) -> jax.Array:
            of_time, of_noise, of_dropout = jax.random.split(key, 3)
            given = dict(batch)
            clean = given["image_embeds"] if self.of_prior else given["latents"]
            given["noise"] = jax.random.normal(of_noise, clean.shape, jnp.float32)
            given["timesteps"] = jax.random.randint(of_time, (len(clean),), 0, len(alphas))
            if dropout:
                dropped = jax.random.bernoulli(of_dropout, dropout, (len(clean),))
                for name, value in empty.items():
                    if name in TEXT_ARRAYS:
                        value = value[:, : given[name].shape[1]]
                    given[name] = jnp.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), value, given[name])
            if self._inpaints:
                given["repaint_mask"] = random_repaint_masks(jax.random.fold_in(key, 3), *clean.shape[:3])
            function = prior_loss if self.of_prior else decoder_loss
            params = self.network_params(trained, frozen)
            if frozen is not None:  # merged in float32
                params = jax.tree.map(lambda leaf: leaf.astype(self.config.optimizer.dtype), params)
            return function(network, params, **given, alphas_cumprod=alphas, snr_gamma=gamma)

        return loss

    def _empty(self) -> dict[str, jax.Array]:
        """Return the values of dropped conditions, `[1, ...]`."""
        if not self.config.condition_dropout:
            return {}
        if not self.of_prior:
            return {"image_embeds": jnp.asarray(self.pipe.prior_pipe._zero_embed(), jnp.float32)}
        ids, mask = self.pipe.prior_pipe._tokenize([""])
        length = self.config.text_length
        return self._text(ids[:, :length], mask[:, :length])

    # Pictures and the result --------------------------------------------------------------------------------------

    def sample(self, items: Sequence[Captioned]) -> Image.Image:
        side, pipe = self.config.resolution, self.pipe
        prompts = list(self.config.validation_prompts) or [items[0].text]
        pictures: dict[str, Any] = {}
        if self._inpaints or self._takes_hint:
            found = first_readable(reader_of(self.config, hints=self._takes_hint), items, len(prompts))
            rows = [found[i % len(found)] for i in range(len(prompts))]
            if self._takes_hint:
                pictures = {"hint": np.stack([row["hint"] for row in rows])}
            else:
                repaint_mask = np.zeros((side, side), bool)
                repaint_mask[side // 4 : -side // 4, side // 4 : -side // 4] = True
                pictures = {"image": [Image.fromarray(row["pixels"]) for row in rows], "mask_image": repaint_mask}
        options = {"height": side, "width": side, "num_inference_steps": SAMPLE_STEPS, "return_dict": False}
        seeds = [self.config.seed] * len(prompts)
        [generated] = pipe(prompts, generator=seeds, **pictures, **options)
        return contact_sheet([generated])

    def export(self, target: Path, trained: Any, items: Sequence[Captioned]) -> None:
        if self.of_lora:
            for left in target.glob(f".{lora.FILE}.*"):  # of a killed process
                left.unlink(missing_ok=True)
            changes = lora.layer_changes(trained, self.config.lora.scale)
            lora_files.write(target, {"prior" if self.of_prior else "unet": changes})
        else:
            part = self.pipe.prior_pipe if self.of_prior else self.pipe.decoder_pipe
            part.save_pretrained(target, overwrite=True)


def random_repaint_masks(key: jax.Array, batch: int, height: int, width: int) -> jax.Array:
    """Sample rectangles to repaint, 1 inside, float32 `[B, h, w, 1]`; one in eight is the whole picture."""
    of_corner, of_whole = jax.random.split(key)
    inside = []
    for axis, side in enumerate((height, width)):
        ends = jax.random.randint(jax.random.fold_in(of_corner, axis), (2, batch), 0, side)
        at = jnp.arange(side)
        inside.append((at >= ends.min(0)[:, None]) & (at <= ends.max(0)[:, None]))  # [B, side]
    rectangle = inside[0][:, :, None] & inside[1][:, None, :]
    whole = jax.random.bernoulli(of_whole, 1 / 8, (batch, 1, 1))
    return (rectangle | whole).astype(jnp.float32)[..., None]
