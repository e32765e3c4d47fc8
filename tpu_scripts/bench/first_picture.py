"""Time to the first picture: a fresh virtual environment, `pip install`, the first picture, the next one.

`python tpu_scripts/bench/first_picture.py` runs the README's first command as it is printed there, part by part, and
writes the seconds to `tpu_scripts/results/first-picture-DATE.json`. A picture is generated cold, with nothing compiled,
and warm, in a second process that finds the first one's programs in the compilation cache. `--here` leaves out the
installation and measures the environment that runs the script.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def readme_commands() -> list[str]:
    """The README's set-up commands, each `install && use`."""
    return re.findall(r"^(pip install -e .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


def seconds(command: str, environment: dict[str, str]) -> float:
    """Run a shell command in the repository; its wall-clock time."""
    began = time.perf_counter()
    subprocess.run(command, shell=True, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - began, 1)


def pictures(generate: str, environment: dict[str, str], turns: int = 3) -> dict[str, list[float]]:
    """Cold and warm seconds of a command, in turns, each turn with a cache of its own."""
    found: dict[str, list[float]] = {"off": [], "cold": [], "warm": []}
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as cache:
            for kind, where in {"off": "off", "cold": cache, "warm": cache}.items():
                command = f"{generate} --compilation-cache {where}"
                found[kind].append(seconds(command, environment))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--here", action="store_true", help="no new environment, nothing installed")
    here = parser.parse_args().here
    install, generate = readme_commands()[0].split(" && ")
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as folder:
        generate = re.sub(r"--output \S+", f"--output {folder}/picture.png", generate)
        if here:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            generate = generate.replace("kandinsky-jax", f"{sys.executable} -m kandinsky_jax.cli", 1)
        else:
            found["venv_s"] = seconds(f"{sys.executable} -m venv {folder}/venv", dict(os.environ))
            environment = os.environ | {"PATH": f"{folder}/venv/bin:{os.environ['PATH']}"}
            found["install_s"] = seconds(install, environment)
        found["generate_s"] = pictures(generate, environment)
    target = ROOT / "tpu_scripts" / "results" / f"first-picture-{found['date']}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
