"""The decoder's UNet: predicts the noise in a latent picture, conditioned on a CLIP image embedding.

Reference: diffusers' UNet2DConditionModel as Kandinsky 2.2 configures it (embedding type "image" or "image_hint",
simple cross-attention blocks, scale-shift ResNet blocks that also do the down- and upsampling).

`condition` does everything that depends on the condition alone (image tokens, their keys and values in every
attention, the embedding added to the time embedding, further input channels); `__call__` is one evaluation.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from kandinsky_jax.common.types import Array, Bool, Float
from kandinsky_jax.models.checks import Timestep, check_condition, check_shape, timesteps
from kandinsky_jax.models.compatibility import TorchModuleMixin
from kandinsky_jax.models.hooks import AttentionFunction, with_attention
from kandinsky_jax.models.layers import (
    GroupNorm,
    Rngs,
    TimestepEmbedding,
    conv,
    dtype_of,
    layer_norm,
    linear,
    timestep_embedding,
)
from kandinsky_jax.models.pretrained import PretrainedNetwork
from kandinsky_jax.models.quantized import quantize_layers
from kandinsky_jax.models.unet_blocks import BlockCondition, DownBlock, MidBlock, UpBlock
from kandinsky_jax.models.unet_config import UNetConfig

IMAGE_TOKENS = 32  # fixed in the reference's ImageProjection, in no configuration
HINT_LATENTS = 4
# (channels in, channels out, stride) of the hint encoder, fixed in the reference's ImageHintTimeEmbedding
HINT_LAYERS = (
    (3, 16, 1),
    (16, 16, 1),
    (16, 32, 2),
    (32, 32, 1),
    (32, 96, 2),
    (96, 96, 1),
    (96, 256, 2),
    (256, HINT_LATENTS, 1),
)


class ImageProjection(nnx.Module):
    """Projection of the image embedding to tokens for cross-attention."""

    def __init__(self, image_embed_dim: int, cross_attention_dim: int, *, rngs: Rngs):
        self.image_embeds = linear(image_embed_dim, IMAGE_TOKENS * cross_attention_dim, rngs)
        self.norm = layer_norm(cross_attention_dim, rngs)

    def __call__(self, image_embeds: Float[Array, "B D"]) -> Float[Array, "B tokens C"]:
        tokens = self.image_embeds(image_embeds)
        return self.norm(tokens.reshape(tokens.shape[0], IMAGE_TOKENS, -1))  # [B, 32, cross_attention_dim]


class ImageTimeEmbedding(nnx.Module):
    """Projection of the image embedding that is added to the time embedding; with `hint`, also the hint encoder."""

    def __init__(self, image_embed_dim: int, time_embed_dim: int, hint: bool, *, rngs: Rngs):
        self.image_proj = linear(image_embed_dim, time_embed_dim, rngs)
        self.image_norm = layer_norm(time_embed_dim, rngs)
        if hint:
            layers: list[nnx.Conv | None] = []
            for cin, cout, stride in HINT_LAYERS:
                layers += [conv(cin, cout, rngs, stride=stride), None]  # odd indices are the reference's SiLU
            self.input_hint_block = nnx.List(layers[:-1])

    def __call__(self, image_embeds: Float[Array, "B D"]) -> Float[Array, "B C"]:
        return self.image_norm(self.image_proj(image_embeds))

    def encode_hint(self, hint: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        x = self.input_hint_block[0](hint)
        for layer in self.input_hint_block[2::2]:
            x = layer(jax.nn.silu(x))
        return x  # [B, H/8, W/8, 4]


class UNetCondition(NamedTuple):
    """Precomputed contributions of the conditioning to every step, nested as the UNet's blocks are."""

    embedding: jax.Array  # added to the time embedding, [B, time_dim]
    down_blocks: list[BlockCondition]
    mid_block: BlockCondition
    up_blocks: list[BlockCondition]
    channels: (
        jax.Array | None
    )  # extra input channels: latents of the hint, or of the kept picture and the mask; [B, h, w, c]


class FeatureCache(NamedTuple):
    """The deep blocks' output of an earlier evaluation, for DeepCache (Ma et al. 2024, arXiv 2312.00858).

    Every evaluation with the cache uses up one of `refresh`; beyond its end the last one counts.

    Args:
        features: what the last layer of the last up block takes besides its skip connection, `[B, h, w, C]`, in the
            UNet's dtype.
        refresh: bool `[N]`; in which evaluations the deep blocks run. In the others `features` stay.
        done: int `[]`; the evaluations so far.
    """

    features: jax.Array
    refresh: jax.Array
    done: jax.Array


class UNet2DConditionModel(TorchModuleMixin, PretrainedNetwork, nnx.Module):
    """The UNet: `condition` once per picture, then `__call__` once per step. NHWC throughout."""

    CONFIG = UNetConfig
    QUANTIZED: ClassVar[str] = (
        r"(down_blocks|mid_block|up_blocks)\..*\."
        r"(conv1|conv2|conv_shortcut|time_emb_proj|to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)"
    )

    def __init__(self, config: UNetConfig, *, rngs: Rngs):
        self.config = config
        widths, time_dim = config.block_out_channels, config.time_dim
        self.conv_in = conv(config.in_channels, widths[0], rngs)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim, time_dim, rngs=rngs)
        self.encoder_hid_proj = ImageProjection(config.encoder_hid_dim, config.cross_attention_dim, rngs=rngs)
        self.add_embedding = ImageTimeEmbedding(config.encoder_hid_dim, time_dim, config.takes_hint, rngs=rngs)

        last = len(widths) - 1
        self.down_blocks = nnx.List([])
        for i, kind in enumerate(config.down_block_types):
            cross = kind == config.DOWN[1]
            self.down_blocks.append(
                DownBlock(config, widths[max(i - 1, 0)], widths[i], cross=cross, sample=i < last, rngs=rngs)
            )
        self.mid_block = MidBlock(config, widths[-1], rngs=rngs)
        self.up_blocks = nnx.List([])
        reverse = widths[::-1]
        for i, kind in enumerate(config.up_block_types):
            previous, out, skip = reverse[max(i - 1, 0)], reverse[i], reverse[min(i + 1, last)]
            cross = kind == config.UP[1]
            self.up_blocks.append(UpBlock(config, previous, out, skip, cross=cross, sample=i < last, rngs=rngs))

        self.conv_norm_out = GroupNorm(widths[0], config.norm_num_groups, config.norm_eps, rngs)
        self.conv_out = conv(widths[0], config.out_channels, rngs)
        quantize_layers(self, config.quantization_config)

    def condition(
        self,
        image_embeds: Float[Array | np.ndarray, "B D"],
        hint: Float[Array | np.ndarray, "b H W 3"] | None = None,
        channels: Float[Array | np.ndarray, "b h w c"] | None = None,
    ) -> UNetCondition:
        """Compute everything that depends only on the conditioning.

        Args:
            image_embeds: CLIP image embeddings, `[B, encoder_hid_dim]`.
            hint: for an "image_hint" UNet, `[b, H, W, 3]` in 0..1, H and W eight times the latents' sides.
            channels: for an inpainting UNet, latents of the kept part and the keep mask, `[b, h, w, 5]`.

        b is B, or a divisor of it, such as half where guidance has doubled the embeddings.

        Raises:
            ValueError: where a shape does not fit, or there is a hint for a UNet that takes none.
        """
        self._check_conditioning(image_embeds, hint, channels)
        dtype = dtype_of(self)
        image_embeds = jnp.asarray(image_embeds, dtype)
        tokens = self.encoder_hid_proj(image_embeds)
        if hint is not None:
            channels = self.add_embedding.encode_hint(jnp.asarray(hint, dtype))
        if channels is not None:
            channels = jnp.tile(channels.astype(dtype), (len(image_embeds) // len(channels), 1, 1, 1))  # [B, h, w, c]
        return UNetCondition(
            embedding=self.add_embedding(image_embeds),
            down_blocks=[block.condition(tokens) for block in self.down_blocks],
            mid_block=self.mid_block.condition(tokens),
            up_blocks=[block.condition(tokens) for block in self.up_blocks],
            channels=channels,
        )

    def _check_conditioning(
        self, image_embeds: ArrayLike, hint: jax.Array | np.ndarray | None, channels: jax.Array | np.ndarray | None
    ) -> None:
        """Raise ValueError for what `condition` cannot take."""
        config, shape = self.config, np.shape(image_embeds)
        check_shape("image_embeds", shape, "B", config.encoder_hid_dim)
        if hint is not None and not config.takes_hint:
            raise ValueError("hint is given, but this UNet takes none; its addition_embed_type is not image_hint")
        for name, given, axes in (("hint", hint, ("b", "H", "W", 3)), ("channels", channels, ("b", "h", "w", "c"))):
            if given is None:
                continue
            check_shape(name, given.shape, *axes)
            if shape[0] % len(given):
                raise ValueError(f"{name} is of a batch of {len(given)}; needed is {shape[0]}, or a divisor of it")
        if channels is not None and channels.shape[-1] >= config.in_channels:
            raise ValueError(
                f"channels has {channels.shape[-1]} of them, but this UNet takes {config.in_channels} with the "
                "sample's; an inpainting UNet takes 5 besides, one for text none"
            )

    def feature_cache(
        self, images: int, height: int, width: int, refresh: Bool[Array | np.ndarray, "N"]
    ) -> FeatureCache:
        """Make the cache before the first evaluation.

        Args:
            images: B of the evaluations; twice those that are generated where guidance joins two.
            height, width: of the latents.
            refresh: bool `[N]`, see `FeatureCache`; its first must be true where its values are known.
        Raises:
            ValueError: for a `refresh` of another shape or without a first evaluation.
        """
        refresh = jnp.asarray(refresh, bool)
        if refresh.ndim != 1 or not len(refresh):
            raise ValueError(f"refresh has the shape {list(refresh.shape)}; needed is [N], at least one")
        if not isinstance(refresh, jax.core.Tracer) and not refresh[0]:
            raise ValueError("refresh[0] is False, but there are no features to keep before the first evaluation")
        features = jnp.zeros((images, height, width, self.config.block_out_channels[0]), dtype_of(self))
        return FeatureCache(features, refresh, jnp.zeros((), jnp.int32))

    def __call__(
        self,
        sample: Float[Array | np.ndarray, "B h w C"],
        timestep: Timestep,
        condition: UNetCondition,
        attention: AttentionFunction | None = None,
        cache: FeatureCache | None = None,
    ) -> Float[Array, "B h w out"] | tuple[Float[Array, "B h w out"], FeatureCache]:
        """Evaluate the network.

        Args:
            sample: noisy latents, `[B, h, w, in_channels]` less the condition's further channels; h and w multiples of
                2 ** (number of downsamplings).
            timestep: one, or one per image `[B]`, 0 .. num_train_timesteps - 1.
            condition: of the same batch, from `condition`.
            attention: in the place of the ordinary attention of all blocks.
            cache: from `feature_cache` or the evaluation before; where it says so, all but the outermost layers are
                left out, and their earlier output is used.
        Returns:
            `[B, h, w, out_channels]`: the noise, and for 8 channels the interpolant of the log-variance. With a cache,
            this and the next cache.
        """
        if attention is not None:
            return with_attention(self, attention)(sample, timestep, condition, cache=cache)
        check_shape("sample", np.shape(sample), "B", "h", "w", "C")
        check_condition(condition, UNetCondition, "embedding", len(sample), "unet.condition(image_embeds)")
        dtype, timestep = dtype_of(self), timesteps(timestep, len(sample))
        time = timestep_embedding(timestep, self.config.block_out_channels[0]).astype(dtype)
        temb = jax.nn.silu(self.time_embedding(time) + condition.embedding)  # [B, time_dim]; every block starts so
        x = jnp.asarray(sample, dtype)
        if condition.channels is not None:
            x = jnp.concatenate([x, condition.channels], axis=-1)
        self._check_sample(sample.shape, x.shape)
        first, last_block, last_part = self.conv_in(x), self.up_blocks[-1], condition.up_blocks[-1]
        if cache is None:
            x, skips = self._inner_blocks(first, temb, condition)
            return self._output(last_block(x, temb, last_part, skips))

        def compute() -> jax.Array:
            x, skips = self._inner_blocks(first, temb, condition)
            return last_block.layers(x, temb, last_part, skips[1:])

        self._check_cache(cache, first)
        fresh = cache.refresh[cache.done]  # JAX takes the last one for an index beyond the end
        features = jax.lax.cond(fresh, compute, lambda: cache.features)
        x = last_block.layers(features, temb, last_part, [first], start=self.config.layers_per_block)
        return self._output(x), FeatureCache(features, cache.refresh, cache.done + 1)

    def _inner_blocks(
        self, first: jax.Array, temb: jax.Array, condition: UNetCondition
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Run all blocks but the last one, for which they give the input and the skip connections.

        Args:
            first: the first convolution's output, `[B, h, w, C]`.
            temb: `[B, time_dim]`.
        """
        skips = [first]
        for down_block, part in zip(self.down_blocks, condition.down_blocks, strict=True):
            skips += down_block(skips[-1], temb, part)
        x = self.mid_block(skips[-1], temb, condition.mid_block)
        taken = self.config.layers_per_block + 1  # skip connections of an up block
        for up_block, part in zip(self.up_blocks[:-1], condition.up_blocks[:-1], strict=True):
            x = up_block(x, temb, part, skips[-taken:])
            skips = skips[:-taken]
        return x, skips

    def _output(self, x: jax.Array) -> jax.Array:
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def _check_cache(self, cache: FeatureCache, first: jax.Array) -> None:
        """Raise for anything but a cache of the first convolution's shape."""
        if not isinstance(cache, FeatureCache):
            raise TypeError(f"cache must be what unet.feature_cache(...) returns, got {type(cache).__name__}")
        if cache.features.shape != first.shape:
            raise ValueError(
                f"cache.features has the shape {list(cache.features.shape)}; needed is {list(first.shape)}: make the "
                "cache for the batch, height and width of the sample"
            )

    def _check_sample(self, sample: tuple[int, ...], x: tuple[int, ...]) -> None:
        """Raise ValueError for a sample that does not fit, with its shape and that with the condition's channels."""
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if x[3] == self.config.in_channels and x[1] % factor == 0 and x[2] % factor == 0:
            return
        channels = self.config.in_channels - (x[-1] - sample[-1])
        raise ValueError(
            f"sample has the shape {list(sample)}; needed is [B, h, w, {channels}], channels last, h and w multiples "
            f"of {factor}"
        )
