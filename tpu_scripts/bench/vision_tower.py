"""Seconds, peak memory and bytes read until a prior knows its embedding of zeros, with a vision tower of official size.

`python tpu_scripts/bench/vision_tower.py [--layers 48]` puts random float16 weights (3.7 GB) beside the rest of
the tests' small prior and loads it in float32 in a fresh process each, files not in memory: with the tower
(as it would be for a picture, or if nothing were lazy), without it and nothing stored (then computed and put into the
user's cache), from that cache, and with the embedding stored beside the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from kandinsky_jax.checkpoint import flat_params, hub, tensor_files, tensor_names
from kandinsky_jax.models import CLIPVisionModelWithProjection
from kandinsky_jax.models.clip import CLIPVisionConfig
from kandinsky_jax.models.layers import abstract

SHAPES_MODEL = Path(__file__).parents[2] / "tests" / "shapes_model"
OFFICIAL = CLIPVisionConfig(
    hidden_act="gelu",
    hidden_size=1664,
    intermediate_size=8192,
    num_attention_heads=16,
    num_hidden_layers=48,
    patch_size=14,
    projection_dim=1280,
)
PROGRAM = """
import json, resource, sys, time
from kandinsky_jax import KandinskyV22PriorPipeline
began = time.perf_counter()
pipe = KandinskyV22PriorPipeline.from_pretrained(sys.argv[1], dtype="float32")
loaded = time.perf_counter()
if sys.argv[2] == "tower":
    pipe.image_encoder
else:
    pipe._zero_embed()
read = next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("read_bytes"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({
    "from_pretrained_s": round(loaded - began, 2),
    "then_s": round(time.perf_counter() - loaded, 2),
    "peak_gb": round(peak / 1e9, 2),
    "read_gb": round(read / 1e9, 3),
}))
"""


def write_random(folder: Path, config: CLIPVisionConfig) -> None:
    """The small prior with another vision tower."""
    shutil.copytree(SHAPES_MODEL / hub.PRIOR, folder, ignore=shutil.ignore_patterns("image_encoder"))
    (folder / "image_encoder").mkdir()
    (folder / "image_encoder/config.json").write_text(json.dumps(config.to_dict()))
    block = np.float16(np.random.default_rng(0).standard_normal(2**20) * 0.02)
    shapes = {n: leaf.shape for n, leaf in flat_params(abstract(CLIPVisionModelWithProjection, config)).items()}
    tensors = {
        tensor_names.torch_name(n): tensor_files.Tensor(
            tensor_names.torch_shape(n, s), partial(np.resize, block, s), "f2"
        )
        for n, s in shapes.items()
    }
    tensor_files.write(folder / "image_encoder/model.safetensors", tensors)


def measure(folder: Path, what: str, cache: Path) -> dict[str, float]:
    """Load in a fresh process."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-c", PROGRAM, str(folder), what]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return {"case": what, **json.loads(done.stdout)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=OFFICIAL.num_hidden_layers)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch) / "prior", Path(scratch) / "cache"
        write_random(folder, dataclasses.replace(OFFICIAL, num_hidden_layers=layers))
        print(json.dumps({"tower_gb": round((folder / "image_encoder/model.safetensors").stat().st_size / 1e9, 2)}))
        for what in ("tower", "computed", "cached"):
            print(json.dumps(measure(folder, what, cache)), flush=True)
        [kept] = cache.rglob("*.safetensors")
        kept.rename(folder / "image_encoder" / tensor_files.ZERO_EMBED)
        print(json.dumps(measure(folder, "stored", cache)))


if __name__ == "__main__":
    main()
