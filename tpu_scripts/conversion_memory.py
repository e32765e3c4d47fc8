"""Seconds and peak memory of converting a decoder of the official size (random weights), in both directions.

`python tpu_scripts/conversion_memory.py [--dtype float32]` needs about 12 GB of disk in the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.models.layers import abstract
from kandinsky_jax.schedulers import DDPMScheduler
from kandinsky_jax.tensors import files, names

PARTS = {"unet": "UNet2DConditionModel", "movq": "VQModel"}


def write_random(folder: Path) -> int:
    """A decoder in diffusers' layout, float32; the bytes of its larger component."""
    index = {"_class_name": "KandinskyV22Pipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    DDPMScheduler().save_pretrained(folder / "scheduler")
    rng, sizes = np.random.default_rng(0), []
    for part, name in PARTS.items():
        cls = NETWORKS[name]
        config = cls.CONFIG()  # the defaults are the official ones
        shapes = {n: names.torch_shape(n, leaf.shape) for n, leaf in flat_params(abstract(cls, config)).items()}
        tensors = {names.torch_name(n): files.Tensor(s, partial(rng.random, s, "f4"), "f4") for n, s in shapes.items()}
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config.to_dict()))
        files.write(folder / part / "diffusion_pytorch_model.safetensors", tensors)
        sizes.append(4 * sum(math.prod(shape) for shape in shapes.values()))
        index[part] = ["diffusers", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return max(sizes)


def convert(source: Path, target: Path, *options: str) -> tuple[float, float]:
    """Seconds and peak GB of the command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "convert_weights", str(source), str(target), *options]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    return round(time.perf_counter() - began, 1), round(int(done.stdout.split()[-1]) * 1024 / 1e9, 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        largest = write_random(root / "torch")
        forth = convert(root / "torch", root / "orbax", "--dtype", arguments.dtype)
        back = convert(root / "orbax", root / "again")
    print(json.dumps({"largest_component_gb": round(largest / 1e9, 2), "to_orbax": forth, "to_diffusers": back}))


if __name__ == "__main__":
    main()
