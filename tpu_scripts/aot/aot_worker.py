"""Compiles the sampling programs for described TPUs or GPUs; `aot_compile.py` runs it in an environment that has
libtpu or JAX's CUDA plugin.

    python -m tpu_scripts.aot.aot_worker '{"chips": ["v5e:1x1"], "batch": [8], "size": [512], "programs": ["decoder"]}'

Prints one line of JSON per event: what is compiled now, what it cost, what went wrong.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from kandinsky_jax import models
from kandinsky_jax.diffusion import Network, calls
from kandinsky_jax.diffusion.rng import KeyNoise
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.parallel.mesh import make_mesh
from kandinsky_jax.parallel.sharding import REPLICATED, batch_specs, in_memory
from kandinsky_jax.pipelines import denoising
from kandinsky_jax.pipelines.denoising import LoopInputs
from kandinsky_jax.schedulers import DDPMScheduler
from kandinsky_jax.schedulers.table import STATE_SLOTS
from tpu_scripts.aot import aot_gpu
from tpu_scripts.aot.aot_cost import CHIPS, GPUS, costs

OFFICIAL = Path(__file__).parents[2] / "tests" / "official"
NETWORKS = {
    "text_encoder": (models.CLIPTextModelWithProjection, "kandinsky-2-2-prior"),
    "prior": (models.PriorTransformer, "kandinsky-2-2-prior"),
    "unet": (models.UNet2DConditionModel, "kandinsky-2-2-decoder"),
    "movq": (models.VQModel, "kandinsky-2-2-decoder"),
}
Shape = jax.ShapeDtypeStruct


class Program(NamedTuple):
    """A function of `kandinsky_jax.pipelines.denoising`, and what the pipelines give it: shapes that lie on a mesh."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def placed(mesh: Mesh, tree: Any, axis: int | None = None) -> Any:
    """Shapes where the pipelines put their arrays; those without an axis of images lie everywhere."""
    where = jax.tree.map(lambda leaf: REPLICATED if axis is None else batch_specs(mesh, leaf, axis), tree)
    return jax.tree.map(
        lambda leaf, spec: Shape(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)), tree, where
    )


def official(name: str, mesh: Mesh | None = None, dtype: Any = jnp.bfloat16) -> tuple[Network, Any]:
    """A network of the official configuration: its structure, and the shapes of its parameters."""
    cls, repository = NETWORKS[name]
    raw = json.loads((OFFICIAL / repository / name / "config.json").read_text())
    network, params = Network.split(abstract(cls, cls.CONFIG.from_dict(raw)))
    shapes = jax.tree.map(
        lambda leaf: Shape(leaf.shape, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype), params
    )
    if mesh is not None:
        place = NamedSharding(mesh, REPLICATED)
        shapes = jax.tree.map(lambda x: Shape(x.shape, x.dtype, sharding=in_memory(place, x.shape)), shapes)
    return Network(network.graphdef, mesh), shapes


def floats(*shape: int) -> Shape:
    """A float32 array of a shape."""
    return Shape(shape, jnp.float32)


def once(network: Network, params: Any, *arrays: Shape, method: str = "__call__") -> Program:
    """A method of a network, as it is run before or after a loop."""
    assert network.mesh is not None
    rows = [placed(network.mesh, array, 0) for array in arrays]
    return Program(calls._call, (network, params, *rows), {"method": method})


def condition(network: Network, params: Any, arguments: dict[str, Shape], both: bool) -> Program:
    """A network's `condition`, of cond alone or of cond and uncond."""
    assert network.mesh is not None
    rows = placed(network.mesh, arguments, 0)
    return Program(calls._condition, (network, params, rows, rows if both else None, {}), {})


def loop(network: Network, params: Any, of: Program, sample: tuple[int, ...], guided: bool) -> Program:
    """The denoising loop under the condition that a program gives."""
    mesh = network.mesh
    assert mesh is not None
    cond, _ = jax.eval_shape(lambda *given: of.function(network, *given, **of.options), *of.arguments[1:])
    uncond = cond if guided else None
    table = jax.tree.map(lambda column: floats(*column.shape), DDPMScheduler().schedule(50).table)
    noise = KeyNoise(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), sample[0])))
    loop_inputs = LoopInputs(placed(mesh, cond, 0), placed(mesh, uncond, 0))
    state = placed(mesh, floats(STATE_SLOTS, *sample), 1)
    scale, *bounds = placed(mesh, (floats(), *[Shape((), jnp.int32)] * 2))
    scalars = (scale if guided else None, *bounds)
    arrays = (params, loop_inputs, placed(mesh, table), state, placed(mesh, noise, 0), *scalars)
    return Program(denoising.denoise_steps, (network, *arrays), {})


def program(name: str, mesh: Mesh, batch: int, size: int, guided: bool = True) -> Program:
    """One of `aot_compile.PROGRAMS`, for `batch` pictures in all; with guidance of twice as many rows."""
    side = -(-size // 64) * 8  # of the latents, as the pipelines round it
    network, params = official(NETWORK_OF[name], mesh)
    if name == "text":
        return once(network, params, Shape((batch, 77), jnp.int32))
    if name == "movq":
        return once(network, params, floats(batch, side, side, 4), method="decode_in_groups")
    if name.startswith("prior"):
        text = {
            "proj_embedding": floats(batch, 1280),
            "encoder_hidden_states": floats(batch, 77, 1280),
            "attention_mask": Shape((batch, 77), jnp.bool_),
        }
        first = condition(network, params, text, both=False)  # that of the empty prompt is kept
        return first if name == "prior_condition" else loop(network, params, first, (batch, 1280), guided)
    first = condition(network, params, {"image_embeds": floats(batch, 1280)}, both=guided)
    return first if name == "condition" else loop(network, params, first, (batch, side, side, 4), guided)


# Which network a program runs.
NETWORK_OF = {
    "text": "text_encoder",
    "prior_condition": "prior",
    "prior": "prior",
    "condition": "unet",
    "decoder": "unet",
    "movq": "movq",
}


def resident_bytes() -> int:
    """Weights that stay on a chip for text to image: text tower, prior, UNet, MoVQ."""
    leaves = jax.tree.leaves([official(name)[1] for name in NETWORKS])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def mesh_of(chips: str) -> Mesh:
    """The mesh of a described slice such as "v5e:2x2", or of one GPU; one axis `data` over all of it."""
    kind, layout = chips.split(":")
    if kind in GPUS:
        jax.devices()  # has the plugins registered
        target = {"target_config": aot_gpu.TARGETS[kind], "topology": "1x1x1"}  # one host, one process, one device
        return make_mesh(devices=topologies.get_topology_desc(platform="cuda", topology_name="", **target).devices)
    options: dict[str, Any] = {}
    if set(layout.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as JAX runs it
    described = topologies.get_topology_desc(platform="tpu", topology_name=chips, **options)
    return make_mesh(devices=described.devices)


def measured(
    kind: str, name: str, mesh: Mesh, batch: int, size: int, guided: bool, options: dict[str, Any], hlo: Path | None
) -> dict[str, Any]:
    """Compile as the pipelines do: on every chip of the mesh, the program on its rows, with all parameters."""
    todo, began = program(name, mesh, batch * mesh.size, size, guided), time.perf_counter()
    result = todo.function.jitted.lower(*todo.arguments, **todo.options).compile(options)
    seconds = round(time.perf_counter() - began, 1)
    if hlo is not None:
        hlo.write_text(result.as_text())
    if kind not in GPUS:
        return {"compile_seconds": seconds, **costs(result, CHIPS[kind])}
    # What is compiled for a GPU tells no FLOPs, so they are those of the same program for a CPU.
    twin = program(name, make_mesh(devices=jax.devices("cpu")[:1]), batch, size, guided)
    counted: Any = twin.function.jitted.lower(*twin.arguments, **twin.options).cost_analysis()
    return {"compile_seconds": seconds, **aot_gpu.costs(float(counted["flops"]), result, CHIPS[kind])}


def events(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compile what a job asks for, one program after the other."""
    guided, effort = job.get("guided", True), job.get("effort", 0.0)
    options = {"exec_time_optimization_effort": effort} if effort else {}
    yield {"event": "versions", "jax": jax.__version__, "resident_bytes": resident_bytes()}
    for chips in job["chips"]:
        try:
            mesh = mesh_of(chips)
        except Exception as error:  # whatever libtpu raises for a slice that does not exist
            yield {"event": "failed", "chips": chips, "program": "", "error": first_line(error)}
            continue
        for name, batch, size in itertools.product(job["programs"], job["batch"], job["size"]):
            row = {"chips": chips, "devices": mesh.size, "program": name, "batch": batch, "size": size}
            row |= {"guided": guided, "effort": effort}
            yield {"event": "compiling", **row}
            kind = f"{name}{'' if guided else '-unguided'}{f'-effort{effort:g}' if effort else ''}"
            file = f"{chips.replace(':', '-')}-{kind}-{batch}-{size}.txt"
            hlo = Path(job["hlo"]) / file if job.get("hlo") else None
            try:
                found = measured(chips.split(":")[0], name, mesh, batch, size, guided, options, hlo)
            except Exception as error:  # such as a program that does not fit: the others still count
                yield {"event": "failed", **row, "error": first_line(error)}
                continue
            yield {"event": "done", **row, **found}


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}" if str(error) else repr(error)


if __name__ == "__main__":
    for event in events(json.loads(sys.argv[1])):
        print(json.dumps(event), flush=True)
