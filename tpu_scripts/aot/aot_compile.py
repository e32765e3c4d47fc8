"""What the sampling programs cost on TPUs and GPUs, without either: compiled for described chips on a CPU.

Per program and chip: FLOPs, bytes accessed, memory, collectives, seconds to compile, and the time that the larger of
FLOPs / peak and bytes / bandwidth allows; on GPUs also the kernels. Parameters are shapes of the official sizes in
bfloat16; no weights are read. The denoising loops are counted as one step, which is how XLA counts a loop whose trips
it does not know.

Writes tpu_scripts/results/aot-DATE.json and .md (for GPUs aot-gpu-DATE) after every program. Needs libtpu or JAX's CUDA
plugin, which it installs into a virtual environment of its own (build/tpu-venv or build/cuda-venv), unless --python
names one that has jax[tpu] or jax[cuda13] and this project's dependencies.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tpu_scripts.aot import aot_gpu  # noqa: E402
from tpu_scripts.aot.aot_cost import CHIPS, GPUS  # noqa: E402

PROGRAMS = ("text", "prior_condition", "prior", "condition", "decoder", "movq")
# With cached features: the program that is run, and what a step costs whose deep blocks are left out.
CACHED = ("decoder_cached", "decoder_kept")
PRIOR_STEPS, STEPS = 25, 50  # of the picture whose time is added up
EXAMPLE = """example:
  python tpu_scripts/aot/aot_compile.py --chips v5e:1 v5e:2x2 --batch 8 --size 512 --programs decoder movq

  python tpu_scripts/aot/aot_compile.py --chips h100:1 --batch 1 16 --programs decoder

A chip is v4, v5e, v5p or v6e, a colon, and a slice: 1 for one chip, 2x2 or 4x4 (v4 and v5p: 2x2x1 or 4x4x4); or h100:1
or h200:1. The decoder takes about five minutes of one core, and 5 GB of memory, for each slice; for a GPU two."""
EFFORT_HELP = "XLA's exec_time_optimization_effort, -1 to 1, default 0; below it compiling takes less time and memory"
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def main(argv: list[str] | None = None) -> None:
    """Compile, print and write."""
    arguments = parse(argv)
    gpu = on_gpus(arguments.chips)
    python = arguments.python or own_python("cuda" if gpu else "tpu")
    target = arguments.output / f"aot-{'gpu-' * gpu}{datetime.date.today().isoformat()}"
    job = {
        name: getattr(arguments, name) for name in ("chips", "batch", "size", "programs", "guided", "int8", "effort")
    }
    found: dict[str, Any] = {"programs": []}
    if arguments.add and target.with_suffix(".json").exists():
        found = json.loads(target.with_suffix(".json").read_text())
    for event in worker(python, job | {"hlo": str(arguments.hlo) if arguments.hlo else None}):
        kind = event.pop("event")
        if kind == "versions":
            found |= event
            continue
        print(progress(kind, event), flush=True)
        if kind != "compiling":
            found["programs"] = [row for row in found["programs"] if key(row) != key(event)] + [event]
            write(target, found, table(found))
    check(found["programs"], target)


def on_gpus(chips: list[str]) -> bool:
    """Whether chips are GPUs; all are, or none is."""
    return chips[0].split(":")[0] in GPUS


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of."""
    return row["chips"], variant(row), row.get("batch"), row.get("size")


def variant(row: dict[str, Any]) -> str:
    """A program's name, and in which way it differs from the guided one at XLA's usual effort."""
    parts = [row["program"]]
    if not row.get("guided", True):
        parts.append("unguided")
    if row.get("int8"):
        parts.append("int8")
    if row.get("effort"):
        parts.append(f"effort {row['effort']:g}")
    return ", ".join(parts)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", default=["v5e:1"], type=chips, metavar="CHIP:SLICE", help="default v5e:1")
    parser.add_argument("--batch", nargs="+", type=positive, default=[8], help="pictures per chip, default 8")
    parser.add_argument("--size", nargs="+", type=positive, default=[512], help="pixels along a side, default 512")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS + CACHED)
    parser.add_argument("--unguided", dest="guided", action="store_false", help="one evaluation a step, not two")
    parser.add_argument("--int8", action="store_true", help="UNet, prior and MoVQ's decoder quantized")
    parser.add_argument("--effort", type=float, default=0.0, help=EFFORT_HELP)
    parser.add_argument(
        "--python", type=Path, help="a Python that has jax[tpu] or jax[cuda13], and this project's dependencies"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "tpu_scripts" / "results", help="folder for the results")
    parser.add_argument("--add", action="store_true", help="add to today's results; otherwise they are replaced")
    parser.add_argument("--hlo", type=Path, help="a folder for the programs' HLO texts")
    arguments = parser.parse_args(argv)
    if arguments.python and not arguments.python.exists():
        parser.error(f"--python {arguments.python} does not exist")
    if len({on_gpus([name]) for name in arguments.chips}) > 1:
        parser.error("--chips has TPUs and GPUs, which are compiled in environments of their own; give one kind a run")
    for folder in filter(None, (arguments.output, arguments.hlo)):
        folder.mkdir(parents=True, exist_ok=True)
    return arguments


def chips(text: str) -> str:
    """A chip and a slice of it, such as "v5e:2x2"; "v5e:1" as "v5e:1x1"."""
    kind, _, layout = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(CHIPS)} with a slice, such as v5e:1 or v5e:2x2"
        )
    if kind in GPUS:
        if layout != "1":
            raise argparse.ArgumentTypeError(f"{text!r}: GPUs are compiled for one at a time, as {kind}:1")
        return text
    sides = 3 if kind in ("v4", "v5p") else 2
    layout = "x".join("1" * sides) if layout == "1" else layout
    if layout.count("x") != sides - 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: a slice of {kind} has {sides} sides, such as {'x'.join('2' * sides)}"
        )
    return f"{kind}:{layout}"


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def own_python(extra: str = "tpu") -> Path:
    """The Python of the script's own environment, made where there is none; complete or absent.

    Args:
        extra: of this project's, `tpu` or `cuda`.
    """
    folder = ROOT / "build" / f"{extra}-venv"
    python = folder / "bin" / "python"
    if python.exists():
        return python
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    jax = [*project["optional-dependencies"][extra], *project["optional-dependencies"]["quantize"]]
    print(f"installing {jax[0]} into {folder}", flush=True)
    try:
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *project["dependencies"], *jax], check=True)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, subprocess.CalledProcessError):
            sys.exit(f"pip could not install {jax[0]}; its words are above. Or name an environment with --python")
        raise
    return python


def worker(python: Path, job: dict[str, Any], module: str = "aot_worker") -> Iterator[dict[str, Any]]:
    """What a worker of this folder tells, event by event; libtpu's many warnings are shown only where it fails."""
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = [str(python), "-m", f"tpu_scripts.aot.{module}", json.dumps(job)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            errors.seek(0)
            last = "".join(errors.readlines()[-15:])
            sys.exit(f"{last}\nthe compiling process ended with {process.returncode}; what was done is kept")


def progress(kind: str, row: dict[str, Any]) -> str:
    """One line about an event."""
    what = " ".join(str(row[name]) for name in ("chips", "program", "batch", "size") if name in row)
    if kind == "compiling":
        return f"{what}: compiling"
    if kind == "failed":
        return f"{what}: {row['error']}"
    return (
        f"{what}: {row['flops'] / 1e9:.0f} GFLOP, {row['bytes'] / 1e9:.2f} GB, {row['seconds'] * 1e3:.1f} ms, "
        f"{sum(row['collectives'].values())} collectives; compiled in {row['compile_seconds']:.0f} s"
    )


def check(rows: list[dict[str, Any]], target: Path) -> None:
    """Exit where a program did not compile."""
    if any("error" in row for row in rows):
        sys.exit(f"not all programs compiled; see {target}.json")


def write(target: Path, found: dict[str, Any], page: str) -> None:
    """The JSON and its table, each complete or as before."""
    for suffix, text in ((".json", json.dumps(found, indent=2) + "\n"), (".md", page)):
        scratch = target.with_suffix(suffix + ".part")
        scratch.write_text(text)
        scratch.replace(target.with_suffix(suffix))


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    resident = found["resident_bytes"]
    lines = [
        f"Guided where nothing is said, bfloat16, batch is pictures per chip; jax {found['jax']}.",
        "`prior` and `decoder` are one step of their loops. The time is what the larger of FLOPs / peak and bytes /",
        "bandwidth allows at the chip's published figures; bytes are XLA's count, which includes on-chip memory (GPUs:",
        "operands and results of every kernel). The estimate is the sum of what libtpu's cost model writes beside the",
        "operations of a step, without Pallas kernels and copies that run beside them.",
        "",
        "| chips | program | batch | size | GFLOP | GB | GB a picture | arguments, GB | outputs, GB | temporaries, GB "
        "| collectives | time, ms | bound by | estimate, ms | compiled in, s |",
        "|---|---|" + "---:|" * 8 + "---|---:|---|---:|---:|",
    ]
    done = [row for row in found["programs"] if "error" not in row]
    for row in done:
        sizes = [row[name] / 1e9 for name in ("arguments", "outputs", "temporaries")]
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items()) or "0"
        lines.append(
            f"| {row['chips']} | {variant(row)} | {row['batch']} | {row['size']} | {row['flops'] / 1e9:.0f} "
            f"| {row['bytes'] / 1e9:.2f} | {row['bytes'] / row['batch'] / 1e9:.2f} "
            f"| {' | '.join(f'{size:.2f}' for size in sizes)} | {kinds} | {row['seconds'] * 1e3:.2f} "
            f"| {row['bound_by']} | {estimate(row)} | {row['compile_seconds']:.0f} |"
        )
    failed = [row for row in found["programs"] if "error" in row]
    lines += [f"| {' | '.join(str(part) for part in key(row))} | {row['error']} |" for row in failed]
    lines.append("")
    if gpus := [row for row in done if "kinds" in row]:
        lines += aot_gpu.table(gpus)
    plain = [row for row in done if variant(row) == row["program"]]
    for group in dict.fromkeys((row["chips"], row["batch"], row["size"]) for row in plain):
        lines += total([row for row in plain if (row["chips"], row["batch"], row["size"]) == group], resident)
    return "\n".join(lines) + "\n"


def estimate(row: dict[str, Any]) -> str:
    """What libtpu expects a run to take, in milliseconds; nothing where it does not say, or the clock is not known."""
    clock = CHIPS[row["chips"].split(":")[0]].clock
    return f"{row['estimated_cycles'] / clock * 1e3:.1f}" if clock and row.get("estimated_cycles") else ""


def total(rows: list[dict[str, Any]], resident: int) -> list[str]:
    """Memory, and time for a whole picture, of one chip's programs at one batch and size."""
    name, batch = rows[0]["chips"], rows[0]["batch"]
    what = f"{name}, {batch} of {rows[0]['size']} x {rows[0]['size']}"
    largest, of = max((row["temporaries"] + row["outputs"], row["program"]) for row in rows)
    memory = CHIPS[name.split(":")[0]].memory
    lines = [
        f"{what}: {resident / 1e9:.2f} GB of weights (text tower, prior, UNet, MoVQ) and at most "
        f"{largest / 1e9:.2f} GB of temporaries and outputs (`{of}`) leave "
        f"{(memory - resident - largest) / 1e9:.2f} of {memory / 1e9:.0f} GB."
    ]
    seconds = {row["program"]: row["seconds"] for row in rows}
    if seconds.keys() >= set(PROGRAMS):
        steps = {"prior": PRIOR_STEPS, "decoder": STEPS}
        whole = sum(seconds[program] * steps.get(program, 1) for program in PROGRAMS)
        lines.append(
            f"{what}: {PRIOR_STEPS} steps of the prior and {STEPS} of the decoder, with all the rest, take at "
            f"least {whole:.2f} s: at most {batch / whole:.3f} pictures a second and chip, "
            f"{batch / whole * rows[0]['devices']:.1f} on all {rows[0]['devices']}."
        )
    return lines


if __name__ == "__main__":
    main()
