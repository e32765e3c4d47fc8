"""Pictures a second that a TPU chip can make at most, by ways to generate: from the results of aot_compile.py.

    python tpu_scripts/aot/pictures_per_second.py tpu_scripts/results/aot-2026-11-30.json

adds up the programs of a picture, each as long as the larger of its arithmetic and its memory traffic take at the
chip's published figures ("at most"), and as long as libtpu's cost model expects ("estimate"). Nothing has run on a
chip: transfers from and to the host, and gaps between programs, are in neither. It needs the results of

    python tpu_scripts/aot/aot_compile.py --batch 8 --programs text prior_condition prior condition decoder \\
        decoder_kept movq
    python tpu_scripts/aot/aot_compile.py --batch 8 --add --unguided --programs prior condition decoder
    python tpu_scripts/aot/aot_compile.py --batch 8 --add --int8 --programs prior decoder movq
    python tpu_scripts/aot/aot_compile.py --batch 8 --add --int8 --unguided --programs prior decoder

Writes the table beside the results, as aot-DATE-pictures.md. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tpu_scripts.aot.aot_compile import variant  # noqa: E402
from tpu_scripts.aot.aot_cost import CHIPS, seconds_of  # noqa: E402


class Way(NamedTuple):
    """A way to generate a picture."""

    name: str
    prior_steps: int
    steps: int
    guided: bool = True
    int8: bool = False
    int8_movq: bool = False
    cache_interval: int = 1

    def programs(self) -> dict[str, int]:
        """How often each program runs, by the names that `variant` gives."""
        of_loops = ", unguided" * (not self.guided)
        int8 = ", int8" * self.int8
        whole = math.ceil(self.steps / self.cache_interval)
        found = {
            "text": 1,
            "prior_condition": 1,
            f"prior{of_loops}{int8}": self.prior_steps,
            f"condition{of_loops}": 1,
            f"decoder{of_loops}{int8}": whole,
            f"movq{', int8' * self.int8_movq}": 1,
        }
        return found | ({f"decoder_kept{of_loops}{int8}": self.steps - whole} if self.steps > whole else {})


WAYS = (
    Way("25 + 50 guided steps", 25, 50),
    Way("25 + 20 guided steps, dpm++2m-karras", 25, 20),
    Way("25 + 50 guided steps, `cache_interval=3`", 25, 50, cache_interval=3),
    Way("25 + 50 guided steps, int8", 25, 50, int8=True, int8_movq=True),
    Way("25 + 50 guided steps, int8 but for MoVQ", 25, 50, int8=True),
    Way("4 + 4 unguided evaluations", 4, 4, guided=False),
    Way("4 + 4 unguided evaluations, int8", 4, 4, guided=False, int8=True, int8_movq=True),
    Way("4 + 4 unguided evaluations, int8 but for MoVQ", 4, 4, guided=False, int8=True),
)


def at_most(row: dict[str, Any]) -> float:
    """Seconds that a program takes at least."""
    chip = CHIPS[row["chips"].split(":")[0]]
    return max(seconds_of(row["flops"], row["memory_bytes"], chip, row.get("integer_flops", 0.0)))


def estimated(row: dict[str, Any]) -> float:
    """Seconds that libtpu expects a program to take; not a number where it has no estimate."""
    cycles = math.nan if row["estimated_cycles"] is None else row["estimated_cycles"]
    return float(cycles / CHIPS[row["chips"].split(":")[0]].clock)


def table(rows: list[dict[str, Any]]) -> str:
    """The ways, as Markdown.

    Args:
        rows: of one kind of chip, batch and size, at XLA's usual effort.
    """
    programs = {variant(row): row for row in rows}
    chip, batch, size = rows[0]["chips"].split(":")[0], rows[0]["batch"], rows[0]["size"]
    lines = [
        f"{chip}, batches of {batch}, {size} x {size}, bfloat16 and int8. *At most*: every program as long as the",
        "larger of arithmetic and memory traffic take at the chip's published figures. *Estimate*: by libtpu's cost",
        "model, without Pallas kernels and copies that run beside other operations. Nothing has run on a chip.",
        "",
        "| | ms a picture, at least | prior | UNet | MoVQ | pictures a second, at most | times the first "
        "| estimate, a second | times the first |",
        "|---|" + "---:|" * 8,
    ]
    first: tuple[float, float] | None = None
    for way in WAYS:
        if missing := [name for name in way.programs() if name not in programs]:
            lines.append(f"| {way.name} | not compiled: {', '.join(missing)} |")
            continue
        parts = {name: times * at_most(programs[name]) / batch * 1e3 for name, times in way.programs().items()}
        stages = [
            sum(ms for name, ms in parts.items() if name.startswith(stage)) for stage in ("prior", "decoder", "movq")
        ]
        rates = (
            1e3 / sum(parts.values()),
            batch / sum(times * estimated(programs[name]) for name, times in way.programs().items()),
        )
        first = first or rates
        shown = " | ".join(f"{ms:.1f}" for ms in (sum(parts.values()), *stages))
        lines.append(
            f"| {way.name} | {shown} | {rates[0]:.2f} | {rates[0] / first[0]:.1f} | {rates[1]:.2f} "
            f"| {rates[1] / first[1]:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON of aot_compile.py")
    parser.add_argument("--chips", default="v5e:1x1")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=512)
    given = parser.parse_args()
    wanted = {"chips": given.chips, "batch": given.batch, "size": given.size}
    rows = [
        row
        for row in json.loads(given.results.read_text())["programs"]
        if wanted.items() <= row.items() and "error" not in row and not row.get("effort")
    ]
    if not rows:
        sys.exit(f"{given.results} has no programs of {given.chips}, batch {given.batch}, size {given.size}")
    text = table(rows)
    target = given.results.with_name(f"{given.results.stem}-pictures.md")
    target.write_text(text)
    print(f"{text}\n{target}")


if __name__ == "__main__":
    main()
