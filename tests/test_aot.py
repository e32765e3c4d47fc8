"""The ahead-of-time script: its counts of an HLO text, its arithmetic, its command line. No TPU compiler here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from tpu_scripts import aot_compile, aot_cost

ROOT = Path(__file__).parents[1]
CHIP = aot_cost.Chip(flops=1e12, bandwidth=1e11, memory=1e9)


def compiled(function, *shapes):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("data")
    run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return jax.jit(run).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def test_costs_of_a_product():
    found = aot_cost.costs(compiled(lambda a: a @ a.T, (64, 64)), CHIP)
    assert found["flops"] == pytest.approx(2 * 64**3, rel=0.02)
    assert found["arguments"] == found["outputs"] == 4 * 64 * 64
    assert found["collectives"] == {}
    assert found["seconds"] == max(found["flops"] / 1e12, found["bytes"] / 1e11)
    assert found["bound_by"] == ("flops" if found["flops"] > 10 * found["bytes"] else "bytes")


def test_collectives_are_counted():
    found = aot_cost.costs(compiled(lambda a: jax.lax.psum(a, "data") + jax.lax.psum(jnp.sin(a), "data"), (8, 8)), CHIP)
    assert sum(found["collectives"].values()) >= 1
    assert set(found["collectives"]) == {"all-reduce"}


def test_an_asynchronous_collective_is_one():
    text = """ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[32]{0:T(256)S(1)}) all-gather-start(%p), dimensions={0}
  %g = f32[32]{0:T(256)S(1)} all-gather-done(%s)
  ROOT %r = f32[8]{0} reduce-scatter(%g), to_apply=%all-reduce.1
}"""
    assert aot_cost.collectives(text) == {"all-gather": 1, "reduce-scatter": 1}


def test_loops_of_known_length_are_multiplied_out():
    """XLA counts a loop's body once; a scan of eight rounds costs what eight do."""

    def once(x):
        return jnp.sin(x @ x)

    single = compiled(once, (64, 64))
    scanned = compiled(lambda x: jax.lax.fori_loop(0, 8, lambda _, y: once(y), x), (64, 64))
    assert aot_cost.repeated_bytes(single.as_text()) == 0
    extra, own = aot_cost.repeated_bytes(scanned.as_text()), single.cost_analysis()["bytes accessed"]
    assert 5 * own < extra < 20 * own
    unknown = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: once(y), x))
    text = unknown.lower(jax.ShapeDtypeStruct((64, 64), jnp.float32), jnp.int32(3)).compile().as_text()
    assert aot_cost.repeated_bytes(text) == 0


def test_help_and_bad_arguments():
    """In any Python: the script needs nothing but the standard library."""
    script = [sys.executable, "-S", str(ROOT / "tpu_scripts" / "aot_compile.py")]
    done = subprocess.run([*script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--chips v5e:1 v5e:2x2 --batch 8" in done.stdout
    done = subprocess.run([*script, "--chips", "v9:2x2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'v9:2x2' is none of v4, v5e, v5p, v6e" in done.stderr


def test_slices():
    assert aot_compile.chips("v5e:1") == "v5e:1x1"
    assert aot_compile.chips("v5p:1") == "v5p:1x1x1"
    assert aot_compile.chips("v6e:4x4") == "v6e:4x4"
    with pytest.raises(Exception, match="a slice of v4 has 3 sides"):
        aot_compile.chips("v4:2x2")


def test_results_are_complete_files(tmp_path):
    row = {
        "chips": "v5e:1x1", "devices": 1, "program": "decoder", "compile_seconds": 3.0, "flops": 2e12, "bytes": 8e9,
        "arguments": 3e9, "outputs": 1e9, "temporaries": 2e9, "collectives": {"all-reduce": 2}, "seconds": 0.02,
        "bound_by": "flops",
    }  # fmt: skip
    found = {"batch_per_chip": 4, "size": 512, "jax": "0", "resident_bytes": 5e9, "programs": [row]}
    aot_compile.write(tmp_path / "aot", found, aot_compile.table(found))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aot.json", "aot.md"]
    assert json.loads((tmp_path / "aot.json").read_text()) == found
    table = (tmp_path / "aot.md").read_text()
    assert "| v5e:1x1 | decoder | 2000 | 8.00 | 2.00 | 3.00 | 1.00 | 2.00 | 2 all-reduce | 20.00 | flops | 3 |" in table
    assert "leave 8.00 of 16 GB" in table
