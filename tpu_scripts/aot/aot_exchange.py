"""What the chips of a mesh exchange in a compiled program, by kind of collective and by axis of the mesh.

Two things of a TPU's optimised HLO would be counted wrong by its lines alone. A collective that overlaps with
computation is repeated in every fusion that carries it on, each time of the same chain: it counts once. And a
reduce-scatter may be an all-reduce within a fusion whose computation is called `all-reduce-scatter`.

Standard library only.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from tpu_scripts.aot.aot_cost import COLLECTIVES, computations, size_of

EVERY = "all"  # the name of the axes of a group that spans a mesh of one axis only, or of no known one


class Exchange(NamedTuple):
    """One collective.

    Args:
        kind: such as "all-gather".
        axes: of the mesh, over which it exchanges, such as "fsdp" or "data+fsdp".
        times: how often it runs; in a loop without a known number of trips, once a trip.
        result: bytes of its result on a chip.
        sent: bytes that a chip sends, by the algorithms for rings: of n chips, (n - 1) / n of what is gathered or
            scattered, and twice that of what is reduced everywhere.
    """

    kind: str
    axes: str
    times: int
    result: float
    sent: float


class Total(NamedTuple):
    """Sums over the collectives of one kind over the same axes; bytes as in `Exchange`."""

    kind: str
    axes: str
    count: int
    result: float
    sent: float

    def __str__(self) -> str:
        return f"{self.count} {self.kind} over {self.axes} ({self.sent / 1e9:.2f})"


def totals(text: str, mesh: Mapping[str, int]) -> list[Total]:
    """The sums of `exchanges` by kind and axes, the most bytes first."""
    found: dict[tuple[str, str], Total] = {}
    for one in exchanges(text, mesh):
        old = found.get((one.kind, one.axes), Total(one.kind, one.axes, 0, 0.0, 0.0))
        found[one.kind, one.axes] = old._replace(
            count=old.count + one.times,
            result=old.result + one.times * one.result,
            sent=old.sent + one.times * one.sent,
        )
    return sorted(found.values(), key=lambda total: -total.sent)


def exchanges(text: str, mesh: Mapping[str, int]) -> list[Exchange]:
    """The collectives that the entry computation of an HLO text runs, each once.

    Args:
        mesh: sizes of its axes by name, in the order of the devices; the last changes fastest.
    """
    bodies = computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    found: list[Exchange] = []
    chains: set[str] = set()  # of collectives that fusions carry on

    def visit(name: str, times: int, fused: bool) -> None:
        for _, kind, opcode, rest in bodies.get(name, ()):
            base = opcode.removesuffix("-start")
            if base in COLLECTIVES:
                if fused and (chain := re.search(r"chain_id=\"\d+\"", rest) or re.search(r"channel_id=\d+", rest)):
                    if chain[0] in chains:
                        continue
                    chains.add(chain[0])
                scatters = base == "all-reduce" and name.startswith("all-reduce-scatter")
                found.append(exchange(opcode, kind, rest, mesh, times, scatters))
            elif opcode == "while":
                trips = re.search(r'known_trip_count[^\d]*"?(\d+)', rest)
                if body := re.search(r"body=%?([\w.\-]+)", rest):
                    visit(body[1], times * (int(trips[1]) if trips else 1), fused)
            elif opcode in ("fusion", "call", "conditional", "async-start"):
                for called in called_by(rest):
                    visit(called, times, fused or opcode == "fusion")

    if entry:
        visit(entry[1], 1, False)
    return found


def called_by(rest: str) -> list[str]:
    """The computations that an instruction calls."""
    single = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    return single + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])


def exchange(
    opcode: str, of_type: str, rest: str, mesh: Mapping[str, int], times: int = 1, scatters: bool = False
) -> Exchange:
    """One collective from its instruction: opcode, type, operands and the rest.

    Args:
        scatters: whether it is an all-reduce of which each chip keeps a part.
    """
    base = opcode.removesuffix("-start")
    kind = "reduce-scatter" if scatters else base
    groups = groups_of(rest, math.prod(mesh.values()))
    size = max(map(len, groups))
    axes = axes_of(groups, mesh)
    result = float(size_of(of_type))
    if opcode.endswith("-start"):
        if base == "all-gather":  # the type is (operands, results)
            result *= size / (size + 1)
        elif base == "collective-permute":  # (operand, result, two words of state)
            result = size_of(re.sub(r", u32\[\][^,)]*", "", of_type)) / 2
    if scatters:  # the type is of what is reduced
        result /= size
    share = (size - 1) / size
    sent = {
        "all-reduce": 2 * share * result,
        "reduce-scatter": (size - 1) * result,
        "collective-permute": result,
        "collective-broadcast": result,
    }.get(kind, share * result)
    return Exchange(kind, axes, times, result, sent)


def axes_of(groups: list[list[int]], mesh: Mapping[str, int]) -> str:
    """The axes of a mesh along which the members of groups of devices differ, joined by "+"."""
    names, sizes = list(mesh), list(mesh.values())
    found: set[str] = set()
    for group in groups:
        places = [place(device, sizes) for device in group]
        found |= {name for name, values in zip(names, zip(*places, strict=True), strict=True) if len(set(values)) > 1}
    return "+".join(name for name in names if name in found) or EVERY


def place(device: int, sizes: list[int]) -> list[int]:
    """Where a device is along each axis."""
    found = []
    for size in reversed(sizes):
        device, index = divmod(device, size)
        found.append(index)
    return found[::-1]


def groups_of(rest: str, devices: int) -> list[list[int]]:
    """The groups of devices of a collective: HLO writes them as lists, as a reshaped range, or as axes of a mesh.

    The pairs of a collective-permute are groups of two.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", rest):
        return lists(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return lists(listed[1])
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        shape, order = iota[1].split("<=")
        flat = reordered(order)
        length = integers(shape)[-1]
        return [flat[i : i + length] for i in range(0, len(flat), length)]
    if named := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{(.*?)\}", rest
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = reordered(named[2]) if named[2] else list(range(devices))
        return along(sizes, ids, re.findall(r"'(\w+)'", named[3]))
    return [list(range(devices))]


def along(sizes: dict[str, int], ids: list[int], names: list[str]) -> list[list[int]]:
    """The groups of devices of a mesh that differ only along some axes."""
    found: dict[tuple[int, ...], list[int]] = {}
    for at, device in zip(itertools.product(*map(range, sizes.values())), ids, strict=True):
        rest = tuple(i for name, i in zip(sizes, at, strict=True) if name not in names)
        found.setdefault(rest, []).append(device)
    return list(found.values())


def reordered(text: str) -> list[int]:
    """The numbers of a range that is reshaped and transposed, such as "[2,4]T(1,0)"."""
    shape, _, order = text.partition("T")
    sides = integers(shape)
    axes = integers(order) or list(range(len(sides)))
    strides = [math.prod(sides[i + 1 :]) for i in range(len(sides))]
    return [
        sum(i * strides[axis] for i, axis in zip(at, axes, strict=True))
        for at in itertools.product(*(range(sides[axis]) for axis in axes))
    ]


def lists(text: str) -> list[list[int]]:
    """The lists of numbers of a text such as "{0,1},{2,3}"."""
    return [integers(part) for part in re.findall(r"\{([\d,]*)\}", text)]


def integers(text: str) -> list[int]:
    """The numbers in a text."""
    return [int(number) for number in re.findall(r"\d+", text)]
