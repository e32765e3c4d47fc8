"""The result of an evaluation: as JSON, and as a table in Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kandinsky_jax.common.errors import counted, shorten
from kandinsky_jax.evaluation.metrics import Measurement

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """What was found about a set of pictures.

    Attributes:
        pictures: how many were evaluated.
        reference_pictures: of the reference set; 0 without one, or where that is not known.
        failed: pictures that could not be evaluated; errors.jsonl has the reasons.
        reference_failed: the same of the reference set.
        measurements: in the order of the metrics.
        faults: reasons why metrics could not be measured, by their names.
        source, reference: what the sets are; None for no reference.
        settings: what the numbers depend on besides.
    """

    pictures: int
    reference_pictures: int
    failed: int
    reference_failed: int
    measurements: Sequence[Measurement]
    faults: Mapping[str, str]
    source: Mapping[str, object]
    reference: Mapping[str, object] | None
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> Measurement:
        """Return the measurement of this name."""
        return next(found for found in self.measurements if found.name == name)

    def as_json(self) -> dict[str, object]:
        """Return all of it as values of JSON."""
        metrics = {}
        for found in self.measurements:
            interval = None if found.interval is None else dataclasses.asdict(found.interval)
            metrics[found.name] = {
                "value": found.value,
                "interval": interval,
                "better": found.better or None,
                **found.details,
            }
        return {
            "format_version": FORMAT_VERSION,
            "pictures": self.pictures,
            "reference_pictures": self.reference_pictures,
            "failed": self.failed,
            "reference_failed": self.reference_failed,
            "metrics": metrics,
            "faults": dict(self.faults),
            "source": dict(self.source),
            "reference": None if self.reference is None else dict(self.reference),
            "settings": dict(self.settings),
        }

    def table(self) -> str:
        """Return the measurements as a table in Markdown, with a line on the sets above it."""
        reference = ""
        if self.reference is not None:
            many = counted(self.reference_pictures, "picture") if self.reference_pictures else "moments alone"
            failed = _failed(self.reference_failed)
            reference = f"; reference {shorten(self.reference['path'], 120)} ({many}{failed})"
        failed = _left_out(self.source) + _failed(self.failed)
        head = f"{shorten(self.source['path'], 120)}: {counted(self.pictures, 'picture')}{failed}{reference}"
        rows = [["metric", "value", "interval", "resamples", "better"]]
        for found in self.measurements:
            low_high, repeats = "", ""
            if found.interval is not None:
                share = f"{100 * found.interval.level:g} %"
                low_high = f"{_number(found.interval.low)} to {_number(found.interval.high)} ({share})"
                repeats = str(found.interval.resamples)
            rows.append([found.name, _number(found.value), low_high, repeats, found.better])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        lines = lines if self.measurements else []
        notes = [f"{name} could not be measured: {fault}" for name, fault in self.faults.items()]
        return "\n".join([head, *([""] if lines else []), *lines, *([""] if notes else []), *notes])


def _left_out(source: Mapping[str, object]) -> str:
    """Say what of the source has not come to an evaluation."""
    if rows := source.get("rows_failed"):
        return f"; {rows:,} rows of the job had failed"
    return f"; {skipped:,} left out" if (skipped := source.get("skipped")) else ""


def _failed(count: int) -> str:
    return f"; {count:,} failed, see errors.jsonl" if count else ""


def _number(value: float) -> str:
    """Return a number with four digits that count."""
    if value and math.isfinite(value) and abs(value) < 1000:
        return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 1e-4 else f"{value:.3e}"
    return f"{value:,.1f}" if value else "0"
