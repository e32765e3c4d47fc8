"""Configuration of the UNet, restricted to the variants of Kandinsky 2.2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from kandinsky_jax.common.errors import quote
from kandinsky_jax.models.config import NetworkConfig, block_faults
from kandinsky_jax.models.quantization_config import QuantizationConfig


@dataclasses.dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Configuration of the UNet. Defaults are those of diffusers where they fit Kandinsky 2.2."""

    CLASS_NAME: ClassVar[str] = "UNet2DConditionModel"
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        # These only matter to blocks that are not used here, or to training.
        {
            "addition_embed_type_num_heads",
            "addition_time_embed_dim",
            "attention_type",
            "downsample_padding",
            "reverse_transformer_layers_per_block",
            "transformer_layers_per_block",
            "use_linear_projection",
            "dual_cross_attention",
            "upcast_attention",
            "projection_class_embeddings_input_dim",
            "class_embeddings_concat",
            "dropout",
        }
    )
    FIXED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "act_fn": ("silu", "swish"),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "encoder_hid_dim_type": ("image_proj",),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1, 1.0),
        "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0, 1),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("scale_shift",),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }
    DOWN: ClassVar[tuple[str, str]] = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
    UP: ClassVar[tuple[str, str]] = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")

    sample_size: int | None = None  # latents along a side in training; the default size of the command line
    in_channels: int = 4
    out_channels: int = 8
    down_block_types: tuple[str, ...] = (DOWN[0], DOWN[1], DOWN[1], DOWN[1])
    up_block_types: tuple[str, ...] = (UP[1], UP[1], UP[1], UP[0])
    block_out_channels: tuple[int, ...] = (384, 768, 1152, 1536)
    layers_per_block: int = 3
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    encoder_hid_dim: int = 1280
    attention_head_dim: int = 64
    time_embedding_dim: int | None = None
    addition_embed_type: str = "image"
    quantization_config: QuantizationConfig | None = None

    def faults(self) -> list[str]:
        faults = block_faults(self)
        if self.addition_embed_type not in ("image", "image_hint"):
            given = quote(self.addition_embed_type)
            faults.append(f"addition_embed_type={given} is not supported, only image, image_hint")
        cross = {
            w for w, kind in zip(self.block_out_channels, self.down_block_types, strict=False) if kind == self.DOWN[1]
        }
        if odd := [w for w in cross if w % self.attention_head_dim]:
            faults.append(f"block_out_channels has {odd}, no multiples of attention_head_dim={self.attention_head_dim}")
        return faults

    @property
    def takes_hint(self) -> bool:
        return self.addition_embed_type == "image_hint"

    @property
    def time_dim(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]
