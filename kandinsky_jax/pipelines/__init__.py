"""What a user calls: one class per mode, named as in diffusers."""

from kandinsky_jax.pipelines.base import ImagePipelineOutput, Pipeline
from kandinsky_jax.pipelines.combined import KandinskyV22CombinedPipeline
from kandinsky_jax.pipelines.prior import KandinskyPriorPipelineOutput, KandinskyV22PriorPipeline
from kandinsky_jax.pipelines.text2img import KandinskyV22Pipeline

__all__ = [
    "ImagePipelineOutput",
    "KandinskyPriorPipelineOutput",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22PriorPipeline",
    "Pipeline",
]
