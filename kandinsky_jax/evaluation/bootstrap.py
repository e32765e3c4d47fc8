"""Bootstrap intervals: how much a result depends on which pictures happened to be evaluated.

Efron 1979. Pictures are drawn with replacement, as many as there are, and the result of each such resample is computed;
an interval has the middle of these results. Of a distance, which duplicates of pictures make larger, the interval is
moved by the mean of the results minus the result itself, the bootstrap's estimate of its bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

LEVEL, RESAMPLES, SEED = 0.95, 1000, 0


@dataclasses.dataclass(frozen=True)
class Interval:
    """A bootstrap interval.

    Attributes:
        low, high: its ends.
        level: the share of results within it.
        resamples: how many results it was made from.
        bias: what it was moved by, downwards; 0 where it was not.
    """

    low: float
    high: float
    level: float
    resamples: int
    bias: float = 0.0


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Args:
        level: the share of results within an interval, above 0 and below 1.
        resamples: how many results; 0 makes no intervals.
        seed: of the choice of pictures.
    """

    level: float = LEVEL
    resamples: int = RESAMPLES
    seed: int = SEED

    def faults(self) -> list[str]:
        """List faults of the settings."""
        found = []
        if isinstance(self.level, bool) or not isinstance(self.level, int | float) or not 0 < self.level < 1:
            found.append(f"level must be a number above 0 and below 1, got {self.level!r}")
        for name, value in (("resamples", self.resamples), ("seed", self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                found.append(f"{name} must be a whole number from 0 to 2**31 - 1, got {value!r}")
        return found

    def counts(self, pictures: int, resamples: int | None = None) -> Iterator[np.ndarray]:
        """Yield how often each picture is in each resample, `[pictures]`, int64."""
        rng = np.random.default_rng(self.seed)
        for _ in range(self.resamples if resamples is None else resamples):
            yield np.bincount(rng.integers(pictures, size=pictures), minlength=pictures)

    def interval(self, results: np.ndarray, value: float | None = None, least: float = -np.inf) -> Interval | None:
        """Return the interval of the resamples' results `[R]`; None for fewer than two.

        Args:
            value: the result of all pictures, about which the interval is moved; None leaves it where it is.
            least: the least that a result can be.
        """
        if len(results) < 2:
            return None
        bias = 0.0 if value is None else float(np.mean(results)) - float(value)
        low, high = np.quantile(results, [(1 - self.level) / 2, (1 + self.level) / 2]) - bias
        return Interval(max(float(low), least), max(float(high), least), self.level, len(results), bias)


def bootstrap_interval(
    values: np.ndarray, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """Compute the percentile interval of the mean of values, one for each picture.

    Args:
        values: `[N]`, N at least 1.
        level, resamples, seed: see `Resampling`.
    Returns:
        None for fewer than two resamples.
    Raises:
        ValueError: for no values, or settings that are not valid.
    """
    resampling = Resampling(level, resamples, seed)
    numbers = np.asarray(values, np.float64)
    if faults := resampling.faults() + ([] if numbers.ndim == 1 and len(numbers) else ["values must be [N], N >= 1"]):
        raise ValueError("; ".join(faults))
    means = [counts @ numbers / len(numbers) for counts in resampling.counts(len(numbers))]
    return resampling.interval(np.array(means))
