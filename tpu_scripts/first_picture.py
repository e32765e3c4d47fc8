"""How long a newcomer waits: a fresh virtual environment, `pip install`, the first picture, the next one.

`python tpu_scripts/first_picture.py` runs the README's first command as it is printed there, part by part, and writes
the seconds to `tpu_scripts/results/first-picture-DATE.json`.
"""

from __future__ import annotations

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

ROOT = Path(__file__).parents[1]


def readme_commands() -> list[str]:
    """The README's set-up commands, each `install && use`."""
    return re.findall(r"^(pip install -e .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


def seconds(command: str, environment: dict[str, str]) -> float:
    """Run a shell command in the repository; its wall-clock time."""
    began = time.perf_counter()
    subprocess.run(command, shell=True, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - began, 1)


def main() -> None:
    """Measure, print and write."""
    install, generate = readme_commands()[0].split(" && ")
    with tempfile.TemporaryDirectory() as folder:
        create = seconds(f"{sys.executable} -m venv {folder}/venv", dict(os.environ))
        environment = os.environ | {"PATH": f"{folder}/venv/bin:{os.environ['PATH']}"}
        generate = re.sub(r"--output \S+", f"--output {folder}/picture.png", generate)
        found = {
            "date": datetime.date.today().isoformat(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "venv_s": create,
            "install_s": seconds(install, environment),
            "generate_s": [seconds(generate, environment) for _ in range(3)],
        }
    target = ROOT / "tpu_scripts" / "results" / f"first-picture-{found['date']}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
