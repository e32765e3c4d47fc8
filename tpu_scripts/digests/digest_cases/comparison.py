"""What differs between two records of digests."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
Reasons = Mapping[str, Mapping[str, Any]]


@dataclass
class Comparison:
    """Cases by what became of them.

    Args:
        equal: names.
        different: name -> in what, in a few words.
        missing: cases that only the old record has.
        explained: different or missing cases that a reason is given for -> the reason.
        new: cases that only the new record has.
        environment: what differs in versions, flags or processor, which may explain differences.
    """

    equal: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    explained: dict[str, str] = field(default_factory=dict)
    environment: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether a case differs or is missing."""
        return bool(self.different or self.missing)

    def report(self) -> str:
        """For a terminal."""
        lines = [f"environment: {k} was {old}, now {new}" for k, (old, new) in self.environment.items()]
        lines += [f"explained  {name}: {reason}" for name, reason in self.explained.items()]
        lines += [f"DIFFERENT  {name}: {what}" for name, what in self.different.items()]
        lines += [f"MISSING    {name}" for name in self.missing]
        lines += [f"new        {name}" for name in self.new]
        counts = {"equal": self.equal, "different": self.different, "missing": self.missing, "new": self.new}
        counts |= {"explained": self.explained} if self.explained else {}
        return "\n".join([*lines, ", ".join(f"{len(names)} {kind}" for kind, names in counts.items())])


def compare(old: Record, new: Record, partial: bool = False, reasons: Reasons | None = None) -> Comparison:
    """Compare two records.

    Args:
        old, new: what `digests.py record` wrote.
        partial: whether the new record is of chosen cases only, so that the others are not missing.
        reasons: by pattern of names (as of a shell), why cases differ or are gone: {"reason": text, "within": the
            largest difference of recorded numbers, in standard deviations; absent is any}. The last pattern counts.
    """
    before, after = old["cases"], new["cases"]
    found = Comparison()
    for name, case in before.items():
        if name not in after:
            if not partial:
                found.missing.append(name)
        elif "error" not in case and case["sha256"] == after[name].get("sha256"):
            found.equal.append(name)
        else:
            found.different[name] = difference(case, after[name])
    for name in [*found.different, *found.missing]:
        for pattern, given in (reasons or {}).items():
            if fnmatch.fnmatchcase(name, pattern) and _is_within(before[name], after.get(name), given.get("within")):
                found.explained[name] = given["reason"]
    found.different = {name: what for name, what in found.different.items() if name not in found.explained}
    found.missing = [name for name in found.missing if name not in found.explained]
    found.new = [name for name in after if name not in before]
    keys = old["environment"].keys() | new["environment"].keys()
    pairs = {
        key: (old["environment"].get(key), new["environment"].get(key)) for key in sorted(keys - {"commit", "code"})
    }
    found.environment = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return found


def difference(old: Record, new: Record) -> str:
    """What differs between two results of one case."""
    if "error" in old or "error" in new:
        return f"was {old.get('error', 'a result')}, now {new.get('error', 'a result')}"
    said = []
    before, after = old.get("parts", {}), new.get("parts", {})
    changed = [part for part in before if part in after and before[part] != after[part]]
    if gone := [part for part in before if part not in after]:
        said.append(f"gone: {_few(gone)}")
    if added := [part for part in after if part not in before]:
        said.append(f"added: {_few(added)}")
    if changed:
        said.append(f"changed: {_few(changed)}")
    return "; ".join([*said, _numbers(old.get("numbers"), new.get("numbers"))])


def _numbers(old: list[float | None] | None, new: list[float | None] | None) -> str:
    """How far apart two fingerprints are, in words."""
    if not old or not new:
        return "no numbers to compare"
    if old[0] != new[0]:
        return f"{old[0]:.0f} numbers, now {new[0]:.0f}"
    most, share = _distance(old, new)
    if math.isinf(most):
        return "numbers that are not finite came or went"
    if not most:
        return "the recorded numbers are equal: a difference in few places, in the order, or in text"
    return f"max |difference| of the recorded numbers {most:.3g}, {share:.3g} std"


def _distance(old: list[float | None], new: list[float | None]) -> tuple[float, float]:
    """The largest difference of two fingerprints, and the same in standard deviations of the old numbers."""
    if [x is None for x in old] != [x is None for x in new] or old[0] != new[0]:
        return math.inf, math.inf
    most = max((abs(a - b) for a, b in zip(old, new, strict=True) if a is not None and b is not None), default=0.0)
    return most, most / (old[2] or math.ulp(0)) if most else 0.0


def _is_within(old: Record, new: Record | None, bound: float | None) -> bool:
    """Whether the difference of a case is one that a reason explains; without a bound, any is."""
    if bound is None:
        return new is None or "error" not in new
    if new is None or not old.get("numbers") or not new.get("numbers"):
        return False
    return _distance(old["numbers"], new["numbers"])[1] <= bound


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
