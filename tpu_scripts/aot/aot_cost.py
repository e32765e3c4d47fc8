"""What a compiled program costs: XLA's counts, the collectives in its text, the time that a chip's figures allow.

Standard library only.
"""

from __future__ import annotations

import collections
import math
import re
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A chip's published figures."""

    flops: float  # bfloat16, per second
    bandwidth: float  # of its memory (HBM), bytes per second
    memory: float  # bytes
    links: float = math.inf  # bytes per second that it sends to other chips, by all its links; infinite if not given
    int8: float = 0.0  # operations on 8-bit integers per second; 0 if not given
    clock: float = 0.0  # cycles per second, from the peak and the size of its matrix units; 0 if not known


# docs.cloud.google.com/tpu/docs/v4, .../v5e (a later version of this page says 800 GiB/s), .../v5p and .../v6e;
# links are half of the "bidirectional inter-chip interconnect bandwidth", for v5e 400 GB/s over 4 ports, v5p 1200 GB/s;
# NVIDIA's data sheets of the H100 (SXM) and the H200 (SXM), without sparsity
CHIPS = {
    "v4": Chip(275e12, 1200e9, 32e9),
    "v5e": Chip(197e12, 819e9, 16e9, 200e9, 394e12, 1.5e9),
    "v5p": Chip(459e12, 2765e9, 95e9, 600e9),
    "v6e": Chip(918e12, 1638e9, 32e9, int8=1836e12),
    "h100": Chip(989e12, 3350e9, 80e9),
    "h200": Chip(989e12, 4800e9, 141e9),
}
GPUS = ("h100", "h200")

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8}
# An instruction: name, type, opcode, operands and the rest. Types of tuples stand in brackets and contain blanks.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^{}]*\})?")  # a type with its layout
# These move nothing, or what they move is counted elsewhere.
FREE = frozenset("parameter get-tuple-element tuple bitcast constant while conditional copy-done".split())


def collectives(text: str) -> dict[str, int]:
    """How many collectives of each kind an HLO text has; an asynchronous one, with its start and end, counts once."""
    kinds = "|".join(COLLECTIVES)
    return dict(collections.Counter(re.findall(rf"^\s+.* = .*?[\])}}] ({kinds})(?:-start)?\(", text, re.MULTILINE)))


def repeated_bytes(text: str) -> float:
    """Bytes that XLA's cost analysis leaves out of loops with a known number of trips, because it counts a body once.

    Loops without a known number of trips, such as the denoising loop, are left at one trip.
    """
    bodies = computations(text)
    extra = 0.0

    def visit(name: str, times: int) -> None:
        nonlocal extra
        for _, _, opcode, rest in bodies.get(name, ()):
            if opcode == "while" and (body := re.search(r"body=%?([\w.\-]+)", rest)):
                trips = re.search(r'known_trip_count[^\d]*"?(\d+)', rest)
                inner = times * (int(trips.group(1)) if trips else 1)
                extra += (inner - 1) * _own_bytes(bodies.get(body.group(1), []))
                visit(body.group(1), inner)

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry:
        visit(entry.group(1), 1)
    return extra


def memory_bytes(text: str) -> int:
    """Bytes that the operations of a TPU's optimised HLO text read from the chip's memory (HBM) and write there.

    Not those of on-chip memory, `S(1)` in a layout. Of a copy or slice that runs beside other operations, what it
    moves counts once; loops count as in `repeated_bytes`.
    """
    bodies = computations(text)

    def own(lines: list[tuple[str, ...]]) -> int:
        types = {name: kind for name, kind, _, _ in lines}
        total = 0
        for _, kind, opcode, rest in lines:
            if opcode in FREE or opcode == "reshape" or opcode.endswith("-done") or "ConcatBitcast" in rest:
                continue
            if opcode.endswith("-start"):  # its type holds the source and the destination
                total += min((size_of(array) for array in _ARRAY.findall(kind) if size_of(array) > 4), default=0)
                continue
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            total += sum(map(_outside, (kind, *(types.get(name, "") for name in operands))))
        return total

    def visit(name: str) -> int:
        total = own(bodies.get(name, []))
        for _, _, opcode, rest in bodies.get(name, ()):
            if opcode == "while" and (body := re.search(r"body=%?([\w.\-]+)", rest)):
                trips = re.search(r'known_trip_count[^\d]*"?(\d+)', rest)
                total += (int(trips.group(1)) if trips else 1) * visit(body.group(1))
        return total

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return visit(entry.group(1)) if entry else 0


def _outside(kind: str) -> int:
    return sum(size_of(array) for array in _ARRAY.findall(kind) if "S(1)" not in array)


def estimated_cycles(text: str) -> int | None:
    """The cycles that libtpu's own cost model writes beside the operations of an optimised HLO text, added up.

    It leaves out Pallas kernels and copies that run beside other operations. Loops count as in `repeated_bytes`, of a
    conditional the dearest branch. None where it has no estimate of an operation, and writes the largest number.
    """
    bodies = computations(text)

    def of(name: str) -> int:
        total = 0
        for _, _, opcode, rest in bodies.get(name, ()):
            if opcode == "while" and (body := re.search(r"body=%?([\w.\-]+)", rest)):
                trips = re.search(r'known_trip_count[^\d]*"?(\d+)', rest)
                total += (int(trips.group(1)) if trips else 1) * of(body.group(1))
            elif opcode == "conditional":
                names = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", rest)
                if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
                    names += re.findall(r"[\w.\-]+", branches.group(1))
                total += max(map(of, names), default=0)
            elif cycles := re.search(r'"estimated_cycles":"(\d+)"', rest):
                total += int(cycles.group(1))
        return total

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    total = of(entry.group(1)) if entry else 0
    return None if total >= 2**62 else total


def computations(text: str) -> dict[str, list[tuple[str, ...]]]:
    """The instructions of each computation of an HLO text: name, type, opcode, operands and the rest."""
    found: dict[str, list[tuple[str, ...]]] = {}
    lines: list[tuple[str, ...]] = []
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _COMPUTATION.match(line)):
            lines = found.setdefault(head.group(1), [])
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction.groups())
    return found


def _own_bytes(instructions: list[tuple[str, ...]]) -> float:
    """Operands and results of a computation's instructions, without the insides of what they call."""
    types = {name: kind for name, kind, _, _ in instructions}
    total = 0
    for _, kind, opcode, rest in instructions:
        if opcode not in FREE:
            operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
            total += size_of(kind) + sum(size_of(types.get(name, "")) for name in operands)
    return total


def size_of(kind: str) -> int:
    """Bytes of a type such as `bf16[2,3]{1,0}`, or of a tuple of them."""
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", kind)
    return sum(_BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in shapes)


def costs(compiled: Any, chip: Chip, integer: float = 0.0) -> dict[str, Any]:
    """The figures of one compiled program, per chip.

    Args:
        compiled: what `jax.jit(...).lower(...).compile()` gives.
        integer: how many of its FLOPs are of 8-bit integers.
    Returns:
        flops and bytes as XLA counts them (a loop without a known number of trips once; bytes also of what stays in
        on-chip memory between two operations), memory in bytes, collectives, and `seconds`: what the larger of
        flops / peak and bytes / bandwidth takes.
    """
    text, counted = compiled.as_text(), compiled.cost_analysis()
    touched = float(counted["bytes accessed"]) + repeated_bytes(text)
    found = figures(float(counted["flops"]), touched, collectives(text), compiled.memory_analysis(), chip, integer)
    if integer:
        found |= {"integer_flops": integer, "integer_products": integer_products(text)}
    return found | {"estimated_cycles": estimated_cycles(text), "memory_bytes": memory_bytes(text)}


def integer_products(text: str) -> dict[str, int]:
    """How many convolutions and products of an optimised HLO text take 8-bit integers, and how many do not."""
    found = {"s8": 0, "other": 0}
    for lines in computations(text).values():
        types = {name: kind for name, kind, _, _ in lines}
        for _, _, opcode, rest in lines:
            if opcode in ("convolution", "dot"):
                operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
                integers = all(types.get(name, "").startswith(("s8", "u8")) for name in operands)
                found["s8" if integers else "other"] += 1
    return found


def figures(
    flops: float, touched: float, found: dict[str, Any], memory: Any, chip: Chip, integer: float = 0.0
) -> dict[str, Any]:
    """What is written of one compiled program.

    Args:
        flops, touched: operations, and bytes read and written.
        found: collectives.
        memory: the program's `memory_analysis()`.
        integer: how many of the operations are on 8-bit integers.
    """
    computing, moving = seconds_of(flops, touched, chip, integer)
    return {
        "flops": flops,
        "bytes": touched,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": found,
        "seconds": max(computing, moving),
        "bound_by": "flops" if computing > moving else "bytes",
    }


def seconds_of(flops: float, touched: float, chip: Chip, integer: float = 0.0) -> tuple[float, float]:
    """Seconds that arithmetic takes at the chip's published figures, and those of memory traffic.

    Args:
        integer: how many of the operations are on 8-bit integers; counted in the traced program, and so possibly more
            than XLA counts in all.
    """
    integer = min(integer, flops)
    return (flops - integer) / chip.flops + integer / (chip.int8 or chip.flops), touched / chip.bandwidth
