"""What training steps of the official sizes cost on TPUs, without a TPU: compiled by libtpu on a CPU.

    python tpu_scripts/aot/aot_train.py --chips v5e:4x4 --fsdp 16 --batch 4 --kinds decoder prior lora-decoder

The production step (kandinsky_jax/training/step.py) on encoded batches: bfloat16 arithmetic, float32 weights and AdamW,
weights and state sharded over `fsdp`, rematerialisation. `distill-*` distils into all weights, `distill-lora-*` into a
LoRA; the teacher is guided, frozen, and sharded as the weights, in bfloat16. Per chip: memory, FLOPs, collectives by
kind and axis and their bytes, and the time that these allow. Writes tpu_scripts/results/aot-train-DATE.json and .md.
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

from tpu_scripts.aot.aot_compile import EFFORT_HELP, check, chips, own_python, positive, progress, worker, write  # noqa: E402
from tpu_scripts.aot.aot_exchange import Total  # noqa: E402

KINDS = (
    "decoder",
    "prior",
    "lora-decoder",
    "lora-prior",
    "distill-decoder",
    "distill-prior",
    "distill-lora-decoder",
    "distill-lora-prior",
)


def main(argv: list[str] | None = None) -> None:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=chips, default="v5e:4x4", metavar="CHIP:SLICE", help="default v5e:4x4")
    parser.add_argument("--fsdp", type=positive, default=16, help="parts of the weights, default 16")
    parser.add_argument("--batch", type=positive, default=4, help="examples per chip, default 4")
    parser.add_argument("--accumulation", type=positive, default=1, help="parts of a batch, default 1")
    parser.add_argument("--size", type=positive, default=512, help="pixels along a side, default 512")
    parser.add_argument(
        "--effort",
        type=float,
        default=0.0,
        help=EFFORT_HELP,
    )
    parser.add_argument("--kinds", nargs="+", default=KINDS[:3], choices=KINDS)
    parser.add_argument("--python", type=Path, help="a Python that has jax[tpu] and this project's dependencies")
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results")
    parser.add_argument("--hlo", type=Path, help="a folder for the programs' HLO texts")
    arguments = parser.parse_args(argv)
    target = arguments.output / f"aot-train-{datetime.date.today().isoformat()}"
    earlier = target.with_suffix(".json")
    found: dict[str, Any] = json.loads(earlier.read_text()) if earlier.exists() else {}
    names = ("chips", "fsdp", "batch", "accumulation", "size", "effort", "kinds")
    job = {name: getattr(arguments, name) for name in names}
    rows = found.setdefault("programs", [])
    for folder in filter(None, (arguments.output, arguments.hlo)):
        folder.mkdir(parents=True, exist_ok=True)
    job["hlo"] = str(arguments.hlo.absolute()) if arguments.hlo else None
    for event in worker(arguments.python or own_python(), job, "aot_train_worker"):
        kind = event.pop("event")
        if kind == "versions":
            found |= event
            continue
        print(progress(kind, event), flush=True)
        if kind != "compiling":
            rows[:] = [row for row in rows if any(row.get(n, 0) != event[n] for n in (*names[:-1], "program"))] + [
                event
            ]
            write(target, found, table(found))
    check(rows, target)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"Per chip, bfloat16 arithmetic, float32 weights and AdamW, rematerialisation; jax {found['jax']}.",
        "Collectives: number, kind and axes of the mesh (GB that a chip sends by ring algorithms). Results are",
        "the bytes of what they give on a chip. Times are of the published figures, for v5e 197 TFLOP/s, 819 GB/s of",
        "memory, and 4 links of 50 GB/s each way, all of them busy; memory traffic is XLA's count.",
        "",
        "| chips | program | data x fsdp | batch | state and batch, GB | temporaries, GB | to spare, GB | TFLOP "
        "| collectives | results, GB | sent, GB | links, ms | at least, ms | bound by | compiled in, s |",
        "|---|---|---|" + "---:|" * 5 + "---|" + "---:|" * 4 + "---|---:|",
    ]
    for row in found["programs"]:
        parts = f" in {row['accumulation']} parts" if row["accumulation"] > 1 else ""
        mesh = f"{row['devices'] // row['fsdp']} x {row['fsdp']}"
        effort = f", effort {row['effort']:g}" if row.get("effort") else ""
        head = f"| {row['chips']} | {row['program']}{effort} | {mesh} | {row['batch']}{parts} "
        if "error" in row:
            lines.append(f"{head}| {row['error']} |")
            continue
        exchanges = [Total(**fields) for fields in row["exchanges"]]
        sizes = " | ".join(f"{row[name] / 1e9:.2f}" for name in ("arguments", "temporaries", "spare"))
        moved = [sum(total.result for total in exchanges) / 1e9, sum(total.sent for total in exchanges) / 1e9]
        lines.append(
            f"{head}| {sizes} | {row['flops'] / 1e12:.1f} | {', '.join(map(str, exchanges)) or 'none'} "
            f"| {moved[0]:.2f} | {moved[1]:.2f} | {row['link_seconds'] * 1e3:.0f} | {row['seconds'] * 1e3:.0f} "
            f"| {row['bound_by']} | {row['compile_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
