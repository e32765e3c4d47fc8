"""CLIP's text and vision towers with their projections, which embed a prompt or a picture.

Reference: Radford et al. 2021 (arXiv 2103.00020); transformers' CLIPTextModelWithProjection and
CLIPVisionModelWithProjection, whose tensor names the attributes bear.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kandinsky_jax.common.errors import quote
from kandinsky_jax.common.fields import Bounds
from kandinsky_jax.common.types import Array, Bool, Float, Int
from kandinsky_jax.models.compatibility import TorchModuleMixin
from kandinsky_jax.models.config import NetworkConfig
from kandinsky_jax.models.hooks import AttentionLayer
from kandinsky_jax.models.layers import (
    ACTIVATIONS,
    Rngs,
    conv,
    dtype_of,
    embed,
    layer_norm,
    linear,
    param,
    split_heads,
)
from kandinsky_jax.models.pretrained import PretrainedNetwork

# Fields of any transformers configuration that do not change an encoder's output.
_BOOKKEEPING = frozenset(
    "architectures model_type transformers_version torch_dtype dtype attention_dropout dropout initializer_factor "
    "initializer_range bos_token_id pad_token_id gradient_checkpointing use_cache return_dict output_attentions "
    "output_hidden_states id2label label2id problem_type is_encoder_decoder logit_scale_init_value "
    "chunk_size_feed_forward tie_word_embeddings".split()
)


@dataclasses.dataclass(frozen=True)
class _CLIPConfig(NetworkConfig):
    IGNORED: ClassVar[frozenset[str]] = _BOOKKEEPING
    MODEL_TYPE: ClassVar[str] = ""

    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    BOUNDS: ClassVar[Bounds] = dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id"), (-1, 1 << 20))

    def faults(self) -> list[str]:
        faults = []
        if self.hidden_act not in ACTIVATIONS:
            faults.append(f"hidden_act={quote(self.hidden_act)} is not supported, only {sorted(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            faults.append(f"hidden_size={self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        return faults

    def to_dict(self) -> dict:
        # transformers names the network under `architectures`, not under `_class_name`.
        fields = super().to_dict()
        name = fields.pop("_class_name")
        return {"architectures": [name], "model_type": self.MODEL_TYPE, **fields}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(_CLIPConfig):
    """Configuration of the text tower, with transformers' defaults."""

    CLASS_NAME: ClassVar[str] = "CLIPTextModelWithProjection"
    MODEL_TYPE: ClassVar[str] = "clip_text_model"
    IGNORED: ClassVar[frozenset[str]] = _BOOKKEEPING - {"bos_token_id", "pad_token_id"}

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    bos_token_id: int = 49406
    pad_token_id: int = 1
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(_CLIPConfig):
    """Configuration of the vision tower, with transformers' defaults."""

    CLASS_NAME: ClassVar[str] = "CLIPVisionModelWithProjection"
    MODEL_TYPE: ClassVar[str] = "clip_vision_model"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3


class CLIPAttention(AttentionLayer):
    def __init__(self, dim: int, heads: int, *, rngs: Rngs):
        self.heads = heads
        self.q_proj = linear(dim, dim, rngs)
        self.k_proj = linear(dim, dim, rngs)
        self.v_proj = linear(dim, dim, rngs)
        self.out_proj = linear(dim, dim, rngs)

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "#B #N #T #T"] | None) -> Float[Array, "B T D"]:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self.attend(q, k, v, mask))


class CLIPMLP(nnx.Module):
    def __init__(self, dim: int, hidden: int, act: str, *, rngs: Rngs):
        self.act = act
        self.fc1 = linear(dim, hidden, rngs)
        self.fc2 = linear(hidden, dim, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    def __init__(self, config: _CLIPConfig, *, rngs: Rngs):
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = CLIPAttention(dim, config.num_attention_heads, rngs=rngs)
        self.layer_norm1 = layer_norm(dim, rngs, eps)
        self.mlp = CLIPMLP(dim, config.intermediate_size, config.hidden_act, rngs=rngs)
        self.layer_norm2 = layer_norm(dim, rngs, eps)

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "#B #N #T #T"] | None) -> Float[Array, "B T D"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    def __init__(self, config: _CLIPConfig, *, rngs: Rngs):
        self.layers = nnx.List([CLIPEncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "#B #N #T #T"] | None = None
    ) -> Float[Array, "B T D"]:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class CLIPTextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: Rngs):
        self.token_embedding = embed(config.vocab_size, config.hidden_size, rngs)
        self.position_embedding = embed(config.max_position_embeddings, config.hidden_size, rngs)

    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))


class CLIPTextTransformer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: Rngs):
        self.embeddings = CLIPTextEmbeddings(config, rngs=rngs)
        self.encoder = CLIPEncoder(config, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)

    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        length = input_ids.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]  # [1, 1, T, T]
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids), causal))


class CLIPTextOutput(NamedTuple):
    text_embeds: jax.Array
    last_hidden_state: jax.Array


class CLIPTextModelWithProjection(TorchModuleMixin, PretrainedNetwork, nnx.Module):
    """The text tower. It attends to padding, which only the prior masks."""

    CONFIG = CLIPTextConfig

    def __init__(self, config: CLIPTextConfig, *, rngs: Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config, rngs=rngs)
        self.text_projection = linear(config.hidden_size, config.projection_dim, rngs, bias=False)

    def __call__(self, input_ids: Int[Array, "B T"]) -> CLIPTextOutput:
        """Encode token ids.

        Args:
            input_ids: int `[B, T]`, T at most `max_position_embeddings`, each row with an end token.
        Returns:
            text_embeds `[B, projection_dim]`: the projected hidden state at the end token;
            last_hidden_state `[B, T, hidden_size]`: after the final layer norm.
        """
        hidden = self.text_model(input_ids)  # [B, T, D]
        if self.config.eos_token_id == 2:
            # Old configurations name a wrong end token; there the end token is the largest id of the vocabulary.
            end = jnp.argmax(input_ids, axis=-1)
        else:
            end = jnp.argmax(input_ids == self.config.eos_token_id, axis=-1)
        pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]  # [B, D]
        return CLIPTextOutput(self.text_projection(pooled), hidden)


class CLIPVisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs: Rngs):
        dim, patch = config.hidden_size, config.patch_size
        positions = (config.image_size // patch) ** 2 + 1
        self.class_embedding = param((dim,), rngs)
        self.patch_embedding = conv(
            config.num_channels, dim, rngs, kernel=patch, stride=patch, padding="VALID", bias=False
        )
        self.position_embedding = embed(positions, dim, rngs)

    def __call__(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        patches = self.patch_embedding(pixel_values)  # [B, H/P, W/P, D]
        b, _, _, dim = patches.shape
        cls = jnp.broadcast_to(self.class_embedding[...], (b, 1, dim))
        x = jnp.concatenate([cls, patches.reshape(b, -1, dim)], axis=1)  # [B, 1 + HW/P^2, D]
        return x + self.position_embedding(jnp.arange(x.shape[1]))


class CLIPVisionTransformer(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, *, rngs: Rngs):
        self.embeddings = CLIPVisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)  # the reference's spelling
        self.encoder = CLIPEncoder(config, rngs=rngs)
        self.post_layernorm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)


class CLIPVisionModelWithProjection(TorchModuleMixin, PretrainedNetwork, nnx.Module):
    """The vision tower, which computes image embeddings."""

    CONFIG = CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig, *, rngs: Rngs):
        self.config = config
        self.vision_model = CLIPVisionTransformer(config, rngs=rngs)
        self.visual_projection = linear(config.hidden_size, config.projection_dim, rngs, bias=False)

    def __call__(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Encode pictures.

        Args:
            pixel_values: float `[B, image_size, image_size, 3]`, normalised with CLIP's mean and standard deviation.
        Returns:
            image_embeds `[B, projection_dim]`.
        """
        return self.head(self.vision_model.encoder(self.stem(pixel_values)))

    def stem(self, pixel_values: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        """Compute the encoder's input: pictures -> tokens `[B, T, hidden_size]`."""
        return self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixel_values.astype(dtype_of(self))))

    def head(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B P"]:
        """Compute the output of the encoder's tokens: image_embeds."""
        return self.visual_projection(self.vision_model.post_layernorm(hidden[:, 0]))
