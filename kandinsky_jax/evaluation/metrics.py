"""Metrics: what is measured of a set of pictures, and how sure it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from kandinsky_jax.evaluation.bootstrap import Interval, Resampling
from kandinsky_jax.evaluation.distances import (
    BLOCK,
    CMMD_SCALE,
    CMMD_SIGMA,
    KID_SEED,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    Rows,
    biased_mmd,
    clip_scores,
    frechet_distance,
    gaussian_kernel,
    kernel_distance,
    kernel_sums,
    moments_of,
    nearest_candidates,
    polynomial_kernel,
    projected,
    shared_directions,
    unbiased_mmd,
)
from kandinsky_jax.evaluation.extractors import CLIPImages, CLIPTexts, Extractor, FunctionFeatures, Picture
from kandinsky_jax.evaluation.feature_store import FeatureSet

Better = Literal["higher", "lower", ""]
FID_RESAMPLES = 20  # each takes as long as the distance itself


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a metric has found.

    Attributes:
        name: of the metric, or of one of its numbers.
        value: the number.
        interval: how much it depends on the pictures; None where that was not asked for.
        better: which numbers are better, "" for neither.
        details: further facts for the report; values of JSON.
        values: of each picture, `[N]`, where the number is their mean.
    """

    name: str
    value: float
    interval: Interval | None = None
    better: Better = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    values: np.ndarray | None = None

    def with_finite_interval(self) -> Measurement:
        """Return the same without an interval whose ends are not finite, as of a distance of two pictures."""
        if self.interval is None or np.isfinite([self.interval.low, self.interval.high]).all():
            return self
        return dataclasses.replace(self, interval=None)


class Metric(Protocol):
    """A public extension point: anything with these attributes can be measured, see `evaluate`."""

    @property
    def name(self) -> str:
        """For the report."""

    @property
    def extractors(self) -> Sequence[Extractor]:
        """Of the features that it is computed from."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the pictures with a reference set."""

    def measure(
        self, pictures: FeatureSet, reference: FeatureSet | None, resampling: Resampling
    ) -> Sequence[Measurement]:
        """Measure a set.

        Args:
            pictures: at least one, with features of all `extractors`.
            reference: the same of the reference set, where it `needs_reference`.
            resampling: how intervals are made.
        Raises:
            ValueError: where the set cannot be measured, such as one that is too small.
        """


def mean_measurement(
    name: str, values: np.ndarray, resampling: Resampling, better: Better = "", **details: object
) -> Measurement:
    """Return the mean of values `[N]`, one for each picture, with its percentile interval."""
    numbers = np.asarray(values, np.float64)
    means = [counts @ numbers / len(numbers) for counts in resampling.counts(len(numbers))]
    interval = resampling.interval(np.array(means))
    return Measurement(name, float(numbers.mean()), interval, better, dict(details), numbers.astype(np.float32))


# Pictures and prompts ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CLIPScore:
    """How well pictures fit their prompts: the mean of `clip_scores`, from 0 to 100."""

    images: CLIPImages
    texts: CLIPTexts
    name: str = "clip-score"
    needs_reference: bool = False

    @property
    def extractors(self) -> Sequence[Extractor]:
        return self.images, self.texts

    def measure(
        self, pictures: FeatureSet, reference: FeatureSet | None, resampling: Resampling
    ) -> Sequence[Measurement]:
        seen, said = (pictures.features[one.name] for one in self.extractors)
        parts = [
            np.asarray(clip_scores(seen[start : start + BLOCK], said[start : start + BLOCK]))
            for start in range(0, len(seen), BLOCK)
        ]
        return [mean_measurement(self.name, np.concatenate(parts), resampling, "higher")]


@dataclasses.dataclass(frozen=True)
class NearestName:
    """How many pictures are taken for what they should show: CLIP finds their own prompt nearest of all.

    The candidates are the different prompts of the set, and `names`. A share depends on how many there are and how much
    alike, so it is comparable between sets of the same candidates only.

    Args:
        names: further candidates.
    """

    images: CLIPImages
    texts: CLIPTexts
    names: Sequence[str] = ()
    name: str = "nearest-name"
    needs_reference: bool = False

    @property
    def extractors(self) -> Sequence[Extractor]:
        return self.images, self.texts

    def measure(
        self, pictures: FeatureSet, reference: FeatureSet | None, resampling: Resampling
    ) -> Sequence[Measurement]:
        first: dict[str, int] = {}
        for row, prompt in enumerate(pictures.prompts):
            first.setdefault(prompt, row)
        labels = list(first)
        candidates = np.asarray(pictures.features[self.texts.name][np.array(list(first.values()))])
        if further := [name for name in dict.fromkeys(self.names) if name not in first]:
            labels += further
            candidates = np.concatenate([candidates, self.texts.embed(further)])
        if len(labels) < 2:
            raise ValueError("needs at least two different prompts or names to choose from")
        number = {label: i for i, label in enumerate(labels)}
        wanted = np.array([number[prompt] for prompt in pictures.prompts])
        found = nearest_candidates(pictures.features[self.images.name], candidates)
        # Prompts that differ in capitals or spaces alone are one to CLIP.
        right = (found == wanted) | (candidates[found] == candidates[wanted]).all(axis=1)
        return [mean_measurement(self.name, right, resampling, "higher", candidates=len(labels))]


@dataclasses.dataclass(frozen=True)
class NearestCandidate:
    """How many pictures are nearest to the right one of some candidates, by any extractor's features.

    Args:
        name: of the metric.
        extractor: of features `[D]`.
        candidates: features `[C, D]`.
        wanted: returns the number of the right candidate, of a picture's name and prompt.
        distance: of which the least counts.
    """

    name: str
    extractor: Extractor
    candidates: Rows
    wanted: Callable[[str, str], int]
    distance: Literal["cosine", "euclidean"] = "euclidean"
    needs_reference: bool = False

    @property
    def extractors(self) -> Sequence[Extractor]:
        return (self.extractor,)

    def measure(
        self, pictures: FeatureSet, reference: FeatureSet | None, resampling: Resampling
    ) -> Sequence[Measurement]:
        found = nearest_candidates(pictures.features[self.extractor.name], self.candidates, self.distance)
        wanted = [self.wanted(*both) for both in zip(pictures.names, pictures.prompts, strict=True)]
        if odd := [
            one for one in wanted if not (isinstance(one, int | np.integer) and 0 <= one < len(self.candidates))
        ]:
            raise ValueError(
                f"wanted must return 0 to {len(self.candidates) - 1}, the number of a candidate, got {odd[0]!r}"
            )
        right = found == np.array(wanted)
        return [mean_measurement(self.name, right, resampling, "higher", candidates=len(self.candidates))]


class PictureMetric:
    """Means of numbers that a function computes of each picture, such as whether it shows the right shape.

    Args:
        name: of letters, digits and hyphens.
        function: takes a `Picture` and returns a number, or one for each of `columns`. ValueError stands for a picture
            that has none, which is then left out of all metrics.
        columns: names of several numbers, which are reported as NAME/COLUMN.
        better: which numbers are better.
        version: to be changed with the function, see `FunctionFeatures`.
        needs_prompt: whether a picture without a prompt has none.
    """

    needs_reference = False

    def __init__(
        self,
        name: str,
        function: Callable[[Picture], Any],
        columns: Sequence[str] = (),
        *,
        better: Better = "higher",
        version: str = "1",
        needs_prompt: bool = False,
    ):
        self.name, self._columns, self._better = name, list(columns), better
        self._extractor = FunctionFeatures(name, function, version, needs_prompt)

    @property
    def extractors(self) -> Sequence[Extractor]:
        return (self._extractor,)

    def measure(
        self, pictures: FeatureSet, reference: FeatureSet | None, resampling: Resampling
    ) -> Sequence[Measurement]:
        numbers = np.asarray(pictures.features[self.name][:])
        names = [f"{self.name}/{column}" for column in self._columns] or [self.name]
        if numbers.shape[1] != len(names):
            raise ValueError(f"its function returns {numbers.shape[1]} numbers, its columns are {len(names)}")
        return [mean_measurement(name, numbers[:, i], resampling, self._better) for i, name in enumerate(names)]


# Distances from a reference set -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CLIPMaximumMeanDiscrepancy:
    """How far pictures are from the reference in CLIP's space, by CMMD's estimator (arXiv 2401.09603).

    It has another name, because its values are not those of CMMD: they are comparable for the same towers only.
    """

    images: CLIPImages
    name: str = "kandinsky-clip-mmd"
    needs_reference: bool = True

    @property
    def extractors(self) -> Sequence[Extractor]:
        return (self.images,)

    def measure(
        self, pictures: FeatureSet, reference: FeatureSet | None, resampling: Resampling
    ) -> Sequence[Measurement]:
        x, y = (_Normalised(rows) for rows in _both(self.images.name, pictures, reference))
        sums = kernel_sums(gaussian_kernel(CMMD_SIGMA), x, y, _counts(resampling, len(x)))
        values = CMMD_SCALE * biased_mmd(sums, len(x), len(y))
        interval = resampling.interval(values[1:], values[0], least=0.0)
        return [Measurement(self.name, float(values[0]), interval, "lower", {"sigma": CMMD_SIGMA, "scale": CMMD_SCALE})]


class _Normalised:
    """Rows of unit length, float64."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, which: Any) -> np.ndarray:
        rows = np.asarray(self._rows[which], np.float64)
        lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
        return rows / np.where(lengths > 0, lengths, 1)


@dataclasses.dataclass(frozen=True)
class KernelInceptionDistance:
    """KID: the unbiased squared MMD with a polynomial kernel, averaged over subsets. It may be below zero.

    Its interval is that of the unbiased estimate of all pictures, without pairs of a picture with itself.

    Args:
        extractor: of the features, usually `InceptionFeatures`.
        subsets, subset_size, seed: see `kernel_distance`; smaller sets have smaller subsets.
    """

    extractor: Extractor
    name: str = "kid"
    subsets: int = KID_SUBSETS
    subset_size: int = KID_SUBSET_SIZE
    seed: int = KID_SEED
    needs_reference: bool = True

    @property
    def extractors(self) -> Sequence[Extractor]:
        return (self.extractor,)

    def measure(
        self, pictures: FeatureSet, reference: FeatureSet | None, resampling: Resampling
    ) -> Sequence[Measurement]:
        x, y = _both(self.extractor.name, pictures, reference, least=2)
        size = min(self.subset_size, len(x), len(y))
        found = kernel_distance(x, y, subsets=self.subsets, subset_size=size, seed=self.seed)
        details = {"subsets": self.subsets, "subset_size": size, "seed": self.seed, "subsets_std": found.std}
        interval = None
        if resampling.resamples > 1:
            sums = kernel_sums(polynomial_kernel(), x, y, _counts(resampling, len(x)))
            values = unbiased_mmd(sums, len(x), len(y))
            details["all_pictures"] = float(values[0])
            middle = resampling.interval(values[1:], values[0])
            if middle is not None:
                apart = found.mean - float(values[0])  # the interval is about what is reported
                interval = dataclasses.replace(middle, low=middle.low + apart, high=middle.high + apart)
        return [Measurement(self.name, found.mean, interval, "lower", details)]


@dataclasses.dataclass(frozen=True)
class FrechetInceptionDistance:
    """FID: the Fréchet distance of normal distributions with the means and covariances of both sets.

    Args:
        extractor: of the features, usually `InceptionFeatures`.
        resamples: for its interval, at most; each takes as long as the distance itself.
    """

    extractor: Extractor
    name: str = "fid"
    resamples: int = FID_RESAMPLES
    needs_reference: bool = True

    @property
    def extractors(self) -> Sequence[Extractor]:
        return (self.extractor,)

    def measure(
        self, pictures: FeatureSet, reference: FeatureSet | None, resampling: Resampling
    ) -> Sequence[Measurement]:
        key = self.extractor.name
        x: Rows = pictures.features[key]
        if reference is not None and key in reference.moments:
            of_reference = reference.moments[key]
            if len(x) < 2:
                raise ValueError(f"needs at least 2 pictures, there is {len(x)}")
        else:
            x, y = _both(key, pictures, reference, least=2)
            if (directions := shared_directions(x, y)) is not None:
                x, y = projected(x, directions), projected(y, directions)
            of_reference = moments_of(y)
        if len(of_reference.mean) != np.shape(x[:1])[1]:
            raise ValueError(f"the reference has {len(of_reference.mean)} features, the pictures {np.shape(x[:1])[1]}")

        def distance(counts: np.ndarray | None) -> float:
            own = moments_of(x, counts)
            return frechet_distance(own.mean, own.covariance, of_reference.mean, of_reference.covariance)

        value = distance(None)
        repeats = min(self.resamples, resampling.resamples)
        results = [distance(counts) for counts in resampling.counts(len(x), repeats)]
        return [Measurement(self.name, value, resampling.interval(np.array(results), value, least=0.0), "lower")]


def _both(key: str, pictures: FeatureSet, reference: FeatureSet | None, least: int = 1) -> tuple[Rows, Rows]:
    """Return the features of both sets."""
    if reference is None or key not in reference.features:
        known = (
            "means and covariances alone" if reference is not None and key in reference.moments else "no such features"
        )
        raise ValueError(f"needs the reference's {key} features; it has {known}")
    x, y = pictures.features[key], reference.features[key]
    if len(x) < least or len(y) < least:
        raise ValueError(
            f"needs at least {least} pictures of each set, there are {len(x)} and {len(y)} of the reference"
        )
    return x, y


def _counts(resampling: Resampling, pictures: int) -> np.ndarray:
    """Return how often each picture is in each resample, uint8 `[1 + R, pictures]`; in the first one, all are once.

    With one part in 10^300 or less, a picture is in a resample more than 255 times.
    """
    counts = np.ones((1 + resampling.resamples, pictures), np.uint8)
    for i, some in enumerate(resampling.counts(pictures)):
        counts[1 + i] = some
    return counts


def needed_extractors(metrics: Sequence[Metric], of_reference: bool = False) -> list[Extractor]:
    """Return the extractors of some metrics, each name once; those of the reference, or of the pictures.

    Raises:
        ValueError: where two different ones have one name.
    """
    found: dict[str, Extractor] = {}
    for metric in metrics:
        if of_reference and not metric.needs_reference:
            continue
        for one in metric.extractors:
            other = found.setdefault(one.name, one)
            if other is not one and other != one and other.fingerprint() != one.fingerprint():
                raise ValueError(f"two different extractors are called {one.name}")
    return list(found.values())
