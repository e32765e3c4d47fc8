"""The dated record of a campaign: tpu_scripts/results/campaign-DATE.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kandinsky_jax.common.atomic import replace_file

RESULTS = Path(__file__).parents[1] / "tpu_scripts" / "results"
VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "diffusers", "torch", "pyarrow")


def record(
    stats: Mapping[str, Sequence[Any]],
    figures: Mapping[tuple[str, str], Sequence[float]],
    seconds: float,
    folder: Path = RESULTS,
) -> Path | None:
    """Add a run's tests and figures to today's file, in which a later run of a part replaces that part.

    Args:
        stats: pytest's reports by outcome.
        figures: measured, by test and what they are.
        seconds: that the whole run took.
        folder: where the file is.
    Returns:
        the file; None where no test was run, and nothing is written.
    """
    today = datetime.date.today().isoformat()
    path = folder / f"campaign-{today}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    tests = {
        report.nodeid: {"outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 1)}
        for outcome in ("passed", "skipped", "failed", "error")  # a worse outcome of a test replaces a better one
        for report in stats.get(outcome, ())
        if outcome != "passed" or report.when == "call"
    }
    if not tests:
        return None
    measured = {
        f"{test}: {what}": {"worst": _short(max(values)), "median": _short(np.median(values)), "of": len(values)}
        for (test, what), values in figures.items()
    }
    result = {
        "date": today,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "seconds of the last run": round(seconds),
        "tests": dict(sorted({**before.get("tests", {}), **tests}.items())),
        "measured": dict(sorted({**before.get("measured", {}), **measured}.items())),
    }
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    return path


def _short(value: float) -> float | None:
    """Three digits; None, which JSON has, for what is not finite."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
