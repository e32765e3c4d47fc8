"""Compiles the sampling programs for described TPUs; `aot_compile.py` runs it in an environment that has libtpu.

    python -m tpu_scripts.aot_worker '{"chips": ["v5e:1x1"], "batch": 8, "size": 512, "programs": ["decoder"]}'

Prints one line of JSON per event: what is compiled now, what it cost, what went wrong.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kandinsky_jax import models
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.noise import KeyNoise
from kandinsky_jax.sampling import Lane, Network, call, denoise
from kandinsky_jax.schedulers import DDPMScheduler
from kandinsky_jax.schedulers.table import SLOTS
from tpu_scripts.aot_cost import CHIPS, costs

OFFICIAL = Path(__file__).parents[1] / "tests" / "official"
NETWORKS = {
    "text_encoder": (models.CLIPTextModelWithProjection, "kandinsky-2-2-prior"),
    "prior": (models.PriorTransformer, "kandinsky-2-2-prior"),
    "unet": (models.UNet2DConditionModel, "kandinsky-2-2-decoder"),
    "movq": (models.VQModel, "kandinsky-2-2-decoder"),
}
ROWS, SECOND, EVERYWHERE = PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()
Shape = jax.ShapeDtypeStruct


class Program(NamedTuple):
    """A function as the pipelines call it, and its arguments: shapes of the whole mesh, and how they are divided."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    specs: tuple[PartitionSpec, ...]
    out: PartitionSpec = ROWS
    donate: tuple[int, ...] = ()


def official(name: str, dtype: Any = jnp.bfloat16) -> tuple[Network, Any]:
    """A network of the official configuration: its structure, and the shapes of its parameters."""
    cls, repository = NETWORKS[name]
    raw = json.loads((OFFICIAL / repository / name / "config.json").read_text())
    network, params = Network.split(abstract(cls, cls.CONFIG.from_dict(raw)))
    return network, jax.tree.map(
        lambda leaf: Shape(leaf.shape, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype), params
    )


def floats(*shape: int) -> Shape:
    """A float32 array of a shape."""
    return Shape(shape, jnp.float32)


def method(network: Network, name: str) -> Callable[..., Any]:
    """A network's method as the pipelines run it."""
    return lambda params, *arrays: call(network, params, *arrays, method=name)


def loop(network: Network, params: Any, condition: Any, sample: tuple[int, ...]) -> Program:
    """The guided denoising loop; the conditions of a chip's pictures, without and with the prompt, lie on that chip."""
    table = jax.tree.map(lambda column: floats(*column.shape), DDPMScheduler().schedule(50).table)
    noise = KeyNoise(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), sample[0])))
    arrays = (params, Lane(condition), table, floats(SLOTS, *sample), noise, floats(), *[Shape((), jnp.int32)] * 2)
    return Program(
        lambda *arrays: denoise(network, *arrays),
        arrays,
        (EVERYWHERE, ROWS, EVERYWHERE, SECOND, ROWS, EVERYWHERE, EVERYWHERE, EVERYWHERE),
        SECOND,
        donate=(3,),
    )


def of_condition(network: Network, params: Any, *arrays: Shape) -> Program:
    """What is done once per prompt or picture, before a loop."""
    return Program(method(network, "condition"), (params, *arrays), (EVERYWHERE, *[ROWS] * len(arrays)))


def program(name: str, batch: int, size: int) -> Program:
    """One of `aot_compile.PROGRAMS`, for `batch` pictures in all; with guidance, so of twice as many rows."""
    side = -(-size // 64) * 8  # of the latents, as the pipelines round it
    network, params = official(NETWORK_OF[name])
    if name == "text":
        return Program(method(network, "__call__"), (params, Shape((batch, 77), jnp.int32)), (EVERYWHERE, ROWS))
    if name.startswith("prior"):
        text = (floats(2 * batch, 1280), floats(2 * batch, 77, 1280), Shape((2 * batch, 77), jnp.bool_))
        first = of_condition(network, params, *text)
        if name == "prior_condition":
            return first
        return loop(network, params, jax.eval_shape(first.run, *first.arguments), (batch, 1280))
    if name == "movq":
        return Program(method(network, "decode"), (params, floats(batch, side, side, 4)), (EVERYWHERE, ROWS))
    first = of_condition(network, params, floats(2 * batch, 1280))
    if name == "condition":
        return first
    return loop(network, params, jax.eval_shape(first.run, *first.arguments), (batch, side, side, 4))


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
    """The mesh of a described slice such as "v5e:2x2", one axis `data` over all of it."""
    kind, layout = chips.split(":")
    options: dict[str, Any] = {}
    if set(layout.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as JAX runs it
    described = topologies.get_topology_desc(platform="tpu", topology_name=chips, **options)
    return Mesh(np.array(described.devices), ("data",), axis_types=(AxisType.Auto,))


def compiled(todo: Program, mesh: Mesh) -> Any:
    """Compile for the mesh: every chip runs the program on its rows, with all parameters."""
    placed = [
        jax.tree.map(
            lambda leaf, spec=spec: Shape(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)), argument
        )
        for argument, spec in zip(todo.arguments, todo.specs, strict=True)
    ]
    # Not left to XLA's partitioner, which cannot divide a Pallas kernel.
    run = jax.shard_map(todo.run, mesh=mesh, in_specs=todo.specs, out_specs=todo.out, check_vma=False)
    return jax.jit(run, donate_argnums=todo.donate).lower(*placed).compile()


def events(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compile what a job asks for, one program after the other."""
    yield {"event": "versions", "jax": jax.__version__, "resident_bytes": resident_bytes()}
    for chips in job["chips"]:
        try:
            mesh = mesh_of(chips)
        except Exception as error:  # whatever libtpu raises for a slice that does not exist
            yield {"event": "failed", "chips": chips, "program": "", "error": first_line(error)}
            continue
        for name in job["programs"]:
            row = {"chips": chips, "devices": mesh.size, "program": name}
            yield {"event": "compiling", **row}
            began = time.perf_counter()
            try:
                result = compiled(program(name, job["batch"] * mesh.size, job["size"]), mesh)
            except Exception as error:  # such as a program that does not fit: the others still count
                yield {"event": "failed", **row, "error": first_line(error)}
                continue
            seconds = round(time.perf_counter() - began, 1)
            if job.get("hlo"):
                (Path(job["hlo"]) / f"{chips.replace(':', '-')}-{name}.txt").write_text(result.as_text())
            yield {"event": "done", **row, "compile_seconds": seconds, **costs(result, CHIPS[chips.split(":")[0]])}


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}" if str(error) else repr(error)


if __name__ == "__main__":
    for event in events(json.loads(sys.argv[1])):
        print(json.dumps(event), flush=True)
