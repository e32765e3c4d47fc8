"""Kandinsky 2.2 for JAX: diffusers' pipelines in Flax NNX, for TPUs, GPUs and CPUs."""

from kandinsky_jax.checkpoint import CheckpointError, load_network, save_network
from kandinsky_jax.models import (
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    ConfigError,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
)
from kandinsky_jax.noise import TorchGenerator
from kandinsky_jax.pipelines import (
    ImagePipelineOutput,
    KandinskyPriorPipelineOutput,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky_jax.schedulers import DDIMScheduler, DDPMScheduler, SchedulerError, UnCLIPScheduler

__all__ = [
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "CheckpointError",
    "ConfigError",
    "DDIMScheduler",
    "DDPMScheduler",
    "ImagePipelineOutput",
    "KandinskyPriorPipelineOutput",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22PriorPipeline",
    "PriorTransformer",
    "SchedulerError",
    "TorchGenerator",
    "UNet2DConditionModel",
    "UnCLIPScheduler",
    "VQModel",
    "load_network",
    "save_network",
]
