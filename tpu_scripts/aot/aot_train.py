"""What training steps of the official sizes cost on TPUs, without a TPU: compiled by libtpu on a CPU.

    python tpu_scripts/aot/aot_train.py --chips v5e:4x4 --fsdp 16 --batch 4 --kinds decoder prior lora-decoder

The production step (kandinsky_jax/training/step.py) on encoded batches: bfloat16 arithmetic, float32 weights and AdamW,
weights and state divided over `fsdp`, rematerialisation. Per chip: memory, collectives and the bytes of their results,
FLOPs. Writes tpu_scripts/results/aot-train-DATE.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tpu_scripts.aot.aot_compile import check, chips, own_python, positive, progress, worker, write  # noqa: E402

KINDS = ("decoder", "prior", "lora-decoder", "lora-prior")


def main(argv: list[str] | None = None) -> None:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=chips, default="v5e:4x4", metavar="CHIP:SLICE", help="default v5e:4x4")
    parser.add_argument("--fsdp", type=positive, default=16, help="parts of the weights, default 16")
    parser.add_argument("--batch", type=positive, default=4, help="examples per chip, default 4")
    parser.add_argument("--accumulation", type=positive, default=1, help="parts of a batch, default 1")
    parser.add_argument("--size", type=positive, default=512, help="pixels along a side, default 512")
    parser.add_argument("--kinds", nargs="+", default=KINDS[:3], choices=KINDS)
    parser.add_argument("--python", type=Path, help="a Python that has jax[tpu] and this project's dependencies")
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results")
    arguments = parser.parse_args(argv)
    target = arguments.output / f"aot-train-{datetime.date.today().isoformat()}"
    earlier = target.with_suffix(".json")
    found: dict[str, Any] = json.loads(earlier.read_text()) if earlier.exists() else {}
    names = ("chips", "fsdp", "batch", "accumulation", "size", "kinds")
    job = {name: getattr(arguments, name) for name in names}
    rows = found.setdefault("programs", [])
    for event in worker(arguments.python or own_python(), job, "aot_train_worker"):
        kind = event.pop("event")
        if kind == "versions":
            found |= event
            continue
        print(progress(kind, event), flush=True)
        if kind != "compiling":
            rows[:] = [row for row in rows if any(row[n] != event[n] for n in (*names[:-1], "program"))] + [event]
            write(target, found, table(found))
    check(rows, target)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"Per chip, bfloat16 arithmetic, float32 weights and AdamW, rematerialisation; jax {found['jax']}.",
        "Bytes exchanged are of the collectives' results, those in loops once.",
        "",
        "| chips | program | fsdp | batch | state and batch, GB | temporaries, GB | to spare, GB | TFLOP | collectives "
        "| exchanged, GB | at least, ms |",
        "|---|---|" + "---:|" * 6 + "---|---:|---:|",
    ]
    for row in found["programs"]:
        parts = f" in {row['accumulation']} parts" if row["accumulation"] > 1 else ""
        head = f"| {row['chips']} | {row['program']} | {row['fsdp']} | {row['batch']}{parts} "
        if "error" in row:
            lines.append(f"{head}| {row['error']} |")
            continue
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items()) or "0"
        sizes = " | ".join(f"{row[name] / 1e9:.2f}" for name in ("arguments", "temporaries", "spare"))
        lines.append(
            f"{head}| {sizes} | {row['flops'] / 1e12:.1f} | {kinds} | {sum(row['exchanged'].values()) / 1e9:.1f} "
            f"| {row['seconds'] * 1e3:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
