"""Configuration of a training run: a TOML file with the fields of `Config`; all faults are reported at once."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import quote, shorten, summarize
from kandinsky_jax.common.remote import is_url, read_bytes
from kandinsky_jax.lora import LoraConfig
from kandinsky_jax.schedulers.base import near
from kandinsky_jax.training.distillation import DistillationConfig
from kandinsky_jax.training.dpo import DPOConfig
from kandinsky_jax.training.mesh import MeshConfig
from kandinsky_jax.training.step import OptimizerConfig

MAX_CONFIG_BYTES = 2**18
MAX_TRAIN_STEPS = 2**31 - 1  # of an int32
MAX_BATCH = 2**20
MAX_RESOLUTION = 16384
MAX_SEED = 2**63 - 1


class TrainingConfigError(ValueError):
    """A configuration is invalid; `faults` lists all faults, one per line of the message."""

    def __init__(self, path: str, faults: list[str]):
        self.faults = [shorten(fault, 200) for fault in faults]
        found = summarize(self.faults, 250, "\n  ")
        super().__init__(f"{shorten(path, 240)} is not a configuration to train with:\n  {found}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a training run.

    Args:
        model: "tiny", a folder, or a Hub repository, of the decoder; its prior is found as in the pipelines.
        prior: folder or Hub repository of the prior, if it is not found.
        data: a folder with metadata.jsonl, pictures with a .txt or .json each, WebDataset tars or Parquet; a path or an
            fsspec URL such as `gs://bucket/photos`.
        output: folder for checkpoints, metrics and the result; a path that all hosts share, or a `gs://` URL.
        resolution: of the pictures, a multiple of 64.
        train_batch_size: examples of a step, over all its accumulation parts.
        seed: of the order of the data, timesteps, noise and dropout.
        snr_gamma: of min-SNR weighting; absent turns it off.
        condition_dropout: fraction of examples without their condition.
        random_flip, random_crop: augmentation of the pictures.
        precompute: encode every picture and caption once before the first step, and store the results in `output`;
            training of the prior or the decoder then reads no pictures and runs neither MoVQ nor the towers.
        text_length: tokens that captions are cut to, for short captions; absent is the text tower's length.
        quantized_share: in MoVQ's training, the fraction of pictures that are decoded from the codebook's vectors; the
            others are decoded from the latents themselves, as in the pipelines.
        checkpointing_steps, checkpoints_total_limit: interval of checkpoints, and how many are kept.
        validation_prompts, validation_steps: prompts of sample pictures, and their interval; 0 is never.
        mesh: the devices, see `kandinsky_jax.training.mesh.MeshConfig`.
        wandb_project: of Weights & Biases, if wandb is installed; absent is none.
        optimizer: see `kandinsky_jax.training.step.OptimizerConfig`.
        lora: see `kandinsky_jax.lora.LoraConfig`.
        distillation: see `kandinsky_jax.training.distillation.DistillationConfig`.
        dpo: see `kandinsky_jax.training.dpo.DPOConfig`.
    """

    model: str
    data: str
    output: str
    prior: str | None = None
    resolution: int = 512
    train_batch_size: int = 16
    seed: int = 0
    snr_gamma: float | None = None
    condition_dropout: float = 0.0
    random_flip: bool = False
    random_crop: bool = False
    precompute: bool = False
    text_length: int | None = None
    quantized_share: float = 1.0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 3
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    wandb_project: str | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    dpo: DPOConfig = dataclasses.field(default_factory=DPOConfig)

    def __post_init__(self) -> None:
        faults = []
        for name, where in (("model", self.model), ("prior", self.prior)):
            if where is not None and is_url(where):
                faults.append(f"{name} must be a folder or a Hub repository, got the URL {shorten(where, 80)}")
        if is_url(self.output) and not self.output.startswith("gs://"):
            faults.append(f"output must be a folder or a gs:// URL, got {shorten(self.output, 80)}")
        for name, most in (
            ("resolution", MAX_RESOLUTION),
            ("train_batch_size", MAX_BATCH),
            ("checkpointing_steps", MAX_TRAIN_STEPS),
            ("checkpoints_total_limit", MAX_TRAIN_STEPS),
        ):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1, got {shorten(getattr(self, name))}")
            elif getattr(self, name) > most:
                faults.append(f"{name} must be at most {most}, got {shorten(getattr(self, name))}")
        if self.resolution % 64:
            faults.append(f"resolution must be a multiple of 64, got {self.resolution}")
        if self.train_batch_size % self.optimizer.gradient_accumulation_steps:
            faults.append(
                f"train_batch_size={shorten(self.train_batch_size)} cannot be divided into "
                f"gradient_accumulation_steps={self.optimizer.gradient_accumulation_steps} parts"
            )
        if not 0 <= self.seed <= MAX_SEED:
            faults.append(f"seed must be from 0 to {MAX_SEED}, got {shorten(self.seed)}")
        if self.snr_gamma is not None and not 0 < self.snr_gamma < math.inf:
            faults.append(f"snr_gamma must be above 0, got {self.snr_gamma}")
        if self.text_length is not None and self.text_length < 3:
            faults.append(f"text_length must be at least 3, got {shorten(self.text_length)}")
        if not 0 <= self.quantized_share <= 1:
            faults.append(f"quantized_share must be from 0 to 1, got {self.quantized_share}")
        if self.precompute and (self.random_flip or self.random_crop):
            faults.append("precompute keeps one form of each picture: turn random_flip and random_crop off")
        if not 0 <= self.condition_dropout < 1:
            faults.append(f"condition_dropout must be from 0 to below 1, got {self.condition_dropout}")
        if not 0 <= self.validation_steps <= MAX_TRAIN_STEPS:
            faults.append(f"validation_steps must not be negative, got {shorten(self.validation_steps)}")
        faults += _lora_faults(self.lora)
        if faults:
            raise ValueError("\n  ".join(faults))


def _lora_faults(config: LoraConfig) -> list[str]:
    faults = []
    if not 1 <= config.rank <= MAX_BATCH:
        faults.append(f"lora.rank must be from 1 to {MAX_BATCH}, got {shorten(config.rank)}")
    if config.alpha is not None and not 0 < config.alpha < math.inf:
        faults.append(f"lora.alpha must be above 0, got {config.alpha}")
    try:
        re.compile(config.pattern)
    except (re.error, RecursionError, OverflowError) as error:
        faults.append(f"lora.pattern is not a regular expression: {shorten(error)}")
    return faults


def load(path: str | Path) -> Config:
    """Read a configuration from a path or an fsspec URL.

    Raises:
        TrainingConfigError: listing everything that is wrong with it.
    """
    try:
        read = read_bytes if is_url(path) else reading.read_bytes
        raw = tomllib.loads(reading.decode(read(str(path), MAX_CONFIG_BYTES)))
    except FileNotFoundError:
        raise TrainingConfigError(str(path), ["there is no such file"]) from None
    except RecursionError:
        raise TrainingConfigError(str(path), ["it is nested too deeply"]) from None
    except ValueError as error:  # ReadError, tomllib's own, and integers of thousands of digits
        raise TrainingConfigError(str(path), [shorten(error, 200)]) from None
    faults: list[str] = []
    config = _build(Config, raw, "", faults)
    if faults or config is None:
        raise TrainingConfigError(str(path), faults)
    return config


def _build(cls: type[Any], raw: dict[str, object], prefix: str, faults: list[str]) -> Any:
    """Build a dataclass from a table; None if there are faults, which are added to `faults`."""
    before = len(faults)
    hints, given = typing.get_type_hints(cls), {}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in raw if name not in fields]
    faults += [f"there is no {prefix}{shorten(name, 60)}; {near(name[:60], fields)}" for name in unknown]
    for name, field in fields.items():
        if name in raw:
            given[name] = _value(hints[name], raw[name], f"{prefix}{name}", faults)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            faults.append(f"{prefix}{name} is missing")
    if len(faults) > before:
        return None
    try:
        return cls(**given)
    except ValueError as error:
        faults += [f"{prefix}{line.strip().removeprefix(prefix)}" for line in str(error).split("\n")]
        return None


def _value(kind: Any, value: object, name: str, faults: list[str]) -> object:
    """Convert a value to a field's type."""
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return _build(typing.cast(type, kind), value, f"{name}.", faults)
        faults.append(f"{name} must be a table, got {quote(value)}")
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        faults.append(f"{name} must be a list of texts, got {quote(value)}")
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < 2**1000:
            return float(value)
        faults.append(f"{name} is too large")
    elif not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        faults.append(f"{name} must be {kind.__name__}, got {quote(value)}")
    return value
