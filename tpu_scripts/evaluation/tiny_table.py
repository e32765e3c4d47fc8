"""What `evaluate` says of the embedded model: 100 names, with and without guidance, in few steps, and fast.

    python tpu_scripts/evaluation/tiny_table.py build/evaluation

generates the names of the first 100 emoji of train_tiny/common.txt in several settings, as batch jobs, and evaluates
each with the model's own CLIP: its score, the share that is nearest to its own name of the 100, and kandinsky-clip-mmd
with the guided pictures of other seeds as the reference. Writes tpu_scripts/results/evaluation-DATE.json and .md, and
docs/evaluation.png with the intervals. Jobs and features are kept in the folder, so a run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kandinsky_jax.batch import Job  # noqa: E402
from kandinsky_jax.common.atomic import replace_file  # noqa: E402
from kandinsky_jax.evaluation import Evaluation, evaluate  # noqa: E402

COUNT, SEED, REFERENCE_SEED = 100, 0, 10_000
METRICS = ("clip-score", "nearest-name", "kandinsky-clip-mmd")
GUIDED: dict[str, Any] = {"steps": 25, "prior_steps": 25, "guidance_scale": 2.0, "prior_guidance_scale": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "25 steps, guidance 4": {"defaults": GUIDED | {"guidance_scale": 4.0}},
    "25 steps, guidance 2": {"defaults": GUIDED},
    "25 steps, no guidance": {"defaults": GUIDED | {"guidance_scale": 1.0}},
    "4 steps, guidance 2": {"defaults": GUIDED | {"steps": 4}},
    "fast adapter, 4 steps": {"fast": True},
}


def names(count: int) -> list[str]:
    """The Unicode names of the commonest emoji of a single character."""
    lines = (ROOT / "tpu_scripts" / "train_tiny" / "common.txt").read_text().splitlines()
    codes = [line.strip() for line in lines if line.strip() and not line.startswith("#") and "-" not in line]
    found = dict.fromkeys(unicodedata.name(chr(int(code, 16)), "").lower() for code in codes)
    return [name for name in found if name][:count]


def job(folder: Path, what: str, seed: int, **settings: Any) -> Job:
    """A batch job of all names, in a folder named by its settings."""
    name = "".join(c if c.isalnum() else "-" for c in what)
    options = {"rows_per_shard": 20} | settings
    return Job(str(folder / "names.txt"), str(folder / "jobs" / name), model="tiny", seed=seed, batch=20, **options)


def row(what: str, found: Evaluation) -> dict[str, Any]:
    """What is kept of an evaluation."""
    return {"settings": what, "pictures": found.pictures, **found.as_json()["metrics"]}  # type: ignore[dict-item]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, each number with its interval."""
    lines = ["| settings | " + " | ".join(METRICS) + " |", "|---|" + "---|" * len(METRICS)]
    for one in rows:
        cells = []
        for name in METRICS:
            number, ends = one[name]["value"], one[name]["interval"]
            digits = 1 if name == "clip-score" else 2
            cells.append(f"{number:.{digits}f} ({ends['low']:.{digits}f} to {ends['high']:.{digits}f})")
        lines.append(f"| {one['settings']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Draw each metric's numbers with their intervals."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METRICS), figsize=(9, 2.6), sharey=True)
    places = np.arange(len(rows))[::-1]
    for axis, name in zip(axes, METRICS, strict=True):
        values = np.array([one[name]["value"] for one in rows])
        ends = np.array([[one[name]["interval"]["low"], one[name]["interval"]["high"]] for one in rows])
        axis.errorbar(values, places, xerr=np.abs(ends.T - values), fmt="o", color="#336699", capsize=3)
        axis.set_title(f"{name} ({'higher' if name != METRICS[2] else 'lower'} is better)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_yticks(places, [one["settings"] for one in rows])
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    """Generate, evaluate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for jobs and features")
    parser.add_argument("--output", type=Path, default=ROOT, help="the folder of tpu_scripts/results and docs")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in names(COUNT)))
    saved = folder / "reference.safetensors"
    evaluate(job(folder, "reference", REFERENCE_SEED, defaults=GUIDED), folder / "reference", save=saved, clip="tiny")
    rows = []
    for what, settings in SETTINGS.items():
        generated = job(folder, what, SEED, **settings)
        output = folder / "evaluations" / Path(generated.output).name
        rows.append(row(what, evaluate(generated, output, metrics=METRICS, clip="tiny", reference=saved)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    found = {"date": datetime.date.today().isoformat(), "cpus": os.cpu_count(), "names": COUNT, "rows": rows}
    results = arguments.output / "tpu_scripts" / "results"
    results.mkdir(parents=True, exist_ok=True)
    replace_file(results / f"evaluation-{found['date']}.json", (json.dumps(found, indent=1) + "\n").encode())
    replace_file(results / f"evaluation-{found['date']}.md", table(rows).encode())
    (arguments.output / "docs").mkdir(exist_ok=True)
    plot(rows, arguments.output / "docs" / "evaluation.png")


if __name__ == "__main__":
    main()
