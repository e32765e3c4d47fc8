"""Compiles the sampling programs for described TPUs or GPUs; `aot_compile.py` runs it in an environment that has
libtpu or JAX's CUDA plugin.

    python -m tpu_scripts.aot.aot_worker '{"chips": ["v5e:1x1"], "batch": [8], "size": [512], "programs": ["decoder"]}'

Prints one line of JSON per event: what is compiled now, what it cost, what went wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from kandinsky_jax import compilation, models
from kandinsky_jax.checkpoint.quantization import QUANTIZABLE
from kandinsky_jax.diffusion import ClassifierFreeGuidance, Network, NoGuidance, calls
from kandinsky_jax.diffusion.calls import exchanges_guidance
from kandinsky_jax.diffusion.rng import KeyNoise
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.models.quantization_config import QuantizationConfig, has_own_dtype
from kandinsky_jax.models.quantized import layers_to_ignore
from kandinsky_jax.models.unet import FeatureCache
from kandinsky_jax.parallel.mesh import make_mesh
from kandinsky_jax.parallel.sharding import REPLICATED, batch_specs, in_memory
from kandinsky_jax.pipelines import denoising
from kandinsky_jax.pipelines.denoising import LoopInputs, Steps
from kandinsky_jax.schedulers import DDPMScheduler
from kandinsky_jax.schedulers.table import MAX_STEPS, STATE_SLOTS
from tpu_scripts.aot import aot_compile, aot_gpu
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
    arguments: tuple[Any, ...]  # the network first
    options: dict[str, Any]

    def trace(self) -> Any:
        """Trace it from its shapes."""
        return self.function.jitted.trace(*self.arguments, **self.options)


def placed(mesh: Mesh, tree: Any, axis: int | None = None) -> Any:
    """Shapes where the pipelines put their arrays; those without an axis of images lie everywhere."""
    where = jax.tree.map(lambda leaf: REPLICATED if axis is None else batch_specs(mesh, leaf, axis), tree)
    return jax.tree.map(
        lambda leaf, spec: Shape(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)), tree, where
    )


def official(name: str, mesh: Mesh | None = None, int8: bool = False) -> tuple[Network, Any]:
    """A network of the official configuration: its structure, and the shapes of its parameters, bfloat16.

    Args:
        int8: whether it is quantized, where it can be.
    """
    cls, repository = NETWORKS[name]
    module = abstract(cls, cls.CONFIG.from_dict(json.loads((OFFICIAL / repository / name / "config.json").read_text())))
    if int8 and cls.__name__ in QUANTIZABLE:
        quantization = QuantizationConfig(ignore=layers_to_ignore(module))
        module = abstract(cls, dataclasses.replace(module.config, quantization_config=quantization))
    network, params = Network.split(module)

    def shape_of(path: Any, leaf: Any) -> Shape:
        kept = has_own_dtype(jax.tree_util.keystr(path[-1:], simple=True), leaf.dtype)
        return Shape(leaf.shape, leaf.dtype if kept else jnp.bfloat16)

    shapes = jax.tree_util.tree_map_with_path(shape_of, params)
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


def loop(
    network: Network, params: Any, of: Program, sample: tuple[int, ...], guided: bool, cached: bool = False
) -> Program:
    """The denoising loop under the condition that a program gives.

    Args:
        cached: with a feature cache.
    """
    mesh = network.mesh
    assert mesh is not None
    cond, _ = jax.eval_shape(lambda *given: of.function(network, *given, **of.options), *of.arguments[1:])
    uncond = cond if guided else None
    table = jax.tree.map(lambda column: floats(*column.shape), DDPMScheduler().schedule(50).table)
    noise = KeyNoise(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), sample[0])))
    loop_inputs = LoopInputs(placed(mesh, cond, 0), placed(mesh, uncond, 0))
    state = placed(mesh, floats(STATE_SLOTS, *sample), 1)
    scale, *bounds = placed(mesh, (floats(), *[Shape((), jnp.int32)] * 2))
    guider = ClassifierFreeGuidance(scale) if guided else NoGuidance()
    steps = Steps(state)
    if cached:
        refresh = placed(mesh, Shape((MAX_STEPS,), jnp.bool_))
        settings = {"evaluations": 2 if guided else 1, "exchanged": False}
        if guided and exchanges_guidance(mesh):
            settings = {"evaluations": 1, "exchanged": True}
        first = jax.eval_shape(
            functools.partial(denoising.first_cache.jitted, network, **settings), params, state, refresh
        )
        features = placed(mesh, first.features, 0)
        steps = Steps(state, cache=FeatureCache(features, refresh, placed(mesh, Shape((), jnp.int32))))
    arrays = (params, loop_inputs, placed(mesh, table), steps, placed(mesh, noise, 0), guider, *bounds)
    return Program(denoising.denoise_steps, (network, *arrays), {})


@compilation.program(static_argnames="network")
def kept_steps(network: Network, params: Any, loop_inputs: LoopInputs, table: Any, steps: Steps, *others: Any) -> Steps:
    """`denoise_steps` where no step runs the deep blocks, to count what such a step costs."""
    assert steps.cache is not None
    kept = steps._replace(cache=steps.cache._replace(refresh=jnp.zeros_like(steps.cache.refresh)))
    return denoising.denoise_steps.__wrapped__(network, params, loop_inputs, table, kept, *others)


def program(name: str, mesh: Mesh, batch: int, size: int, guided: bool = True, int8: bool = False) -> Program:
    """One of `aot_compile.PROGRAMS`, for `batch` pictures in all; with guidance of twice as many rows."""
    side = -(-size // 64) * 8  # of the latents, as the pipelines round it
    network, params = official(NETWORK_OF[name], mesh, int8)
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
    if name == "condition":
        return first
    found = loop(network, params, first, (batch, side, side, 4), guided, cached=name != "decoder")
    return found._replace(function=kept_steps) if name == "decoder_kept" else found


# Which network a program runs.
NETWORK_OF = {
    "text": "text_encoder",
    "prior_condition": "prior",
    "prior": "prior",
    "condition": "unet",
    "decoder": "unet",
    "decoder_cached": "unet",
    "decoder_kept": "unet",
    "movq": "movq",
}


def integer_flops(jaxpr: Any, branch: Callable[[Iterable[float]], float] = max) -> float:
    """FLOPs of products of 8-bit integers in a jaxpr, on a device; of a loop's body once.

    Args:
        branch: which of a conditional's branches counts, `max` or `min`.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, [operand.aval for operand in equation.invars]
        if name in ("dot_general", "conv_general_dilated") and operands[0].dtype == jnp.int8:
            total += 2 * equation.outvars[0].aval.size * summed(equation, operands[1])
        inner = [integer_flops(each, branch) for each in jaxprs_of(equation)]
        total += branch(inner) if name == "cond" else sum(inner)
    return total


def jaxprs_of(equation: Any) -> list[Any]:
    """The jaxprs that an equation runs, such as a loop's body and its condition."""
    params = [each for value in equation.params.values() for each in (value if isinstance(value, tuple) else (value,))]
    return [getattr(each, "jaxpr", each) for each in params if hasattr(each, "eqns")]


def summed(equation: Any, weight: Any) -> float:
    """How many products are added up for each number of a result."""
    if equation.primitive.name == "dot_general":
        (_, contracted), _ = equation.params["dimension_numbers"]
        return math.prod(weight.shape[axis] for axis in contracted)
    return weight.size / weight.shape[equation.params["dimension_numbers"].rhs_spec[0]]


def resident_bytes(int8: bool = False) -> int:
    """Weights that stay on a chip for text to image: text tower, prior, UNet, MoVQ."""
    leaves = jax.tree.leaves([official(name, int8=int8)[1] for name in NETWORKS])
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


def measured(kind: str, name: str, mesh: Mesh, row: dict[str, Any], hlo: Path | None) -> dict[str, Any]:
    """Compile as the pipelines do: on every chip of the mesh, the program on its rows, with all parameters."""
    batch, variant = row["batch"], (row["size"], row["guided"], row["int8"])
    options = {"exec_time_optimization_effort": row["effort"]} if row["effort"] else {}
    todo, began = program(name, mesh, batch * mesh.size, *variant), time.perf_counter()
    traced = todo.trace()
    result = traced.lower().compile(options)
    seconds = round(time.perf_counter() - began, 1)
    if hlo is not None:
        hlo.write_text(result.as_text())
    if kind not in GPUS:
        branch = min if name == "decoder_kept" else max
        integer = integer_flops(traced.jaxpr, branch) if row["int8"] else 0.0
        return {"compile_seconds": seconds, **costs(result, CHIPS[kind], integer)}
    # What is compiled for a GPU tells no FLOPs, so they are those of the same program for a CPU.
    twin = program(name, make_mesh(devices=jax.devices("cpu")[:1]), batch, *variant)
    counted: Any = twin.trace().lower().cost_analysis()
    return {"compile_seconds": seconds, **aot_gpu.costs(float(counted["flops"]), result, CHIPS[kind])}


def events(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compile what a job asks for, one program after the other."""
    resident = {"resident_bytes": resident_bytes(), "resident_bytes_int8": resident_bytes(int8=True)}
    yield {"event": "versions", "jax": jax.__version__, **resident}
    for chips in job["chips"]:
        try:
            mesh = mesh_of(chips)
        except Exception as error:  # whatever libtpu raises for a slice that does not exist
            yield {"event": "failed", "chips": chips, "program": "", "error": first_line(error)}
            continue
        for name, batch, size in itertools.product(job["programs"], job["batch"], job["size"]):
            row = {"chips": chips, "devices": mesh.size, "program": name, "batch": batch, "size": size}
            row |= {name: job[name] for name in ("guided", "int8", "effort")}
            yield {"event": "compiling", **row}
            file = f"{chips}-{aot_compile.variant(row)}-{batch}-{size}.txt".replace(":", "-").replace(", ", "-")
            hlo = Path(job["hlo"]) / file if job.get("hlo") else None
            try:
                found = measured(chips.split(":")[0], name, mesh, row, hlo)
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
