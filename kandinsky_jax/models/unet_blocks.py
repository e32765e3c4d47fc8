"""The UNet's blocks: ResNet block, attention with added keys and values, and the down, middle and up blocks.

Reference: diffusers' ResnetBlock2D (scale_shift), AttnAddedKVProcessor and the *SimpleCrossAttn* blocks.

A block computes its part of the UNet's condition by `condition`, and takes that very part in `__call__`; so a block or
an attention can be replaced by one with the same two methods, whatever its part is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kandinsky_jax.common.types import Array, Float
from kandinsky_jax.models.convolution import upsample_nearest
from kandinsky_jax.models.hooks import AttentionLayer, KeyValue
from kandinsky_jax.models.layers import (
    GroupNorm,
    Rngs,
    conv,
    downsample_mean,
    linear,
    split_heads,
)
from kandinsky_jax.models.unet_config import UNetConfig

Resample = Literal["down", "up"] | None


class BlockCondition(NamedTuple):
    """A block's part of the condition."""

    attentions: list[KeyValue]  # of each of the block's attentions, [B, 32, heads, head_dim]


class ResnetBlock2D(nnx.Module):
    """norm, SiLU, (resample,) conv, norm scaled and shifted by the time, SiLU, conv; plus the (resampled) input."""

    def __init__(self, config: UNetConfig, cin: int, cout: int, *, resample: Resample = None, rngs: Rngs):
        self.resample = resample
        self.norm1 = GroupNorm(cin, config.norm_num_groups, config.norm_eps, rngs)
        self.conv1 = conv(cin, cout, rngs)
        self.time_emb_proj = linear(config.time_dim, 2 * cout, rngs)
        self.norm2 = GroupNorm(cout, config.norm_num_groups, config.norm_eps, rngs)
        self.conv2 = conv(cout, cout, rngs)
        self.conv_shortcut = conv(cin, cout, rngs, kernel=1) if cin != cout else None

    def __call__(self, x: Float[Array, "B h w C"], temb: Float[Array, "B temb"]) -> Float[Array, "B h2 w2 D"]:
        """x: `[B, h, w, cin]`; temb: `[B, time_dim]`, SiLU already applied."""
        hidden = jax.nn.silu(self.norm1(x))
        if self.resample == "down":
            hidden, x = downsample_mean(hidden), downsample_mean(x)
        hidden = self.conv1(hidden, doubled=self.resample == "up")
        scale, shift = jnp.split(self.time_emb_proj(temb)[:, None, None], 2, axis=-1)
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden) * (1 + scale) + shift))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden + (upsample_nearest(x) if self.resample == "up" else x)  # a 1x1 convolution commutes with it


class SimpleCrossAttention(AttentionLayer):
    """Self-attention over pixels, with the keys and values of the image tokens prepended."""

    def __init__(self, config: UNetConfig, dim: int, *, rngs: Rngs):
        self.heads = dim // config.attention_head_dim
        self.group_norm = GroupNorm(dim, config.norm_num_groups, 1e-5, rngs)
        inner = self.heads * config.attention_head_dim
        self.to_q = linear(dim, inner, rngs)
        self.to_k = linear(dim, inner, rngs)
        self.to_v = linear(dim, inner, rngs)
        self.add_k_proj = linear(config.cross_attention_dim, inner, rngs)
        self.add_v_proj = linear(config.cross_attention_dim, inner, rngs)
        self.to_out = nnx.List([linear(inner, dim, rngs)])

    def condition(self, tokens: Float[Array, "B tokens dim"]) -> KeyValue:
        """Compute keys and values `[B, S, heads, head_dim]` of the image tokens `[B, S, cross_attention_dim]`."""
        return split_heads(self.add_k_proj(tokens), self.heads), split_heads(self.add_v_proj(tokens), self.heads)

    def __call__(self, x: Float[Array, "B h w C"], condition: KeyValue) -> Float[Array, "B h w C"]:
        """x: `[B, h, w, C]`; condition: from `condition`; `[B, h, w, C]`."""
        b, h, w, c = x.shape
        hidden = self.group_norm(x.reshape(b, h * w, c))  # [B, hw, C]
        q, k, v = (split_heads(proj(hidden), self.heads) for proj in (self.to_q, self.to_k, self.to_v))
        k = jnp.concatenate([condition[0], k], axis=1)  # [B, S + hw, heads, head_dim]
        v = jnp.concatenate([condition[1], v], axis=1)
        return x + self.to_out[0](self.attend(q, k, v)).reshape(b, h, w, c)


class DownBlock(nnx.Module):
    """ResNet blocks, each followed by attention if `cross`; then downsampling if `sample`."""

    def __init__(self, config: UNetConfig, cin: int, cout: int, *, cross: bool, sample: bool, rngs: Rngs):
        layers = config.layers_per_block
        self.resnets = nnx.List(
            [ResnetBlock2D(config, cin if i == 0 else cout, cout, rngs=rngs) for i in range(layers)]
        )
        self.attentions = nnx.List([SimpleCrossAttention(config, cout, rngs=rngs) for _ in range(layers * cross)])
        self.downsamplers = nnx.List(
            [ResnetBlock2D(config, cout, cout, resample="down", rngs=rngs) for _ in range(sample)]
        )

    def condition(self, tokens: Float[Array, "B tokens dim"]) -> BlockCondition:
        return BlockCondition([attention.condition(tokens) for attention in self.attentions])

    def __call__(
        self, x: Float[Array, "B h w C"], temb: Float[Array, "B temb"], condition: BlockCondition
    ) -> list[jax.Array]:
        """Run the block.

        Args:
            x: `[B, h, w, cin]`.
            temb: `[B, time_dim]`, SiLU already applied.
            condition: from `condition`.
        Returns:
            the output of each layer and of the downsampling, all of which are skip connections; the last one is the
            block's output.
        """
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, condition.attentions[i])
            outputs.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, temb)
            outputs.append(x)
        return outputs


class MidBlock(nnx.Module):
    """A ResNet block, attention, and another ResNet block."""

    def __init__(self, config: UNetConfig, dim: int, *, rngs: Rngs):
        self.resnets = nnx.List([ResnetBlock2D(config, dim, dim, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([SimpleCrossAttention(config, dim, rngs=rngs)])

    def condition(self, tokens: Float[Array, "B tokens dim"]) -> BlockCondition:
        return BlockCondition([attention.condition(tokens) for attention in self.attentions])

    def __call__(
        self, x: Float[Array, "B h w C"], temb: Float[Array, "B temb"], condition: BlockCondition
    ) -> Float[Array, "B h w C"]:
        x = self.attentions[0](self.resnets[0](x, temb), condition.attentions[0])
        return self.resnets[1](x, temb)


class UpBlock(nnx.Module):
    """Counterpart of `DownBlock` with one more layer; each layer takes a skip connection."""

    def __init__(
        self, config: UNetConfig, previous: int, cout: int, skip: int, *, cross: bool, sample: bool, rngs: Rngs
    ):
        layers = config.layers_per_block + 1
        # The first layer has the previous block's width; the last skip comes from the next narrower block.
        widths = [(previous if i == 0 else cout) + (skip if i == layers - 1 else cout) for i in range(layers)]
        self.resnets = nnx.List([ResnetBlock2D(config, width, cout, rngs=rngs) for width in widths])
        self.attentions = nnx.List([SimpleCrossAttention(config, cout, rngs=rngs) for _ in range(layers * cross)])
        self.upsamplers = nnx.List([ResnetBlock2D(config, cout, cout, resample="up", rngs=rngs) for _ in range(sample)])

    def condition(self, tokens: Float[Array, "B tokens dim"]) -> BlockCondition:
        return BlockCondition([attention.condition(tokens) for attention in self.attentions])

    def __call__(
        self,
        x: Float[Array, "B h w C"],
        temb: Float[Array, "B temb"],
        condition: BlockCondition,
        skips: Sequence[jax.Array],
    ) -> Float[Array, "B h2 w2 D"]:
        """Run the block.

        Args:
            x: `[B, h, w, previous]`.
            temb: `[B, time_dim]`, SiLU already applied.
            condition: from `condition`.
            skips: a skip connection per layer, `[B, h, w, ...]`, that of the first layer last.
        """
        if len(skips) != len(self.resnets):
            raise ValueError(f"skips are {len(skips)}; needed are {len(self.resnets)}, one per layer")
        x = self.layers(x, temb, condition, skips)
        for upsampler in self.upsamplers:
            x = upsampler(x, temb)
        return x

    def layers(
        self,
        x: Float[Array, "B h w C"],
        temb: Float[Array, "B temb"],
        condition: BlockCondition,
        skips: Sequence[jax.Array],
        start: int = 0,
    ) -> Float[Array, "B h w D"]:
        """Run some of the layers, without the upsampling.

        Args:
            x, temb, condition: as in `__call__`; x is the output of the layer before.
            skips: of as many layers, that of the first one last.
            start: the first layer.
        """
        for i, skip in enumerate(reversed(skips), start):
            x = self.resnets[i](jnp.concatenate([x, skip], axis=-1), temb)
            if self.attentions:
                x = self.attentions[i](x, condition.attentions[i])
        return x
