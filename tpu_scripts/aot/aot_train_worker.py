"""Compiles training steps for described TPUs; `aot_train.py` runs it in an environment that has libtpu.

    python -m tpu_scripts.aot.aot_train_worker '{"chips": "v5e:4x4", "fsdp": 16, "batch": 4, "kinds": ["decoder"]}'

Prints one line of JSON per event, as aot_worker does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from kandinsky_jax import KandinskyV22CombinedPipeline
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.diffusion import Network
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.parallel.sharding import REPLICATED
from kandinsky_jax.pipelines import KandinskyV22PriorPipeline
from kandinsky_jax.schedulers import DDPMScheduler
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.distillation import DistillationConfig
from kandinsky_jax.training.kinds import Kind
from kandinsky_jax.training.mesh import EXAMPLES, make_training_mesh, state_shardings
from kandinsky_jax.training.step import Loss, OptimizerConfig, Trainer
from kandinsky_jax.training.tasks import DistillationTask, TrainingTask, make_task
from tpu_scripts.aot.aot_cost import CHIPS, Chip, costs
from tpu_scripts.aot.aot_exchange import totals
from tpu_scripts.aot.aot_worker import OFFICIAL, Shape, first_line, mesh_of

TEXT, EMBED = 77, 1280  # tokens, numbers of an embedding
PARTS = {
    hub.PRIOR: {"prior": "PriorTransformer", "image_encoder": "CLIPVisionModelWithProjection"},
    hub.DECODER: {"unet": "UNet2DConditionModel", "movq": "VQModel"},
}


def official() -> KandinskyV22CombinedPipeline:
    """The pipeline of the official configurations, whose networks are shapes.

    Tokenizer and text tower, which must fit each other, are the embedded model's: batches are encoded already.
    """
    networks = {
        name: abstract(NETWORKS[cls], NETWORKS[cls].CONFIG.from_dict(json.loads(path.read_text())))
        for repository, parts in PARTS.items()
        for name, cls in parts.items()
        for path in [OFFICIAL / repository / name / "config.json"]
    }
    small = KandinskyV22PriorPipeline.from_pretrained("tiny")
    kept = ("tokenizer", "text_encoder", "scheduler", "image_processor")
    shared = {name: small.components[name] for name in kept}
    prior = {f"prior_{name}": part for name, part in shared.items()}
    prior |= {f"prior_{name}": networks.pop(name) for name in PARTS[hub.PRIOR]}
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
    return KandinskyV22CombinedPipeline(scheduler=scheduler, **networks, **prior)


def arrays_of(task: TrainingTask, size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes, without the axis of examples, and dtypes of an encoded batch."""
    wanted: dict[str, tuple[tuple[int, ...], Any]] = {"image_embeds": ((EMBED,), jnp.float32)}
    if "prior" in task.modules:
        wanted["prompt_embeds"] = ((EMBED,), jnp.float32)
        wanted["text_encoder_hidden_states"] = ((TEXT, EMBED), jnp.float32)
        wanted["text_mask"] = ((TEXT,), jnp.bool_)
    else:
        wanted["latents"] = ((size // 8, size // 8, 4), jnp.float32)
    return wanted


def batch_of(task: TrainingTask, rows: int, size: int, mesh: Any) -> dict[str, Shape]:
    """An encoded batch."""
    return {
        name: Shape((rows, *shape), dtype, sharding=NamedSharding(mesh, EXAMPLES))
        for name, (shape, dtype) in arrays_of(task, size).items()
    }


def dropped_condition(task: DistillationTask) -> dict[str, jax.Array]:
    """Zeros in place of what the encoders, which have no weights here, would give; the cost is the same."""
    clean = "image_embeds" if "prior" in task.modules else "latents"
    arrays = arrays_of(task, task.config.resolution)
    return {name: jnp.zeros((1, *shape), dtype) for name, (shape, dtype) in arrays.items() if name != clean}


def placed(trainer: Trainer, tree: Any) -> Any:
    """Shapes where a trainer puts its arrays."""
    assert trainer.mesh is not None
    where = state_shardings(trainer.mesh, tree, trainer.rules)
    return jax.tree.map(lambda leaf, place: Shape(leaf.shape, leaf.dtype, sharding=place), tree, where)


def task_of(program: str, job: dict[str, Any], devices: int) -> TrainingTask:
    """The task of a program: of a kind of training, and `distill-lora-*`, distillation as LoRA."""
    kind, distills = Kind(program.replace("distill-lora", "distill")), program.startswith("distill")
    config = Config(
        model="",
        data="",
        output="",
        train_batch_size=job["batch"] * devices,
        snr_gamma=None if distills else 5.0,
        distillation=DistillationConfig(lora="lora" in program),
        optimizer=OptimizerConfig(dtype="bfloat16", remat=True, gradient_accumulation_steps=job["accumulation"]),
    )
    return make_task(kind, config, official())


def loss_of(task: TrainingTask) -> Loss:
    """The loss of a task without running its encoders."""
    with mock.patch.object(DistillationTask, "dropped_condition", dropped_condition):
        return task.loss()


def compiled(program: str, job: dict[str, Any], mesh: Any) -> Any:
    """The production step of one program, compiled."""
    task: Any = task_of(program, job, mesh.size)
    trainer = Trainer(loss_of(task), task.config.optimizer, mesh=mesh, draw=task.draw(), uses_average=task.uses_average)
    [module] = task.modules.values()
    params = Network.split(module)[1]
    trained = jax.eval_shape(lambda p: task.initial_of(p, jax.random.key(0)), params)
    state = placed(trainer, jax.eval_shape(trainer._initial_state, trained))
    frozen = placed(trainer, jax.eval_shape(task.frozen_of, params))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = Shape(key.shape, key.dtype, sharding=NamedSharding(mesh, REPLICATED))
    batch = batch_of(task, job["batch"] * mesh.size, job["size"], mesh)
    options = {"exec_time_optimization_effort": job["effort"]} if job["effort"] else None
    return trainer.lower(state, batch, key, frozen).compile(options)


def exchange_figures(text: str, mesh: Any, seconds: float, bound_by: str, chip: Chip) -> dict[str, Any]:
    """What is written of a program's collectives, and the time of a step, which they may bound.

    Args:
        text: the compiled program.
        seconds, bound_by: what arithmetic and memory allow.
    """
    found = totals(text, mesh.shape)
    links = sum(total.sent for total in found) / chip.links
    row: dict[str, Any] = {"exchanges": [total._asdict() for total in found], "link_seconds": links}
    return row | {"seconds": max(seconds, links), "bound_by": "links" if links > seconds else bound_by}


def events(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compile what a job asks for, one kind after the other."""
    chip = CHIPS[job["chips"].split(":")[0]]
    devices = mesh_of(job["chips"]).devices.flatten()
    mesh = make_training_mesh(len(devices) // job["fsdp"], job["fsdp"], devices)
    yield {"event": "versions", "jax": jax.__version__}
    for program in job["kinds"]:
        row = {"chips": job["chips"], "program": program, "devices": len(devices)}
        row |= {name: job[name] for name in ("fsdp", "batch", "accumulation", "size", "effort")}
        yield {"event": "compiling", **row}
        began = time.perf_counter()
        try:
            result = compiled(program, job, mesh)
        except Exception as error:  # such as a program that does not fit: the others still count
            yield {"event": "failed", **row, "error": first_line(error)}
            continue
        if job["hlo"]:
            name = f"train-{program}-{job['chips'].replace(':', '-')}-fsdp{job['fsdp']}.txt"
            (Path(job["hlo"]) / name).write_text(result.as_text())
        memory = result.memory_analysis()
        row |= {"compile_seconds": round(time.perf_counter() - began, 1), **costs(result, chip)}
        row |= {"aliased": memory.alias_size_in_bytes}
        row |= exchange_figures(result.as_text(), mesh, row["seconds"], row["bound_by"], chip)
        yield {"event": "done", **row, "spare": chip.memory - resident(row)}


def resident(row: dict[str, Any]) -> float:
    """Bytes of a chip that a step needs: the state, which it writes over, and what it needs besides."""
    return row["arguments"] + row["outputs"] - row["aliased"] + row["temporaries"]


if __name__ == "__main__":
    for event in events(json.loads(sys.argv[1])):
        print(json.dumps(event), flush=True)
