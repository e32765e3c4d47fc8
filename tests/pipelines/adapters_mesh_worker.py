"""Runs with four devices: LoRA changes sharded weights like unsharded ones, and leaves them sharded."""

from __future__ import annotations

import sys

import numpy as np

from kandinsky_jax import KandinskyV22Pipeline
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.parallel.mesh import make_mesh
from kandinsky_jax.parallel.sharding import rules_by_size

model, folder = sys.argv[1:]
mesh = make_mesh(1, 1, 4)
plain = KandinskyV22Pipeline.from_pretrained(model, dtype="bfloat16")
plain.load_lora_weights(folder)
rules = rules_by_size(mesh, {n: x.shape for n, x in flat_params(plain.unet).items()}, least=1 << 10)
pipe = KandinskyV22Pipeline.from_pretrained(model, dtype="bfloat16", mesh=mesh, shard_rules=rules)
before = flat_params(pipe.unet)
pipe.load_lora_weights(folder)
after = flat_params(pipe.unet)
assert all(after[n].sharding == before[n].sharding and after[n].dtype == before[n].dtype for n in before)
assert any(len(x.sharding.device_set) > 1 and not x.is_fully_replicated for x in after.values())
assert all(np.array_equal(after[n], x) for n, x in flat_params(plain.unet).items())
pipe.shard(None)
pipe.unload_lora_weights()
assert all(np.array_equal(x, before[n]) for n, x in flat_params(pipe.unet).items())
assert all(len(x.sharding.device_set) == 1 for x in flat_params(pipe.unet).values())
