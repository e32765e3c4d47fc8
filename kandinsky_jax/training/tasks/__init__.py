"""Training tasks, one file a network: encoding of batches, loss, sample pictures, and export of the result."""

from __future__ import annotations

from kandinsky_jax.pipelines import Pipeline
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.kinds import Kind, trains_lora
from kandinsky_jax.training.tasks.base import TrainingTask
from kandinsky_jax.training.tasks.clip import CLIPTask
from kandinsky_jax.training.tasks.decoder import DecoderTask
from kandinsky_jax.training.tasks.diffusion import DiffusionTask
from kandinsky_jax.training.tasks.distillation import DistillationTask, DistillDecoderTask, DistillPriorTask
from kandinsky_jax.training.tasks.dpo import DPODecoderTask, DPOPriorTask, DPOTask
from kandinsky_jax.training.tasks.lora import LoraTask
from kandinsky_jax.training.tasks.movq import MoVQTask
from kandinsky_jax.training.tasks.prior import PriorTask

__all__ = [
    "CLIPTask",
    "DPODecoderTask",
    "DPOPriorTask",
    "DPOTask",
    "DecoderTask",
    "DiffusionTask",
    "DistillDecoderTask",
    "DistillPriorTask",
    "DistillationTask",
    "LoraTask",
    "MoVQTask",
    "PriorTask",
    "TrainingTask",
    "make_task",
    "needs_captions",
]

_DIFFUSION: tuple[type[DiffusionTask], ...] = (
    *(PriorTask, DecoderTask),
    *(DistillPriorTask, DistillDecoderTask),
    *(DPOPriorTask, DPODecoderTask),
)
_TASKS: tuple[type[TrainingTask], ...] = (*_DIFFUSION, MoVQTask, CLIPTask)
_FULL: dict[Kind, type[TrainingTask]] = {task.kind: task for task in _TASKS}
_LORA: dict[Kind, type[DiffusionTask]] = {task.lora_kind: task for task in _DIFFUSION}


def needs_captions(kind: Kind, config: Config) -> bool:
    """Whether training skips pictures without a caption."""
    return kind != Kind.DISTILL_DECODER or config.distillation.embeddings == "prior"


def make_task(kind: Kind, config: Config, pipe: Pipeline | None = None) -> TrainingTask:
    """Make the task of a kind of training.

    Args:
        pipe: the model, float32; None loads it.
    """
    if trains_lora(kind, config):
        pipe = DiffusionTask.load(config) if pipe is None else pipe
        return LoraTask(pipe, config, _LORA[kind](pipe, config))
    task = _FULL[kind]
    return task(task.load(config) if pipe is None else pipe, config)
