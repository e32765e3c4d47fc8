"""The prior: a diffusion transformer that turns a prompt's CLIP text features into a CLIP image embedding.

Reference: Ramesh et al. 2022 (arXiv 2204.06125), section 2.2; diffusers' PriorTransformer.

The sequence is [text tokens, pooled text, time | noisy embedding, prediction slot] under a causal mask. Nothing left
of `time` depends on the step, so `condition` runs those rows once and keeps every layer's keys and values; a step then
runs three tokens. This is exact, and 27 times less arithmetic per step than the whole sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax.common.types import Array, Bool, Float, Num
from kandinsky_jax.models.checks import Timestep, check_condition, check_shape, timesteps
from kandinsky_jax.models.compatibility import TorchModuleMixin
from kandinsky_jax.models.config import NetworkConfig
from kandinsky_jax.models.hooks import AttentionFunction, AttentionLayer, KeyValue, with_attention
from kandinsky_jax.models.layers import (
    Rngs,
    TimestepEmbedding,
    dtype_of,
    layer_norm,
    linear,
    param,
    split_heads,
    timestep_embedding,
)
from kandinsky_jax.models.pretrained import PretrainedNetwork
from kandinsky_jax.models.quantization_config import QuantizationConfig
from kandinsky_jax.models.quantized import quantize_layers


@dataclasses.dataclass(frozen=True)
class PriorConfig(NetworkConfig):
    """Configuration of the prior, with diffusers' defaults."""

    CLASS_NAME: ClassVar[str] = "PriorTransformer"
    FIXED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "time_embed_act_fn": ("silu",),
        "norm_in_type": (None,),
        "embedding_proj_norm_type": (None,),
        "encoder_hid_proj_type": ("linear",),
        "added_emb_type": ("prd",),
    }

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 20
    embedding_dim: int = 768
    num_embeddings: int = 77
    additional_embeddings: int = 4
    dropout: float = 0.0
    time_embed_dim: int | None = None
    embedding_proj_dim: int | None = None
    clip_embed_dim: int | None = None
    quantization_config: QuantizationConfig | None = None

    def faults(self) -> list[str]:
        given = self.additional_embeddings
        return [] if given == 4 else [f"additional_embeddings={given} is not supported, only 4"]


SHORT_TEXT = 24  # tokens, of at most 77: as many as most prompts have, and a multiple of eight
WIDE = 1024  # channels from which leaving out rows takes less time than compiling both ways


class GELU(nnx.Module):
    def __init__(self, dim: int, hidden: int, *, rngs: Rngs):
        self.proj = linear(dim, hidden, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T hidden"]:
        return jax.nn.gelu(self.proj(x), approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, dim: int, *, rngs: Rngs):
        # Index 1 is the reference's dropout, which has no tensors.
        self.net = nnx.List([GELU(dim, 4 * dim, rngs=rngs), None, linear(4 * dim, dim, rngs)])

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.net[2](self.net[0](x))


class SelfAttention(AttentionLayer):
    def __init__(self, dim: int, heads: int, *, rngs: Rngs):
        self.heads = heads
        self.to_q = linear(dim, dim, rngs)
        self.to_k = linear(dim, dim, rngs)
        self.to_v = linear(dim, dim, rngs)
        self.to_out = nnx.List([linear(dim, dim, rngs)])

    def condition(self, x: Float[Array, "B T D"], mask: Bool[Array, "#B #N #T #T"]) -> tuple[jax.Array, KeyValue]:
        """Attend among the text's tokens; also return their keys and values `[B, heads, T + 1, head_dim]`."""
        q, k, v = self._projected(x)
        return self.to_out[0](self.attend(q, k, v, mask)), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    def __call__(self, x: jax.Array, mask: jax.Array, condition: KeyValue) -> jax.Array:
        """Attend from a step's tokens to the text's and to each other."""
        q, k, v = self._projected(x)
        return self.to_out[0](self.attend_after(q, condition, k, v, mask))

    def _projected(self, x: jax.Array) -> list[jax.Array]:
        return [split_heads(proj(x), self.heads) for proj in (self.to_q, self.to_k, self.to_v)]


class BasicTransformerBlock(nnx.Module):
    def __init__(self, dim: int, heads: int, *, rngs: Rngs):
        self.norm1 = layer_norm(dim, rngs)
        self.attn1 = SelfAttention(dim, heads, rngs=rngs)
        self.norm3 = layer_norm(dim, rngs)  # norm2 belongs to a cross-attention that the prior does not have
        self.ff = FeedForward(dim, rngs=rngs)

    def condition(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, KeyValue]:
        """Run the text's tokens.

        Args:
            x: `[B, T + 1, D]`, the text and its pooled embedding.
            mask: bool `[B, 1, T + 1, T + 1]`; True is visible.
        Returns:
            `[B, T + 1, D]`, and what `__call__` takes as condition.
        """
        attended, condition = self.attn1.condition(self.norm1(x), mask)
        x = x + attended
        return x + self.ff(self.norm3(x)), condition

    def __call__(self, x: jax.Array, mask: jax.Array, condition: KeyValue) -> jax.Array:
        """Run a step's tokens.

        Args:
            x: `[B, 3, D]`, the time, the noisy embedding and the slot of the prediction.
            mask: bool `[B, 1, 3, T + 4]`; True is visible.
            condition: of the text, from `condition`.
        Returns:
            `[B, 3, D]`.
        """
        x = x + self.attn1(self.norm1(x), mask, condition)
        return x + self.ff(self.norm3(x))


class PriorCondition(NamedTuple):
    """Precomputed contributions of a prompt to every step, nested as the prior's blocks are."""

    transformer_blocks: list[KeyValue]  # of the text's tokens, [B, heads, num_embeddings + 1, head_dim]
    visible: jax.Array  # bool [B, num_embeddings + 1]


class PriorTransformer(TorchModuleMixin, PretrainedNetwork, nnx.Module):
    """The prior network: `condition` once per prompt, then `__call__` once per step."""

    CONFIG = PriorConfig
    QUANTIZED: ClassVar[str] = r"transformer_blocks\..*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"

    def __init__(self, config: PriorConfig, *, rngs: Rngs):
        self.config = config
        inner = config.num_attention_heads * config.attention_head_dim
        embed, out = config.embedding_dim, config.clip_embed_dim or config.embedding_dim
        length = config.num_embeddings + config.additional_embeddings
        self.time_embedding = TimestepEmbedding(inner, config.time_embed_dim or inner, inner, rngs=rngs)
        self.proj_in = linear(embed, inner, rngs)
        self.embedding_proj = linear(config.embedding_proj_dim or embed, inner, rngs)
        self.encoder_hidden_states_proj = linear(embed, inner, rngs)
        self.positional_embedding = param((1, length, inner), rngs)
        self.prd_embedding = param((1, 1, inner), rngs)
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(inner, config.num_attention_heads, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm_out = layer_norm(inner, rngs)
        self.proj_to_clip_embeddings = linear(inner, out, rngs)
        self.clip_mean = param((1, out), rngs)
        self.clip_std = param((1, out), rngs)
        quantize_layers(self, config.quantization_config)

    def condition(
        self,
        proj_embedding: Float[Array, "B P"],
        encoder_hidden_states: Float[Array, "B T E"],
        attention_mask: Num[Array | np.ndarray, "b T"] | Bool[Array | np.ndarray, "b T"],
        attention: AttentionFunction | None = None,
    ) -> PriorCondition:
        """Run the tokens that do not change between steps.

        Args:
            proj_embedding: the pooled text embedding, `[B, embedding_proj_dim]`.
            encoder_hidden_states: the text tower's hidden states, `[B, num_embeddings, embedding_dim]`; tokens at the
                end that are padding in the whole batch may be left out, since they are masked.
            attention_mask: `[B, T]`, T of the hidden states, False or 0 at padding; `[1, T]` for all.
            attention: in the place of the ordinary attention of all blocks.
        """
        if attention is not None:
            network = with_attention(self, attention)
            return network.condition(proj_embedding, encoder_hidden_states, attention_mask)
        config, dtype = self.config, dtype_of(self)
        check_shape("encoder_hidden_states", encoder_hidden_states.shape, "B", "T", config.embedding_dim)
        images, tokens, _ = encoder_hidden_states.shape
        check_shape("proj_embedding", proj_embedding.shape, images, config.embedding_proj_dim or config.embedding_dim)
        check_shape("attention_mask", attention_mask.shape, "B", tokens)
        if tokens > config.num_embeddings:
            raise ValueError(f"encoder_hidden_states has {tokens} tokens; needed are at most {config.num_embeddings}")
        text = self.encoder_hidden_states_proj(encoder_hidden_states.astype(dtype))  # [B, T, D]
        pooled = self.embedding_proj(proj_embedding.astype(dtype))[:, None]  # [B, 1, D]
        x = jnp.concatenate([text, pooled], axis=1)
        rows = x.shape[1]
        positions = self.positional_embedding[...]
        pooled_at = config.num_embeddings
        x = x + jnp.concatenate([positions[:, : rows - 1], positions[:, pooled_at : pooled_at + 1]], axis=1)
        visible = jnp.pad(jnp.asarray(attention_mask, bool), ((0, 0), (0, 1)), constant_values=True)  # [B, T + 1]
        mask = jnp.tril(jnp.ones((rows, rows), bool)) & visible[:, None, None]  # [B, 1, T + 1, T + 1]
        parts = []
        for block in self.transformer_blocks:
            x, part = block.condition(x, mask)
            parts.append(part)
        return PriorCondition(parts, visible)

    def condition_of_texts(
        self,
        proj_embedding: Float[Array, "B P"],
        encoder_hidden_states: Float[Array, "B T E"],
        attention_mask: Bool[Array, "B T"],
    ) -> PriorCondition:
        """`condition`; a CPU leaves out what is padding in the whole batch, where no text has over 24 tokens.

        Nothing attends to padding, and its keys and values are zeros then. It takes a third of the time, and as it is
        chosen within the program, texts of any length have one program. The last bits may be others.
        """
        given = proj_embedding, encoder_hidden_states, attention_mask
        inner = self.config.num_attention_heads * self.config.attention_head_dim
        if inner < WIDE or attention_mask.shape[1] <= SHORT_TEXT:  # nothing to gain from a second way to compile
            return self.condition(*given)
        return jax.lax.platform_dependent(*given, cpu=self._condition_of_short_texts, default=self.condition)

    def _condition_of_short_texts(self, pooled: jax.Array, hidden: jax.Array, mask: jax.Array) -> PriorCondition:
        left_out = mask.shape[1] - SHORT_TEXT

        def short(pooled: jax.Array, hidden: jax.Array, mask: jax.Array) -> PriorCondition:
            blocks, visible = self.condition(pooled, hidden[:, :SHORT_TEXT], mask[:, :SHORT_TEXT])
            return PriorCondition(jax.tree.map(lambda x: filled(x, 2), blocks), filled(visible, 1))

        def filled(x: jax.Array, axis: int) -> jax.Array:
            zeros = jnp.zeros((*x.shape[:axis], left_out, *x.shape[axis + 1 :]), x.dtype)
            text, pooled = jnp.split(x, [SHORT_TEXT], axis)
            return jnp.concatenate([text, zeros, pooled], axis)

        return jax.lax.cond(mask[:, SHORT_TEXT:].any(), self.condition, short, pooled, hidden, mask)

    def __call__(
        self,
        hidden_states: Float[Array, "B D"],
        timestep: Timestep,
        condition: PriorCondition,
        attention: AttentionFunction | None = None,
    ) -> Float[Array, "B out"]:
        """Evaluate the network.

        Args:
            hidden_states: the noisy image embedding, `[B, embedding_dim]`.
            timestep: one, or one per image `[B]`, 0 .. num_train_timesteps - 1.
            condition: of the same batch, from `condition`.
            attention: in the place of the ordinary attention of all blocks.
        Returns:
            the predicted (normalised) image embedding, `[B, clip_embed_dim]`.
        """
        if attention is not None:
            return with_attention(self, attention)(hidden_states, timestep, condition)
        config, dtype = self.config, dtype_of(self)
        check_shape("hidden_states", hidden_states.shape, "B", config.embedding_dim)
        check_condition(condition, PriorCondition, "visible", len(hidden_states), "prior.condition(...)")
        timestep = timesteps(timestep, len(hidden_states))
        inner = config.num_attention_heads * config.attention_head_dim
        time = self.time_embedding(timestep_embedding(timestep, inner).astype(dtype))[:, None]
        noisy = self.proj_in(hidden_states.astype(dtype))[:, None]
        slot = jnp.broadcast_to(self.prd_embedding[...], noisy.shape)
        x = jnp.concatenate([time, noisy, slot], axis=1)  # [B, 3, D]
        x = x + self.positional_embedding[...][:, -3:]
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((3, 3), bool)), (x.shape[0], 3, 3))
        text = jnp.broadcast_to(condition.visible[:, None], (x.shape[0], 3, condition.visible.shape[1]))
        mask = jnp.concatenate([text, causal], axis=-1)[:, None]  # [B, 1, 3, T + 4]
        for block, part in zip(self.transformer_blocks, condition.transformer_blocks, strict=True):
            x = block(x, mask, part)
        return self.proj_to_clip_embeddings(self.norm_out(x)[:, -1])

    def post_process_latents(self, latents: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Convert from the prior's normalised space to that of CLIP, `[B, clip_embed_dim]`."""
        return latents * self.clip_std[...] + self.clip_mean[...]
