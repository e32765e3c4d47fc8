"""MoVQ: pictures to latents and back.

Reference: Zheng et al. 2022 (arXiv 2209.09002); diffusers' VQModel with norm_type "spatial". The decoder's norms are
scaled and shifted by the latents themselves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.types import Array, Float, Int
from kandinsky_jax.models.checks import check_shape
from kandinsky_jax.models.compatibility import TorchModuleMixin
from kandinsky_jax.models.config import NetworkConfig, block_faults
from kandinsky_jax.models.hooks import AttentionLayer
from kandinsky_jax.models.layers import GroupNorm, Rngs, conv, dtype_of, embed, linear
from kandinsky_jax.models.pretrained import PretrainedNetwork
from kandinsky_jax.models.quantization_config import QuantizationConfig
from kandinsky_jax.models.quantized import quantize_layers

NORM_EPS = 1e-6
GROUP_PIXELS = 1 << 20  # four pictures of 512 x 512
SPATIAL_GROUPS = 32  # fixed in the reference's SpatialNorm, whatever norm_num_groups says


@dataclasses.dataclass(frozen=True)
class MoVQConfig(NetworkConfig):
    """The MoVQ's `config.json`; defaults are diffusers', except the block types, which are Kandinsky 2.2's."""

    CLASS_NAME: ClassVar[str] = "VQModel"
    IGNORED: ClassVar[frozenset[str]] = frozenset({"force_upcast"})
    FIXED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "act_fn": ("silu", "swish"),
        "norm_type": ("spatial",),
        "mid_block_add_attention": (True,),
        "lookup_from_codebook": (False,),
    }
    DOWN: ClassVar[tuple[str, str]] = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    UP: ClassVar[tuple[str, str]] = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (DOWN[0], DOWN[0], DOWN[0], DOWN[1])
    up_block_types: tuple[str, ...] = (UP[1], UP[0], UP[0], UP[0])
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    num_vq_embeddings: int = 16384
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    sample_size: int = 32  # neither this nor the scaling factor is read by the Kandinsky 2.2 pipelines
    scaling_factor: float = 0.18215
    quantization_config: QuantizationConfig | None = None

    def faults(self) -> list[str]:
        faults = block_faults(self)
        if odd := [width for width in self.block_out_channels if width % SPATIAL_GROUPS]:
            faults.append(
                f"block_out_channels has {quote(odd)}, no multiples of {SPATIAL_GROUPS}, as spatial norms need"
            )
        return faults

    @property
    def embed_dim(self) -> int:
        return self.vq_embed_dim or self.latent_channels

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


class SpatialNorm(nnx.Module):
    """GroupNorm whose scale and shift are read off the latents, resized to the hidden picture (equation 4)."""

    def __init__(self, dim: int, zq_dim: int, *, rngs: Rngs):
        self.norm_layer = GroupNorm(dim, SPATIAL_GROUPS, NORM_EPS, rngs)
        self.conv_y = conv(zq_dim, dim, rngs, kernel=1)
        self.conv_b = conv(zq_dim, dim, rngs, kernel=1)

    def __call__(self, x: Float[Array, "B H W C"], zq: Float[Array, "B h w zq"] | None) -> Float[Array, "B H W C"]:
        assert zq is not None
        # A 1x1 convolution commutes with nearest resizing: do it on the small picture, then resize.
        scale, shift = self.conv_y(zq), self.conv_b(zq)  # [B, h, w, C]
        arguments = (x, *self.norm_layer.statistics(x), scale, shift)
        return jax.lax.platform_dependent(*arguments, tpu=self._by_blocks, default=self._resized)

    def _resized(
        self, x: jax.Array, mean: jax.Array, factor: jax.Array, scale: jax.Array, shift: jax.Array
    ) -> jax.Array:
        _, height, width, _ = x.shape
        normed = self.norm_layer.normalized(x, mean, factor)
        return normed * _nearest(scale, height, width) + _nearest(shift, height, width)

    def _by_blocks(
        self, x: jax.Array, mean: jax.Array, factor: jax.Array, scale: jax.Array, shift: jax.Array
    ) -> jax.Array:
        """`_resized` with the pixels that share one of the small picture on axes of their own. In any other form, and
        without the barriers, XLA for TPUs writes the resized scale and shift to memory, or the norm in float32."""
        (b, height, width, channels), (_, h, w, _) = x.shape, scale.shape
        blocks = jax.lax.optimization_barrier(x.reshape(b, h, height // h, w, width // w, channels))
        mean, factor, scale, shift = (part[:, :, None, :, None] for part in (mean, factor, scale, shift))
        done = jax.lax.optimization_barrier(self.norm_layer.normalized(blocks, mean, factor) * scale + shift)
        return done.reshape(x.shape)


class PlainNorm(GroupNorm):
    """The encoder's GroupNorm, called like a SpatialNorm."""

    def __init__(self, dim: int, groups: int, *, rngs: Rngs):
        super().__init__(dim, groups, NORM_EPS, rngs)

    def __call__(self, x: Float[Array, "B H W C"], zq: jax.Array | None = None) -> Float[Array, "B H W C"]:
        return super().__call__(x)


def _nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    b, h, w, c = x.shape
    fy, fx = height // h, width // w
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, fy, w, fx, c)).reshape(b, height, width, c)


def _norm(config: MoVQConfig, dim: int, spatial: bool, rngs: Rngs) -> SpatialNorm | PlainNorm:
    if spatial:
        return SpatialNorm(dim, config.latent_channels, rngs=rngs)
    return PlainNorm(dim, config.norm_num_groups, rngs=rngs)


class ResnetBlock(nnx.Module):
    def __init__(self, config: MoVQConfig, cin: int, cout: int, spatial: bool, *, rngs: Rngs):
        self.norm1 = _norm(config, cin, spatial, rngs)
        self.conv1 = conv(cin, cout, rngs)
        self.norm2 = _norm(config, cout, spatial, rngs)
        self.conv2 = conv(cout, cout, rngs)
        self.conv_shortcut = conv(cin, cout, rngs, kernel=1) if cin != cout else None

    def __call__(self, x: Float[Array, "B H W C"], zq: Float[Array, "B h w zq"] | None) -> Float[Array, "B H W D"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(x, zq)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden, zq)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(AttentionLayer):
    """One-headed self-attention over all pixels."""

    def __init__(self, config: MoVQConfig, dim: int, spatial: bool, *, rngs: Rngs):
        if spatial:
            self.spatial_norm = SpatialNorm(dim, config.latent_channels, rngs=rngs)
        else:
            self.group_norm = PlainNorm(dim, config.norm_num_groups, rngs=rngs)
        self.to_q = linear(dim, dim, rngs)
        self.to_k = linear(dim, dim, rngs)
        self.to_v = linear(dim, dim, rngs)
        self.to_out = nnx.List([linear(dim, dim, rngs)])

    def __call__(self, x: Float[Array, "B H W C"], zq: Float[Array, "B h w zq"] | None) -> Float[Array, "B H W C"]:
        b, h, w, c = x.shape
        norm = self.group_norm if zq is None else self.spatial_norm
        hidden = norm(x, zq).reshape(b, h * w, c)
        q, k, v = (proj(hidden)[:, :, None] for proj in (self.to_q, self.to_k, self.to_v))  # [B, hw, 1, C]
        return x + self.to_out[0](self.attend(q, k, v)).reshape(b, h, w, c)


class Resampler(nnx.Module):
    """A convolution in a module of its own, as the reference names it (`downsamplers.0.conv`)."""

    def __init__(self, dim: int, stride: int, *, rngs: Rngs):
        # The reference pads right and bottom only before its strided convolution.
        padding = ((0, 1), (0, 1)) if stride == 2 else 1
        self.conv = conv(dim, dim, rngs, stride=stride, padding=padding)

    def __call__(self, x: Float[Array, "B H W C"], *, doubled: bool = False) -> Float[Array, "B H2 W2 C"]:
        return self.conv(x, doubled=doubled)


class Block(nnx.Module):
    """ResNet blocks, each followed by an attention if `cross`; then a halving or doubling of the sides, if any."""

    def __init__(
        self,
        config: MoVQConfig,
        cin: int,
        cout: int,
        layers: int,
        *,
        attention: bool,
        down: bool = False,
        up: bool = False,
        spatial: bool,
        rngs: Rngs,
    ):
        self.resnets = nnx.List(
            [ResnetBlock(config, cin if i == 0 else cout, cout, spatial, rngs=rngs) for i in range(layers)]
        )
        self.attentions = nnx.List(
            [PixelAttention(config, cout, spatial, rngs=rngs) for _ in range(layers * attention)]
        )
        self.downsamplers = nnx.List([Resampler(cout, 2, rngs=rngs) for _ in range(down)])
        self.upsamplers = nnx.List([Resampler(cout, 1, rngs=rngs) for _ in range(up)])

    def __call__(
        self, x: Float[Array, "B H W C"], zq: Float[Array, "B h w zq"] | None = None
    ) -> Float[Array, "B H2 W2 D"]:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, zq)
            if self.attentions:
                x = self.attentions[i](x, zq)
        for downsampler in self.downsamplers:
            x = downsampler(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, doubled=True)
        return x


class MoVQMidBlock(nnx.Module):
    def __init__(self, config: MoVQConfig, dim: int, spatial: bool, *, rngs: Rngs):
        self.resnets = nnx.List([ResnetBlock(config, dim, dim, spatial, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([PixelAttention(config, dim, spatial, rngs=rngs)])

    def __call__(
        self, x: Float[Array, "B H W C"], zq: Float[Array, "B h w zq"] | None = None
    ) -> Float[Array, "B H W C"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, zq), zq), zq)


class Encoder(nnx.Module):
    def __init__(self, config: MoVQConfig, *, rngs: Rngs):
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], rngs)
        self.down_blocks = nnx.List(
            [
                Block(
                    config,
                    widths[max(i - 1, 0)],
                    widths[i],
                    config.layers_per_block,
                    attention=kind == config.DOWN[1],
                    down=i < len(widths) - 1,
                    spatial=False,
                    rngs=rngs,
                )
                for i, kind in enumerate(config.down_block_types)
            ]
        )
        self.mid_block = MoVQMidBlock(config, widths[-1], spatial=False, rngs=rngs)
        self.conv_norm_out = PlainNorm(widths[-1], config.norm_num_groups, rngs=rngs)
        self.conv_out = conv(widths[-1], config.latent_channels, rngs)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w zq"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: MoVQConfig, *, rngs: Rngs):
        widths = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, widths[0], rngs)
        self.mid_block = MoVQMidBlock(config, widths[0], spatial=True, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                Block(
                    config,
                    widths[max(i - 1, 0)],
                    widths[i],
                    config.layers_per_block + 1,
                    attention=kind == config.UP[1],
                    up=i < len(widths) - 1,
                    spatial=True,
                    rngs=rngs,
                )
                for i, kind in enumerate(config.up_block_types)
            ]
        )
        self.conv_norm_out = SpatialNorm(widths[-1], config.latent_channels, rngs=rngs)
        self.conv_out = conv(widths[-1], config.out_channels, rngs)

    def __call__(self, x: Float[Array, "B h w zq"], zq: Float[Array, "B h w zq"]) -> Float[Array, "B H W 3"]:
        x = self.mid_block(self.conv_in(x), zq)
        for block in self.up_blocks:
            x = block(x, zq)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x, zq)))


class VectorQuantizer(nnx.Module):
    """The codebook. The pipelines decode without it (`force_not_quantize`); training and `quantize` use it."""

    def __init__(self, codes: int, dim: int, *, rngs: Rngs):
        self.embedding = embed(codes, dim, rngs)

    def __call__(self, z: Float[Array, "B h w C"]) -> tuple[Float[Array, "B h w C"], Int[Array, "B h w"]]:
        """Look up the nearest codes.

        Args:
            z: `[..., D]`.
        Returns:
            codes `[..., D]`, and their indices `[...]`, int32. Gradients go to the codebook alone; see
            `straight_through` for gradients to z.
        """
        codebook = self.embedding.embedding[...]
        distance = jnp.sum(z**2, axis=-1, keepdims=True) - 2 * z @ codebook.T + jnp.sum(codebook**2, axis=-1)
        indices = jnp.argmin(distance, axis=-1)
        return codebook[indices], indices


def straight_through(z: Float[Array, "*B C"], codes: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Return codes whose gradient is that of what they were looked up for, as if nothing had been quantised.

    Source: van den Oord et al. 2017 (arXiv 1711.00937), section 3.2; diffusers' VectorQuantizer.

    Args:
        z, codes: `[..., D]`.
    Returns:
        `[..., D]`, the codes but for rounding.
    """
    return z + jax.lax.stop_gradient(codes - z)


class VQModel(TorchModuleMixin, PretrainedNetwork, nnx.Module):
    """The MoVQ autoencoder, NHWC."""

    CONFIG = MoVQConfig
    QUANTIZED: ClassVar[str] = r"decoder\..*\.(conv1|conv2|conv_shortcut|conv|to_q|to_k|to_v|to_out\.0)"

    def __init__(self, config: MoVQConfig, *, rngs: Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = conv(config.latent_channels, config.embed_dim, rngs, kernel=1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, config.embed_dim, rngs=rngs)
        self.post_quant_conv = conv(config.embed_dim, config.latent_channels, rngs, kernel=1)
        self.decoder = Decoder(config, rngs=rngs)
        quantize_layers(self, config.quantization_config)

    def encode(self, pixels: Float[Array, "B H W C_in"]) -> Float[Array, "B h w C"]:
        """Pictures `[B, H, W, 3]` in -1..1, sides multiples of 8 -> latents `[B, H/8, W/8, 4]`, unscaled."""
        check_shape("pixels", pixels.shape, "B", "H", "W", self.config.in_channels)
        return self.quant_conv(self.encoder(pixels.astype(dtype_of(self))))

    def decode(
        self, latents: Float[Array, "B h w C"], force_not_quantize: bool = True, through_codebook: bool = False
    ) -> Float[Array, "B H W 3"]:
        """Decode latents.

        Args:
            latents: `[B, h, w, 4]`.
            force_not_quantize: decode the latents as they are, as the pipelines do; False snaps them to the codebook.
            through_codebook: where they are snapped, pass gradients to the latents unchanged (`straight_through`), and
                none to the codebook. Otherwise they go to the codebook, and none to the latents.
        Returns:
            pictures `[B, 8h, 8w, 3]`, about -1..1, not clamped.
        """
        check_shape("latents", latents.shape, "B", "h", "w", self.config.latent_channels)
        latents = latents.astype(dtype_of(self))
        if not force_not_quantize:
            codes, _ = self.quantize(latents)
            latents = straight_through(latents, codes) if through_codebook else codes
        # The spatial norms see the latents before post_quant_conv.
        return self.decoder(self.post_quant_conv(latents), latents)

    def decode_in_groups(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """`decode`, on a GPU group by group: as many pictures at a time as divide the batch and have `GROUP_PIXELS`.

        Sixteen pictures of 512 x 512 at once take 5.4 GB for as long as it lasts, more than the UNet; by fours 1.4 GB,
        and four of them are enough work for the whole chip.
        """
        pixels = latents.shape[1] * latents.shape[2] * self.config.scale_factor**2
        size = group_size(len(latents), max(1, GROUP_PIXELS // pixels))
        if size == len(latents):
            return self.decode(latents)
        by_groups = functools.partial(in_groups, self.decode, size)
        return jax.lax.platform_dependent(latents, cuda=by_groups, default=self.decode)


def group_size(batch: int, most: int) -> int:
    """The largest group of at most `most` that divides a batch."""
    return max(size for size in range(1, min(most, batch) + 1) if batch % size == 0)


def in_groups(function: Callable[[jax.Array], jax.Array], size: int, batch: jax.Array) -> jax.Array:
    """A function of a batch `[B, ...]`, computed for `size` examples at a time, one group after the other."""
    groups = jax.lax.map(function, batch.reshape(-1, size, *batch.shape[1:]))
    return groups.reshape(len(batch), *groups.shape[2:])
