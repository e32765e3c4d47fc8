"""Kandinsky 2.2 for JAX: diffusers' pipelines in Flax NNX, for TPUs, GPUs and CPUs."""

from kandinsky_jax.checkpoint import CheckpointError, load_network, save_network
from kandinsky_jax.compilation import set_compilation_cache
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
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ImagePipelineOutput,
    KandinskyPriorPipelineOutput,
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22ControlnetImg2ImgCombinedPipeline,
    KandinskyV22ControlnetImg2ImgPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky_jax.schedulers import DDIMScheduler, DDPMScheduler, SchedulerError, UnCLIPScheduler

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "CheckpointError",
    "ConfigError",
    "DDIMScheduler",
    "DDPMScheduler",
    "ImagePipelineOutput",
    "KandinskyPriorPipelineOutput",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22ControlnetCombinedPipeline",
    "KandinskyV22ControlnetImg2ImgCombinedPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22InpaintCombinedPipeline",
    "KandinskyV22InpaintPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22PriorEmb2EmbPipeline",
    "KandinskyV22PriorPipeline",
    "PriorTransformer",
    "SchedulerError",
    "TorchGenerator",
    "UNet2DConditionModel",
    "UnCLIPScheduler",
    "VQModel",
    "load_network",
    "save_network",
    "set_compilation_cache",
]
