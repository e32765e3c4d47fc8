"""The networks, independent of files, sampling loops and devices."""

from flax import nnx

from kandinsky_jax.models.attention import attend, attention_weights
from kandinsky_jax.models.clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from kandinsky_jax.models.config import ConfigError
from kandinsky_jax.models.hooks import AttentionFunction, AttentionLayer, capture, with_attention
from kandinsky_jax.models.movq import VQModel
from kandinsky_jax.models.prior import PriorTransformer
from kandinsky_jax.models.unet import UNet2DConditionModel

NETWORKS: dict[str, type[nnx.Module]] = {
    cls.__name__: cls
    for cls in (
        CLIPTextModelWithProjection,
        CLIPVisionModelWithProjection,
        PriorTransformer,
        UNet2DConditionModel,
        VQModel,
    )
}

__all__ = [
    "NETWORKS",
    "AttentionFunction",
    "AttentionLayer",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "ConfigError",
    "PriorTransformer",
    "UNet2DConditionModel",
    "VQModel",
    "attend",
    "attention_weights",
    "capture",
    "with_attention",
]
