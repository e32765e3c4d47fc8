"""Pipelines: one class per mode, named as in diffusers."""

from kandinsky_jax.pipelines.auto import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from kandinsky_jax.pipelines.base import Pipeline
from kandinsky_jax.pipelines.combined import CombinedPipeline
from kandinsky_jax.pipelines.compatibility import DiffusionPipeline
from kandinsky_jax.pipelines.controlnet import (
    KandinskyV22ControlnetCombinedPipeline,
    KandinskyV22ControlnetImg2ImgCombinedPipeline,
    KandinskyV22ControlnetImg2ImgPipeline,
    KandinskyV22ControlnetPipeline,
)
from kandinsky_jax.pipelines.emb2emb import KandinskyV22PriorEmb2EmbPipeline
from kandinsky_jax.pipelines.img2img import KandinskyV22Img2ImgCombinedPipeline, KandinskyV22Img2ImgPipeline
from kandinsky_jax.pipelines.inpaint import KandinskyV22InpaintCombinedPipeline, KandinskyV22InpaintPipeline
from kandinsky_jax.pipelines.older import KandinskyPriorPipeline, class_of_2_1
from kandinsky_jax.pipelines.outputs import BaseOutput, ImagePipelineOutput, KandinskyPriorPipelineOutput
from kandinsky_jax.pipelines.text2emb import KandinskyV22PriorPipeline
from kandinsky_jax.pipelines.text2img import KandinskyV22CombinedPipeline, KandinskyV22Pipeline

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "BaseOutput",
    "CombinedPipeline",
    "DiffusionPipeline",
    "ImagePipelineOutput",
    "KandinskyPriorPipeline",
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
    "Pipeline",
    "class_of_2_1",
]
