"""Seconds of one guided evaluation of the official UNet's shape, with random weights, on the devices that are here.

    python tpu_scripts/quantize/unet_step.py int8 --size 512

Weights are "full", "int8", or "dynamic": int8 with inputs scaled at run time. Prints the seconds of the first
evaluation, which compiles, those of four more, and the peak memory of the process. Each in a process of its own, on a
quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from kandinsky_jax import UNet2DConditionModel
from kandinsky_jax.checkpoint import flat_params, set_params
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call, condition
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.models.quantization_config import QuantizationConfig
from kandinsky_jax.models.quantized import layers_to_ignore

CONFIG = Path(__file__).resolve().parents[2] / "tests" / "official" / "kandinsky-2-2-decoder" / "unet" / "config.json"
TIMES = 4


def network_of(weights: str) -> nnx.Module:
    """The UNet with random weights, float32 but for what is quantized."""
    config: Any = UNet2DConditionModel.CONFIG.from_dict(json.loads(CONFIG.read_text()))
    if weights != "full":
        ignore = layers_to_ignore(abstract(UNet2DConditionModel, config))
        quantization = QuantizationConfig("int8", weights == "dynamic", ignore)
        config = dataclasses.replace(config, quantization_config=quantization)
    network, rng = abstract(UNet2DConditionModel, config), np.random.default_rng(0)
    params = {}
    for name, leaf in flat_params(network).items():
        constant = {"weight_scale": 2e-4, "input_scale": 0.03, "scale": 1, "weight_sum": 0, "input_zero_point": 0}
        if (last := name.rpartition(".")[2]) in constant:
            params[name] = jnp.full(leaf.shape, constant[last], leaf.dtype)
        elif leaf.dtype == jnp.int8:
            params[name] = jnp.asarray(rng.integers(-127, 128, leaf.shape, dtype=np.int8))
        else:
            params[name] = jnp.asarray(rng.standard_normal(leaf.shape, dtype=np.float32) * 0.02)
    return set_params(network, params)


def main() -> None:
    """Evaluate, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", choices=["full", "int8", "dynamic"])
    parser.add_argument("--size", type=int, default=512, help="of the picture, default 512")
    arguments = parser.parse_args()
    structure, params = Network.split(network_of(arguments.weights))
    rng, side = np.random.default_rng(1), arguments.size // 8
    embeds, sample = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 1280), (2, side, side, 4)))
    seconds = []
    given = condition(structure, params, {"image_embeds": embeds})[0]
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        call(structure, params, sample, jnp.full(2, 500), given).block_until_ready()
        seconds.append(round(time.perf_counter() - began, 2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"weights": arguments.weights, "first": seconds[0], "seconds": seconds[1:], "peak_bytes": peak}))


if __name__ == "__main__":
    main()
