"""Networks of random weights that are as small as can be: they compile in seconds, where `tiny` takes a minute."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax import diffusion, lora, rewards
from kandinsky_jax.diffusion import Network
from kandinsky_jax.models import UNet2DConditionModel, VQModel
from kandinsky_jax.models.layers import Shapes
from kandinsky_jax.models.movq import MoVQConfig
from kandinsky_jax.models.unet_config import UNetConfig
from kandinsky_jax.schedulers import DDIMScheduler

EMBED = 12  # numbers of an image embedding
SIDE = 8  # of a picture, in pixels


def randomized(cls: Any, config: Any, scale: float, seed: int) -> nnx.Module:
    """A module with normal weights; those of norms are about 1."""
    network, shapes = Network.split(cls(config, rngs=Shapes()))
    rng = np.random.default_rng(seed)

    def leaf(name: str, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape) + (len(shape) == 1 and name.endswith("weight")), jnp.float32)

    return network.bind(lora.unflat({name: leaf(name, x.shape) for name, x in lora.flat(shapes).items()}))


def pipeline() -> Any:
    """What `DecoderSampler.from_pipeline` needs of a combined pipeline."""
    unet = UNetConfig(
        down_block_types=("SimpleCrossAttnDownBlock2D",),
        up_block_types=("SimpleCrossAttnUpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        encoder_hid_dim=EMBED,
        attention_head_dim=8,
    )
    movq = MoVQConfig(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        num_vq_embeddings=16,
    )
    prior = types.SimpleNamespace(get_zero_embed=lambda: jnp.full((1, EMBED), 0.1))
    return types.SimpleNamespace(
        unet=randomized(UNet2DConditionModel, unet, 0.2, 0), movq=randomized(VQModel, movq, 0.05, 1), prior_pipe=prior
    )


def sampler(steps: int = 3, eta: float = 1.0, guider: Any = None, **options: Any) -> rewards.DecoderSampler:
    """A sampler with DDIM and guidance, pictures of 8 x 8 pixels."""
    schedule = DDIMScheduler(eta=eta, clip_sample=False, **options).schedule(steps)
    guider = diffusion.ClassifierFreeGuidance(2.0) if guider is None else guider
    return rewards.DecoderSampler.from_pipeline(pipeline(), schedule, guider=guider, height=SIDE, width=SIDE)


def embeds(count: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(count, EMBED)), jnp.float32)


def redness(images: jax.Array, prompts: jax.Array) -> jax.Array:
    """A differentiable reward: how much more red than blue there is."""
    return 10 * (images[..., 0] - images[..., 2]).mean((1, 2))
