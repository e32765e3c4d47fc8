"""SHA-256 of small results of everything, to show that a refactoring changes none of them.

    record FILE          run the cases, and write their digests with a few numbers of each
    record FILE --against OLD
                         the same, and compare
    compare OLD NEW      list cases that are equal, different, missing and new; exit status 1 for the second and third
    begun FOLDER         start a batch job and training runs, and interrupt each
    resume FOLDER        go on with them: the results are those of runs that nothing interrupted, or each is refused in
                         one sentence
    paired OLD           time calls of this checkout and of an older one in turns

Cases use the public names, the command lines and files, and run on CPU devices, with one thread each. Digests are equal
only for one processor, and one version of JAX: the record names both. The cases are in `digest_cases/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from digest_cases import GROUPS, cases_of
from digest_cases.comparison import compare
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
EXAMPLE = """example, on the commit before and then on the one after:
  python tpu_scripts/digests/digests.py record before.json
  python tpu_scripts/digests/digests.py begun begun
  python tpu_scripts/digests/digests.py record after.json --against before.json
  python tpu_scripts/digests/digests.py resume begun
  python tpu_scripts/digests/digests.py paired ../checkout-of-before

A file of reasons is {"text2img/*": {"reason": "guidance is one product", "within": 1e-6}}: such cases do not fail while
their recorded numbers differ by at most so many standard deviations (by any, where "within" is absent).
A commit that has no such script is recorded with --checkout FOLDER. On two cores shared with other work, `record` took
20 minutes and `record --quick` 4, with programs that JAX_COMPILATION_CACHE_DIR held. `paired` needs a quiet machine:
equal code gave a ratio of 1.06 on a busy one."""
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint", "safetensors", "pillow", "transformers")
CODE = ("kandinsky_jax", "convert_weights")  # what results come from
# Programs that compile quickly; and one thread, because sums are split by the number of threads.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PROCESSOR = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")  # flags that change XLA's machine code


def environment(checkout: Path, devices: int = 1) -> dict[str, str]:
    """The variables of a process that runs cases."""
    given = dict(os.environ)
    given["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, checkout)))
    given["PYTHONSAFEPATH"] = "1"  # else `python -m` prefers the code in the working directory
    given["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {XLA_FLAGS}"
    given |= {"JAX_PLATFORMS": "cpu", "NPROC": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    given["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    given["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    return given


def described(checkout: Path) -> dict[str, Any]:
    """What digests depend on besides the code."""
    found: dict[str, Any] = {"python": platform.python_version(), "XLA_FLAGS": XLA_FLAGS}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    lines = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    given = {name.strip(): value.strip() for name, value in lines.items()}
    found["processor"] = given.get("model name", platform.processor())
    found["processor's flags"] = [flag for flag in PROCESSOR if flag in given.get("flags", "").split()]
    found["commit"] = _git(checkout, "rev-parse", "--short=10", "HEAD")
    trees = [_git(checkout, "rev-parse", "--short=10", f"HEAD:{package}") for package in CODE]
    found["code"] = " ".join([*trees, "and changes"] if _git(checkout, "status", "--porcelain", *CODE) else trees)
    return found


def _git(checkout: Path, *arguments: str) -> str:
    """What git prints; nothing where the checkout is none of git's."""
    return subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True).stdout.strip()


def record(options: argparse.Namespace) -> int:
    """Run the cases; the exit status."""
    groups = {name: devices for name, devices in GROUPS.items() if not options.group or name in options.group}
    about, before = described(options.checkout), {}
    if options.add and options.file.exists():
        known = json.loads(options.file.read_text())
        if known["environment"] | {"commit": about["commit"]} != about:
            print(f"{options.file} is of other code or another environment; leave --add out", file=sys.stderr)
            return 1
        before = known["cases"]
    names = [case.name for group in groups for case in cases_of(group, options.quick) if options.only in case.name]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="digests-") as scratch, tqdm(total=len(names), unit="case") as bar:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/compiled")
        for group, devices in groups.items():
            bar.set_description(group)
            for name, case in _results(group, devices, options):
                found[name] = case
                bar.update()
                _write(options.file, about, before | found)
                if "error" in case:
                    tqdm.write(f"FAILED     {name}: {case['error']}", file=sys.stderr)
    missing = [name for name in names if name not in found]
    _write(options.file, about, before | found)
    failed = sum("error" in case for case in found.values()) + len(missing)
    print(f"{len(found)} cases, {failed} failed: {options.file}")
    if missing:
        print(f"a process ended early; not run: {', '.join(missing[:5])}")
    if options.against is None:
        return int(failed > 0)
    partial = bool(options.quick or options.only or options.group)
    return max(int(failed > 0), compared(options.against, options.file, options.reasons, partial))


def _write(file: Path, about: dict[str, Any], cases: dict[str, Any]) -> None:
    """A line for each case."""
    lines = [f"{json.dumps(name)}:{json.dumps(case, separators=(',', ':'))}" for name, case in cases.items()]
    file.write_text(f'{{"environment":{json.dumps(about)},\n"cases":{{\n' + ",\n".join(lines) + "\n}}\n")


def _results(group: str, devices: int, options: argparse.Namespace) -> Any:
    """(name, record) of a group's cases, as a process of its own finishes them."""
    command = [sys.executable, "-m", "digest_cases.worker", group, str(options.checkout), "--only", options.only]
    command += ["--quick"] if options.quick else []
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, env=environment(options.checkout, devices), stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
        if process.wait():
            log.seek(0)
            tqdm.write(f"{group} ended with {process.returncode}: {log.read()[-2000:]}", file=sys.stderr)
        elif options.verbose:
            log.seek(0)
            tqdm.write(log.read(), file=sys.stderr)


def compared(old: Path, new: Path, reasons: Path | None = None, partial: bool = False) -> int:
    """Print a comparison of two files; the exit status."""
    known = json.loads(reasons.read_text()) if reasons else {}
    found = compare(json.loads(old.read_text()), json.loads(new.read_text()), partial, known)
    print(found.report())
    return int(found.failed)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=raw)
    parser.add_argument("--checkout", type=Path, default=HERE.parents[1], help="whose code runs; default: this one's")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record", help="run the cases and write their digests")
    one.add_argument("file", type=Path)
    one.add_argument("--against", type=Path, help="compare with an older file")
    one.add_argument("--quick", action="store_true", help="a quarter of the cases")
    one.add_argument("--only", default="", help="cases whose names contain this text")
    one.add_argument("--group", action="append", choices=GROUPS, help="cases of this module; may be given repeatedly")
    one.add_argument("--add", action="store_true", help="keep the cases of the same code that FILE has already")
    one.add_argument("--verbose", action="store_true", help="also print what the cases print")
    two = commands.add_parser("compare", help="compare two files")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    for part in (one, two):
        part.add_argument("--reasons", type=Path, help="JSON: why cases differ, see below")
    for name, says in (("begun", "start and interrupt jobs and runs"), ("resume", "go on with them, and compare")):
        part = commands.add_parser(name, help=says)
        part.add_argument("folder", type=Path)
        part.add_argument("--only", default="", help="those whose names contain this text")
    three = commands.add_parser("paired", help="time calls of two checkouts in turns")
    three.add_argument("old", type=Path)
    three.add_argument("--rounds", type=int, default=9, help="pairs of each call, at least 7")
    three.add_argument("--limit", type=float, default=1.03, help="the largest ratio that passes")
    three.add_argument("--only", default="", help="calls whose names contain this text")
    three.add_argument("--cpu", action="store_true", help="judge processor time, for a machine with other work")
    return parser


def main() -> int:
    """Run one command; the exit status."""
    options = arguments().parse_args()
    options.checkout = options.checkout.resolve()
    if options.command == "record":
        return record(options)
    if options.command == "compare":
        return compared(options.old, options.new, options.reasons)
    if options.command == "paired":
        from digest_cases import pairs

        return pairs.main(options, environment)
    from digest_cases import interrupted

    run = interrupted.begun if options.command == "begun" else interrupted.resume
    return run(options.folder.resolve(), environment(options.checkout), options.only)


if __name__ == "__main__":
    sys.exit(main())
