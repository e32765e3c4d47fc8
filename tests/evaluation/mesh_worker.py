"""Evaluates on four simulated devices; run by test_meshes.py in a process of its own.

python -m tests.evaluation.mesh_worker PICTURES OUTPUT [DATA,GUIDANCE,ROWS]
"""

from __future__ import annotations

import os
import sys

from tests.xla_flags import devices

os.environ["XLA_FLAGS"] = devices(4)

import jax

from kandinsky_jax.cli.options import mesh_of_option
from kandinsky_jax.evaluation import CLIPTowers, Resampling, evaluate
from tests.conftest import SHAPES_MODEL


def main() -> None:
    pictures, output, *mesh = sys.argv[1:]
    made = mesh_of_option(mesh[0] if mesh else None)
    assert jax.local_device_count() == 4
    assert CLIPTowers.from_pretrained(SHAPES_MODEL, mesh=made).images.devices == (made.shape["data"] if made else 4)
    options = {"clip": str(SHAPES_MODEL), "reference": pictures, "resampling": Resampling(resamples=20)}
    evaluate(pictures, output, mesh=made, batch=4, quiet=True, **options)


if __name__ == "__main__":
    main()
