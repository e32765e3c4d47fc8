"""What programs on a simulated mesh of 2 x 4 devices exchange; run by test_aot.py in a process of its own."""

from __future__ import annotations

import json
import os
import re

from tests.xla_flags import devices

os.environ["XLA_FLAGS"] = devices(8)

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from kandinsky_jax.diffusion import Network
from kandinsky_jax.models.layers import linear
from kandinsky_jax.training.mesh import make_training_mesh, shard_examples
from kandinsky_jax.training.step import OptimizerConfig, Trainer
from tpu_scripts.aot.aot_exchange import totals

MESH = make_training_mesh(2, 4)
LAYERS = {name: linear(*sizes, nnx.Rngs(0)) for name, sizes in (("first", (256, 512)), ("second", (512, 256)))}
STRUCTURES = {name: Network.split(layer)[0] for name, layer in LAYERS.items()}


def by_hand(x: jax.Array) -> jax.Array:
    """A gather over fsdp, a sum over data, and a rotation along data, of 8 x 16 numbers."""
    whole = jax.lax.all_gather(x, "fsdp", tiled=True)
    return jax.lax.ppermute(jax.lax.psum(whole, "data"), "data", [(0, 1), (1, 0)])


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    y = batch["x"].astype(params["weight"].dtype) @ params["weight"]
    return jnp.mean(jnp.square(y.astype(jnp.float32)))


def loss_of_kernel(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean(batch["x"]) * jnp.mean(jnp.square(params["kernel"].astype(jnp.float32)))


def loss_of_layers(params: dict[str, dict[str, jax.Array]], batch: dict[str, jax.Array]) -> jax.Array:
    """Of two layers with few rows."""
    first, second = (STRUCTURES[name].bind(params[name]) for name in ("first", "second"))
    y = second(jnp.tanh(first(batch["x"].astype(jnp.bfloat16))))
    return jnp.mean(jnp.square(y.astype(jnp.float32)))


def asked(trainer: Trainer, params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> list[str]:
    """The collectives of a step, and their types, before XLA compiles it."""
    text = trainer.lower(trainer.init(params), batch, jax.random.key(0)).as_text()
    found = re.findall(r"stablehlo\.(all_\w+|reduce_scatter)\".*?: (\(tensor<.*?)\n", text, re.DOTALL)
    return [f"{kind}: {types}" for kind, types in found]


def main() -> None:
    mapped = jax.shard_map(
        by_hand, mesh=MESH, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec(), check_vma=False
    )
    where = NamedSharding(MESH, PartitionSpec("fsdp"))
    program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=where))
    settings = OptimizerConfig(dtype="bfloat16", remat=True)
    trainer, of_kernel, of_layers = (
        Trainer(function, settings, mesh=MESH) for function in (loss, loss_of_kernel, loss_of_layers)
    )
    params = {"weight": jnp.ones((256, 512))}
    batch = shard_examples(MESH, {"x": jnp.ones((16, 256))})
    step = trainer.lower(trainer.init(params), batch, jax.random.key(0))
    print(
        json.dumps(
            {
                "by hand": totals(program.compile().as_text(), MESH.shape),
                "step": totals(step.compile().as_text(), MESH.shape),
                "asked": asked(trainer, params, batch),
                "asked of a kernel": asked(of_kernel, {"kernel": jnp.ones((3, 3, 72, 128))}, batch),
                "asked of layers": asked(of_layers, {n: Network.split(layer)[1] for n, layer in LAYERS.items()}, batch),
            }
        )
    )


if __name__ == "__main__":
    main()
