"""GPUs for ahead-of-time compiling: the chip's description that XLA wants, and the kernels of a compiled program.

XLA's GPU compiler gives no cost analysis of what it has compiled, so bytes are counted here, in its text: what every
kernel reads and writes, as XLA's own analysis does it, a loop's body once. Without a device nothing is autotuned: which
library or tiling a product gets on a real GPU may differ. Standard library only.
"""

from __future__ import annotations

import re
from typing import Any

from tpu_scripts.aot.aot_cost import FREE, Chip, computations, figures, size_of

# NVIDIA's H100 data sheet and "H100 Tensor Core GPU Architecture" (table 3: SXM5) and the H200 data sheet: processors,
# memory, bandwidth, L2, boost clock; the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
# (9.0), for the limits of a block and of a processor. The fields are those of XLA's `stream_executor.GpuDeviceInfo`.
_HOPPER = """gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  name: "{name}"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.15.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 15 patch: 0 }}
device_description_str: "{name}"
"""
TARGETS = {
    "h100": _HOPPER.format(name="NVIDIA H100 80GB HBM3", memory=85_000_000_000, bandwidth=3_350_000_000_000),
    "h200": _HOPPER.format(name="NVIDIA H200", memory=150_000_000_000, bandwidth=4_800_000_000_000),
}

# Kinds of kernels, by the name that XLA gives a fusion for what it does last or most; the first that fits counts.
_FUSIONS = ("transpose", "copy", "concatenate", "reduce", "broadcast", "scatter", "sort")


def costs(flops: float, compiled: Any, chip: Chip) -> dict[str, Any]:
    """`aot_cost.costs` of a program for a GPU, and `counts` of its kernels.

    Args:
        flops: of the program as it was written.
        compiled: what `jax.jit(...).lower(...).compile()` gives.
    """
    found = counts(compiled.as_text())
    return {**figures(flops, found.pop("bytes"), {}, compiled.memory_analysis(), chip), **found}


def counts(text: str) -> dict[str, Any]:
    """The kernels of an optimised HLO text for a GPU.

    Returns:
        `bytes`, of all kernels, those in loops as often as is known, at least once; `kernels`, how many there are in
        the largest loop, or in all where there is none; `kinds`, of these: `{kind: [count, bytes]}`; `before`, the same
        of what runs outside that loop.
    """
    bodies = computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert entry is not None
    outside, loops = _kinds(bodies, entry.group(1)), []
    queue = [(entry.group(1), 1)]
    while queue:
        name, times = queue.pop()
        for _, _, opcode, rest in bodies.get(name, ()):
            if opcode == "while" and (body := re.search(r"body=%?([\w.\-]+)", rest)):
                trips = re.search(r'known_trip_count[^\d]*"?(\d+)', rest)  # the denoising loop's are not known: one
                inner = times * (int(trips.group(1)) if trips else 1)
                kinds = _kinds(bodies, body.group(1))
                loops.append({kind: [inner * count, inner * size] for kind, (count, size) in kinds.items()})
                queue.append((body.group(1), inner))
    inside = max(loops, key=_bytes, default={})
    total = _bytes(outside) + sum(map(_bytes, loops))
    kinds, before = (inside, outside) if inside else (outside, {})
    return {"bytes": total, "kernels": sum(count for count, _ in kinds.values()), "kinds": kinds, "before": before}


def _bytes(kinds: dict[str, list[int]]) -> int:
    return sum(size for _, size in kinds.values())


def _kinds(bodies: dict[str, list[tuple[str, ...]]], name: str) -> dict[str, list[int]]:
    """The kernels of one computation: `{kind: [count, bytes]}`, the heaviest first."""
    lines = bodies.get(name, [])
    types = {line[0]: line[1] for line in lines}
    kinds: dict[str, list[int]] = {}
    for own, result, opcode, rest in lines:
        if opcode not in FREE:
            operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
            entry = kinds.setdefault(_kind(bodies, own, opcode, rest), [0, 0])
            entry[0] += 1
            entry[1] += size_of(result) + sum(size_of(types.get(operand, "")) for operand in operands)
    return dict(sorted(kinds.items(), key=lambda item: -item[1][1]))


def _kind(bodies: dict[str, list[tuple[str, ...]]], name: str, opcode: str, rest: str) -> str:
    if opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        called = target.group(1) if target else opcode
        for sign, kind in (("__cudnn$conv", "cuDNN convolution"), ("__cublas", "cuBLAS product")):
            if called.startswith(sign):
                return kind
        return "cuDNN other" if called.startswith("__cudnn") else called
    if opcode != "fusion":
        return opcode
    if "kind=kCustom" in rest:
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        return "Triton product" if called and _has_dot(bodies, called.group(1)) else "Triton other"
    return next((kind for kind in _FUSIONS if kind in name), "elementwise")


def _has_dot(bodies: dict[str, list[tuple[str, ...]]], name: str) -> bool:
    return any(
        opcode == "dot" or any(_has_dot(bodies, called) for called in re.findall(r"calls=%?([\w.\-]+)", rest))
        for _, _, opcode, rest in bodies.get(name, ())
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The kernels of GPU programs as Markdown."""
    lines = [
        "Kernels of one step (or of the whole program, where it is no loop), and those outside the loop, which run",
        "once for every call of the loop. Nothing is autotuned without a device.",
        "",
        "| chips | program | batch | size | kernels | in a step: count, GB | outside: count, GB |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        kinds, before = (
            "; ".join(f"{kind} {count}, {size / 1e9:.2f}" for kind, (count, size) in part.items() if size > 5e6)
            for part in (row["kinds"], row["before"])
        )
        lines.append(
            f"| {row['chips']} | {row['program']} | {row['batch']} | {row['size']} | {row['kernels']} | {kinds} "
            f"| {before} |"
        )
    return [*lines, ""]
