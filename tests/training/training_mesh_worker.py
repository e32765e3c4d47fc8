"""Loss curves on meshes of eight simulated devices; run by test_training_mesh.py in a process of its own.

python -m tests.training.training_mesh_worker OUT.json KIND MESH...

MESH is one of MESHES, "by a rule", or "resumed": a run that changes its mesh.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tests.xla_flags import devices

os.environ["XLA_FLAGS"] = devices(8)

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec

from kandinsky_jax import KandinskyV22CombinedPipeline
from kandinsky_jax.parallel.mesh import default_mesh
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.distillation import DistillationConfig
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.mesh import FSDP_AXIS, make_training_mesh
from kandinsky_jax.training.step import OptimizerConfig, Trainer
from kandinsky_jax.training.tasks import TrainingTask, make_task
from tests.conftest import SHAPES_MODEL

STEPS, BATCH = 10, 16
TOKENS = 24  # of the longest caption of a batch, without padding
MESHES = {"alone": (1, 1), "data=8": (8, 1), "fsdp=8": (1, 8), "data=2,fsdp=4": (2, 4)}
SETTINGS = {
    Kind.DECODER: OptimizerConfig(learning_rate=1e-3, ema_decay=0.9),
    Kind.PRIOR: OptimizerConfig(learning_rate=1e-3, gradient_accumulation_steps=2),
    Kind.LORA_DECODER: OptimizerConfig(learning_rate=1e-2),
    Kind.MOVQ: OptimizerConfig(learning_rate=1e-4, adam_epsilon=1e-3),
    Kind.CLIP: OptimizerConfig(learning_rate=1e-3, gradient_accumulation_steps=2),
    # Small steps: targets come from the average, so that what rounding has changed would come back larger.
    Kind.DISTILL_DECODER: OptimizerConfig(learning_rate=2e-5, adam_epsilon=1e-3, ema_decay=0.9),
    Kind.DISTILL_PRIOR: OptimizerConfig(learning_rate=1e-4, adam_epsilon=1e-3, ema_decay=0.9),
}
# Dropout too, so that everything random is compared.
OPTIONS = {"condition_dropout": 0.3, "snr_gamma": 5.0}
DISTILLATION = DistillationConfig(lora=False, method="tcd", guidance_scale_max=8.0, ema_target=True)


def batches() -> list[dict[str, np.ndarray]]:
    """Encoded batches of random numbers."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    text = {"prompt_embeds": (64,), "text_encoder_hidden_states": (TOKENS, 64)}
    return [
        {"image_embeds": normal(BATCH, 64), "latents": normal(BATCH, 8, 8, 4)}
        | {name: normal(BATCH, *shape) for name, shape in text.items()}
        | {"text_mask": np.arange(TOKENS) < rng.integers(5, 20, (BATCH, 1))}
        | {"pixels": np.tanh(normal(BATCH, 32, 32, 3)), "clip_pixels": normal(BATCH, 32, 32, 3)}
        | {"input_ids": rng.integers(0, 500, (BATCH, 77), np.int32)}
        for _ in range(STEPS)
    ]


def given(batch: dict[str, np.ndarray], task: TrainingTask) -> dict[str, np.ndarray]:
    names = {
        "prior": ("image_embeds", "prompt_embeds", "text_encoder_hidden_states", "text_mask"),
        "unet": ("image_embeds", "latents"),
        "movq": ("pixels",),
        "text_encoder": ("input_ids", "clip_pixels"),
    }
    return {name: batch[name] for name in names[next(iter(task.modules))]}


def trainer_of(task: TrainingTask, mesh_name: str, rules=None) -> Trainer:
    mesh = make_training_mesh(*MESHES[mesh_name])
    small = 1 << 10  # elements of the smallest array that is sharded
    return Trainer(task.loss(), SETTINGS[task.kind], task.frozen(), mesh, rules, small, task.draw(), task.uses_average)


def curve(task: TrainingTask, mesh_name: str, rules=None) -> dict:
    """The losses, and how the largest leaf of each part of the state is divided."""
    trainer = trainer_of(task, mesh_name, rules)
    state = trainer.init(task.initial(jax.random.key(1)))
    losses = []
    for batch in batches():
        state, metrics = trainer.step(state, given(batch, task), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    parts = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema, "frozen": trainer.frozen}
    return {"losses": losses} | {name: share(part) for name, part in parts.items() if part is not None}


def share(tree) -> float:
    """Of all numbers, how many the first device has."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)


def resumed(task: TrainingTask) -> list[float]:
    """Half of the steps on one mesh, kept, and the others on another."""
    first, second = (trainer_of(task, name) for name in ("fsdp=8", "data=2,fsdp=4"))
    state, losses = first.init(task.initial(jax.random.key(1))), []
    for i, batch in enumerate(batches()):
        if i == STEPS // 2:
            with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as keeper:
                keeper.save(Path(folder) / "state", state)
                keeper.wait_until_finished()
                state = keeper.restore(Path(folder) / "state", second.init(task.initial(jax.random.key(2))))
        trainer = first if i < STEPS // 2 else second
        state, metrics = trainer.step(state, given(batch, task), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return losses


def main(target: str, kind: Kind, meshes: list[str]) -> None:
    pipe = KandinskyV22CombinedPipeline.from_pretrained(SHAPES_MODEL, dtype="float32")
    pipe = {Kind.MOVQ: pipe.decoder_pipe, Kind.CLIP: pipe.prior_pipe}.get(kind, pipe)
    options = {"distillation": DISTILLATION} if kind.startswith("distill-") else OPTIONS
    config = Config(model="", data="", output="", resolution=64, optimizer=SETTINGS[kind], **options)
    found: dict[str, dict] = {}
    for name in meshes:
        pipe.shard(None if name == "alone" else default_mesh())  # as from_pretrained does, with one device or several
        task = make_task(kind, config, pipe)
        if name == "resumed":
            found[name] = {"losses": resumed(task)}
        elif name == "by a rule":
            found[name] = curve(task, "fsdp=8", [(r"ff\.net\.0\.proj\.weight$", PartitionSpec(FSDP_AXIS))])
        else:
            found[name] = curve(task, name)
    Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Kind(sys.argv[2]), sys.argv[3:])
