"""Seconds and peak memory of converting a decoder of the official size (random weights), in both directions.

`python tpu_scripts/bench/conversion_memory.py [--dtype float32]` needs about 12 GB of disk in the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import random_models

from kandinsky_jax.checkpoint import hub


def convert(source: Path, target: Path, *options: str) -> tuple[float, float]:
    """Run the command; return its seconds and peak GB."""
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
        largest = random_models.write(root / "torch", hub.DECODER)
        forth = convert(root / "torch", root / "orbax", "--dtype", arguments.dtype)
        back = convert(root / "orbax", root / "again")
    print(json.dumps({"largest_component_gb": round(largest / 1e9, 2), "to_orbax": forth, "to_diffusers": back}))


if __name__ == "__main__":
    main()
