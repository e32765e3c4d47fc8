"""The ahead-of-time script: its counts of an HLO text, its arithmetic, its command line. No compiler for chips here."""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from kandinsky_jax.diffusion import Network
from kandinsky_jax.parallel.mesh import make_mesh
from kandinsky_jax.schedulers.table import STATE_SLOTS
from kandinsky_jax.training.tasks import DistillDecoderTask, LoraTask
from tpu_scripts.aot import (
    aot_compile,
    aot_cost,
    aot_exchange,
    aot_gpu,
    aot_train_worker,
    aot_worker,
    pictures_per_second,
)

ROOT = Path(__file__).parents[2]
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


TPU_TEXT = """%all-reduce-scatter.1 (p.1: bf16[64,8]) -> bf16[16,8] {
  %p.1 = bf16[64,8]{1,0} parameter(0)
  %r.1 = bf16[64,8]{1,0} all-reduce(%p.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %d.1 = bf16[16,8]{1,0} dynamic-slice(%r.1, %i), dynamic_slice_sizes={16,8}
}

%async_collective_fusion.1 (p.2: bf16[16,8]) -> bf16[64,8] {
  %p.2 = bf16[16,8]{1,0} parameter(0)
  ROOT %g.2 = bf16[64,8]{1,0} all-gather(%p.2), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
}

%async_collective_fusion.2 (p.3: bf16[16,8]) -> bf16[64,8] {
  %p.3 = bf16[16,8]{1,0} parameter(0)
  ROOT %g.3 = bf16[64,8]{1,0} all-gather(%p.3), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
}

%async_collective_fusion.3 (p.4: bf16[16,8]) -> bf16[64,8] {
  %p.4 = bf16[16,8]{1,0} parameter(0)
  ROOT %g.4 = bf16[64,8] all-gather(%p.4), channel_id=5, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%async_collective_fusion.4 (p.5: bf16[16,8]) -> bf16[64,8] {
  %p.5 = bf16[16,8]{1,0} parameter(0)
  ROOT %g.5 = bf16[64,8] all-gather(%p.5), channel_id=5, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="1"}
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %m = f32[4]{0} all-reduce(%x), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %m)
}

ENTRY %main (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %f.1 = bf16[16,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %f.2 = bf16[64,8]{1,0} fusion(%f.1), kind=kOutput, calls=%async_collective_fusion.1
  %f.3 = bf16[64,8]{1,0} fusion(%f.1), kind=kOutput, calls=%async_collective_fusion.2
  %f.4 = bf16[64,8]{1,0} fusion(%f.1), kind=kOutput, calls=%async_collective_fusion.3
  %f.5 = bf16[64,8]{1,0} fusion(%f.1), kind=kOutput, calls=%async_collective_fusion.4
  %f.6 = bf16[64,8]{1,0} fusion(%f.1), kind=kOutput, calls=%async_collective_fusion.4
  %w = (s32[], f32[4]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%y), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  ROOT %done = f32[8]{0} all-gather-done(%s)
}"""


def test_exchange_in_a_text_of_a_tpu():
    """A collective that fusions carry on is one; a loop's is counted for each trip; groups in every spelling."""
    found = [tuple(one) for one in aot_exchange.exchanges(TPU_TEXT, {"data": 2, "fsdp": 4})]
    assert found == [
        ("reduce-scatter", "fsdp", 1, 256, 3 * 256),
        ("all-gather", "fsdp", 1, 1024, 3 / 4 * 1024),
        *[("all-gather", "fsdp", 1, 1024, 3 / 4 * 1024)] * 2,  # of one channel, but two chains
        ("all-reduce", "data", 3, 16, 2 * 1 / 2 * 16),
        ("all-gather", "data", 1, 32, 16),
    ]


def test_exchange_on_a_mesh():
    """In real programs; a training step moves gradients over `data` only as the parts that a device keeps."""
    command = [sys.executable, "-W", "error", "-m", "tests.tpu_scripts.exchange_worker"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert sorted(found["by hand"]) == [
        ["all-gather", "fsdp", 1, 512, 3 / 4 * 512],
        ["all-reduce", "data", 1, 512, 512],
        ["collective-permute", "data", 1, 512, 512],
    ]
    weight = 256 * 512 * 4  # bytes: XLA's CPU compiler exchanges float32
    step = {(kind, axes): size for kind, axes, _, size, _ in found["step"]}
    assert step["all-gather", "fsdp"] == weight  # once
    assert step["reduce-scatter", "fsdp"] == weight / 4
    assert step["all-reduce", "data"] == weight / 4
    assert step["all-reduce", "fsdp"] + step["all-reduce", "data+fsdp"] < 100  # the loss, the norm of the gradients
    # What XLA is asked for, in bfloat16: whole weights, of gradients the parts, and sums of parts over `data`.
    assert found["asked"][:3] == [
        "all_gather: (tensor<64x512xbf16>) -> tensor<256x512xbf16>",
        "reduce_scatter: (tensor<256x512xbf16>) -> tensor<64x512xbf16>",
        "all_reduce: (tensor<64x512xbf16>) -> tensor<64x512xbf16>",
    ]
    # Shards along the last axis are no rows of tiles: 20736 numbers are laid out in 16 rows, with some padding.
    assert "reduce_scatter: (tensor<64x1408xbf16>) -> tensor<16x1408xbf16>" in found["asked of a kernel"]
    # Weights of layers with few rows stay sharded. Nothing is exchanged again for rematerialisation.
    asked = collections.Counter(line.split(" ->")[0] for line in found["asked of layers"] if "xbf16" in line)
    assert asked == {
        "all_gather: (tensor<2x256xbf16>)": 1,
        "all_gather: (tensor<2x512xbf16>)": 1,
        "all_to_all: (tensor<8x128xbf16>)": 1,
        "all_to_all: (tensor<8x64xbf16>)": 1,
        "all_to_all: (tensor<2x256xbf16>)": 1,
        "all_to_all: (tensor<2x512xbf16>)": 1,
        "reduce_scatter: (tensor<8x512xbf16>)": 1,
        "all_reduce: (tensor<128x256xbf16>)": 1,
        "all_reduce: (tensor<64x512xbf16>)": 1,
        "all_reduce: (tensor<512xbf16>)": 1,
        "all_reduce: (tensor<256xbf16>)": 1,
    }


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


@pytest.mark.slow
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", aot_compile.PROGRAMS + aot_compile.CACHED)
def test_sampling_programs(name, guided):
    """Each is traced from shapes as the pipelines call it, with the rows that guidance doubles."""
    mesh = make_mesh(devices=jax.devices("cpu")[:1])
    traced = aot_worker.program(name, mesh, 2, 64, guided).trace()
    outputs = [leaf.shape for leaf in jax.tree.leaves(traced.out_info)]
    rows = 4 if guided else 2
    if name == "prior":
        assert outputs == [(STATE_SLOTS, 2, 1280)]
    elif name.startswith("decoder"):
        cache = [(rows, 8, 8, 384), (1024,), ()] if name in aot_compile.CACHED else []
        assert outputs == [(STATE_SLOTS, 2, 8, 8, 4), *cache]
        assert f"f32[{rows},8,8,4]" in str(traced.jaxpr)
    elif name == "movq":
        assert outputs == [(2, 64, 64, 3)]
    else:
        assert outputs


@pytest.mark.slow
def test_integer_products_are_counted():
    """Of MoVQ's decoder most are of integers; of kept steps, the last layer's alone."""
    mesh = make_mesh(devices=jax.devices("cpu")[:1])
    traced = {
        name: aot_worker.program(name, mesh, 1, 64, True, int8=True).trace().jaxpr
        for name in ("movq", "decoder", "decoder_kept")
    }
    assert 0.5 < aot_worker.integer_flops(traced["movq"]) / (2e12 / 64) < 1.1  # of 2 TFLOP at 512 x 512
    # A 3x3 convolution of C -> D channels at H x W: 2 * 9 * C * D * H * W.
    last = 2 * (9 * 768 * 384 + 9 * 384 * 384 + 768 * 384) * 64 * 2 + 2 * 1536 * 768 * 2
    assert aot_worker.integer_flops(traced["decoder_kept"], min) == last
    assert aot_worker.integer_flops(traced["decoder"]) > 20 * last
    assert aot_worker.integer_flops(aot_worker.program("movq", mesh, 1, 64).trace().jaxpr) == 0
    text = """ENTRY %main (x: s8[8,8], y: s8[8,8], z: f32[8,8]) -> s32[8,8] {
  %x = s8[8,8]{1,0} parameter(0)
  %y = s8[8,8]{1,0} parameter(1)
  %z = f32[8,8]{1,0} parameter(2)
  %a = f32[8,8]{1,0} convolution(%z, %z), dim_labels=bf_io->bf
  ROOT %b = s32[8,8]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
}
"""
    assert aot_cost.integer_products(text) == {"s8": 1, "other": 1}


def test_cycles_of_loops_and_conditionals():
    """A loop of unknown length counts once, a conditional as its dearest branch."""

    def cost(cycles):
        return f'metadata={{}}, backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'

    text = f"""%cheap (p: f32[8]) -> f32[8] {{
  ROOT %a = f32[8]{{0}} add(%p, %p), {cost(3)}
}}

%dear (p.1: f32[8]) -> f32[8] {{
  ROOT %b = f32[8]{{0}} add(%p.1, %p.1), {cost(50)}
}}

%body (s: f32[8]) -> f32[8] {{
  %c = f32[8]{{0}} multiply(%s, %s), {cost(100)}
  ROOT %d = f32[8]{{0}} conditional(%c, %c, %c), branch_computations={{%cheap, %dear}}
}}

%body.1 (s.1: f32[8]) -> f32[8] {{
  ROOT %e = f32[8]{{0}} multiply(%s.1, %s.1), {cost(1000)}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %f = f32[8]{{0}} while(%x), condition=%more, body=%body
  ROOT %g = f32[8]{{0}} while(%f), condition=%less, body=%body.1, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""
    assert aot_cost.estimated_cycles(text) == 150 + 3000
    unknown = re.sub(r'("estimated_cycles":)"\d+"', rf'\1"{2**63 - 1}"', text, count=1)
    assert aot_cost.estimated_cycles(unknown) is None


def test_help_and_bad_arguments():
    """In any Python: the script needs nothing but the standard library."""
    script = [sys.executable, "-S", str(ROOT / "tpu_scripts" / "aot" / "aot_compile.py")]
    done = subprocess.run([*script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--chips v5e:1 v5e:2x2 --batch 8" in done.stdout
    done = subprocess.run([*script, "--chips", "v9:2x2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'v9:2x2' is none of v4, v5e, v5p, v6e, h100, h200" in done.stderr
    done = subprocess.run([*script, "--chips", "h100:1", "v5e:1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "give one kind a run" in done.stderr


def test_slices():
    assert aot_compile.chips("v5e:1") == "v5e:1x1"
    assert aot_compile.chips("v5p:1") == "v5p:1x1x1"
    assert aot_compile.chips("v6e:4x4") == "v6e:4x4"
    assert aot_compile.chips("h100:1") == "h100:1"
    with pytest.raises(Exception, match="a slice of v4 has 3 sides"):
        aot_compile.chips("v4:2x2")
    with pytest.raises(Exception, match="GPUs are compiled for one at a time, as h100:1"):
        aot_compile.chips("h100:2")
    assert aot_compile.parse(["--chips", "h200:1", "--batch", "1", "16"]).batch == [1, 16]


GPU_TEXT = """%triton_product (a: bf16[8,4], b: bf16[4,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,4]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], bf16[8,4], bf16[4,4])) -> (s32[], bf16[8,4], bf16[4,4]) {
  %state = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%state), index=1
  %w = bf16[4,4]{1,0} get-tuple-element(%state), index=2
  %gemm_fusion_dot.1 = bf16[8,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%triton_product
  %conv.1 = (bf16[8,4]{1,0}, u8[16]{0}) custom-call(%gemm_fusion_dot.1, %w), custom_call_target="__cudnn$convForward"
  %y = bf16[8,4]{1,0} get-tuple-element(%conv.1), index=0
  %loop_add_fusion = bf16[8,4]{1,0} fusion(%y), kind=kLoop, calls=%add
  ROOT %next = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) tuple(%i, %loop_add_fusion, %w)
}

ENTRY %main (w: bf16[4,4], x: bf16[8,4]) -> bf16[8,4] {
  %w = bf16[4,4]{1,0} parameter(0)
  %x = bf16[8,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %wrapped_transpose = bf16[4,4]{1,0} fusion(%w), kind=kInput, calls=%turn
  %first = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) tuple(%zero, %x, %wrapped_transpose)
  %while.1 = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) while(%first), condition=%more, body=%body
  ROOT %y = bf16[8,4]{1,0} get-tuple-element(%while.1), index=1
}"""


def test_kernels_of_a_gpu():
    """What a step runs, and what runs once before the loop; bytes are of operands and results."""
    found = aot_gpu.counts(GPU_TEXT)
    assert found["kernels"] == 3
    product, convolution, elementwise = 2 * (32 + 16 + 32), 2 * (32 + 16 + 32) + 16, 2 * (32 + 32)
    assert found["kinds"] == {
        "cuDNN convolution": [1, convolution],
        "Triton product": [1, product],
        "elementwise": [1, elementwise],
    }
    assert found["before"] == {"transpose": [1, 2 * (16 + 16)]}
    assert found["bytes"] == product + convolution + elementwise + 64


def test_results_are_complete_files(tmp_path):
    row = {
        "chips": "v5e:1x1", "devices": 1, "program": "decoder", "compile_seconds": 3.0, "flops": 2e12, "bytes": 8e9,
        "arguments": 3e9, "outputs": 1e9, "temporaries": 2e9, "collectives": {"all-reduce": 2}, "seconds": 0.02,
        "bound_by": "flops", "batch": 4, "size": 512, "estimated_cycles": 45_000_000,
    }  # fmt: skip
    quick = row | {"guided": False, "effort": -0.6}
    gpu = row | {"chips": "h100:1", "kernels": 9, "kinds": {"cuDNN convolution": [9, 8e9]}, "before": {}}
    found = {"jax": "0", "resident_bytes": 5e9, "programs": [row, quick, gpu]}
    aot_compile.write(tmp_path / "aot", found, aot_compile.table(found))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aot.json", "aot.md"]
    assert json.loads((tmp_path / "aot.json").read_text()) == found
    table = (tmp_path / "aot.md").read_text()
    assert (
        "| v5e:1x1 | decoder | 4 | 512 | 2000 | 8.00 | 2.00 | 3.00 | 1.00 | 2.00 | 2 all-reduce | 20.00 | flops "
        "| 30.0 | 3 |" in table
    )
    assert "| v5e:1x1 | decoder, unguided, effort -0.6 | 4 |" in table
    assert "leave 8.00 of 16 GB" in table
    assert "| h100:1 | decoder | 4 | 512 | 9 | cuDNN convolution 9, 8.00 |" in table


def test_pictures_a_second_are_the_sums_of_a_calls_programs():
    """Each program takes a millisecond by its bytes, and two by the estimate."""
    chip = aot_cost.CHIPS["v5e"]
    row = {"chips": "v5e:1x1", "batch": 8, "size": 512, "flops": 1.0, "memory_bytes": chip.bandwidth / 1e3}
    row["estimated_cycles"] = chip.clock / 500
    rows = [row | {"program": name} for name in ("text", "prior_condition", "prior", "condition", "decoder", "movq")]
    rows += [row | {"program": name, "int8": True} for name in ("prior", "decoder", "movq")]
    lines = [line.strip("| ").split(" | ") for line in pictures_per_second.table(rows).splitlines()]
    found = {name: cells for name, *cells in lines}
    assert found["25 + 50 guided steps"] == ["9.9", "3.2", "6.2", "0.1", "101.27", "1.0", "50.63", "1.0"]
    assert found["25 + 50 guided steps, int8 but for MoVQ"] == found["25 + 50 guided steps"]
    assert found["25 + 20 guided steps, dpm++2m-karras"][4:6] == ["163.27", "1.6"]
    assert found["25 + 50 guided steps, `cache_interval=3`"] == ["not compiled: decoder_kept"]
    assert found["4 + 4 unguided evaluations"][0].startswith("not compiled: prior, unguided, condition, unguided")


def test_bytes_of_a_gpu_program_are_those_counted_in_its_text():
    """In a real program, a CPU's; of one operation, so that the bytes are what bounds it."""
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled, chip = jax.jit(lambda x: jnp.tanh(x) @ x).lower(x).compile(), aot_cost.CHIPS["h100"]
    found, touched = aot_gpu.costs(1.0, compiled, chip), aot_gpu.counts(compiled.as_text())["bytes"]
    assert touched >= 2 * 64 * 64 * 4
    assert (found["bytes"], found["bound_by"], found["arguments"]) == (touched, "bytes", 64 * 64 * 4)
    assert found["seconds"] == pytest.approx(touched / chip.bandwidth)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "of", "frozen"),
    [
        ("lora-prior", LoraTask, {"float32", "bfloat16"}),
        ("distill-decoder", DistillDecoderTask, {"bfloat16"}),
        ("distill-lora-decoder", LoraTask, {"float32", "bfloat16"}),
    ],
)
def test_training_programs(program, of, frozen):
    """The task of each, and what is frozen beside the trained weights; networks are shapes."""
    task = aot_train_worker.task_of(program, {"batch": 4, "accumulation": 1}, devices=16)
    assert type(task) is of
    assert (str(task.kind) == program.replace("-lora", "")) if program.startswith("distill") else task.kind == program
    [module] = task.modules.values()
    given = jax.tree.leaves(jax.eval_shape(task.frozen_of, Network.split(module)[1]))
    assert {str(leaf.dtype) for leaf in given} == frozen
    assert callable(aot_train_worker.loss_of(task))
