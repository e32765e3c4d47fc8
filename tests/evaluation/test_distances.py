"""Scores, distances and intervals, equal to their formulas in float64 and to the reference's code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch

from kandinsky_jax.evaluation import (
    Resampling,
    bootstrap_interval,
    clip_scores,
    frechet_distance,
    kernel_distance,
    maximum_mean_discrepancy,
    moments_of,
    nearest_candidates,
)
from kandinsky_jax.evaluation.distances import kernel_sums, polynomial_kernel, shared_directions, unbiased_mmd
from tests.conftest import note
from tests.evaluation import fidelity

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(150, 24)) @ RNG.normal(size=(24, 24)) / 5).astype(np.float32)
Y = (0.2 + RNG.normal(size=(170, 24)) @ RNG.normal(size=(24, 24)) / 5).astype(np.float32)


def apart(ours: float, reference: float) -> float:
    """Return the relative difference, for the report."""
    return note(abs(ours - reference) / abs(reference), "relative difference")


def of_unit_length(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)


def test_clip_scores_are_cosines_cut_off_at_zero():
    expected = np.maximum(100 * (of_unit_length(X[:99]) * of_unit_length(Y[:99])).sum(1), 0)
    found = np.asarray(clip_scores(X[:99], Y[:99]))
    assert 20 < (expected == 0).sum() < 80
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_clip_score_is_right_and_finite_at_zero():
    def score(image):
        return clip_scores(image, Y[:3]).sum()

    image = jnp.asarray(Y[:3] + 0.5 * X[:3])
    towards = jnp.asarray(X[3:6])
    slope = (score(image + 1e-2 * towards) - score(image - 1e-2 * towards)) / 2e-2
    np.testing.assert_allclose((jax.grad(score)(image) * towards).sum(), slope, rtol=1e-3)
    assert np.isfinite(jax.grad(score)(jnp.zeros_like(image))).all()


@pytest.mark.parametrize("block", [7, 64, 1024])
def test_mmd_is_its_formula(block):
    """CMMD's: the mean kernel of all pairs, also of a picture with itself."""
    x, y = of_unit_length(X), of_unit_length(Y)

    def mean_kernel(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 10**2)).mean()

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert expected > 0.1
    assert apart(maximum_mean_discrepancy(x, y, block=block), expected) < 1e-6
    assert abs(maximum_mean_discrepancy(x, x, block=block)) < 1e-9


def test_a_kernel_distance_is_its_formula():
    x, y = X.astype(np.float64), Y.astype(np.float64)

    def kernel(a, b):
        return (a @ b.T / 24 + 1) ** 3

    chosen = np.random.RandomState(5)
    expected = []
    for _ in range(4):
        a, b = x[chosen.choice(150, 60, replace=False)], y[chosen.choice(170, 60, replace=False)]
        within = sum((kernel(z, z).sum() - np.trace(kernel(z, z))) / (60 * 59) for z in (a, b))
        expected.append(within - 2 * kernel(a, b).mean())
    found = kernel_distance(X, Y, subsets=4, subset_size=60, seed=5)
    assert apart(found.mean, np.mean(expected)) < 1e-6
    assert apart(found.std, np.std(expected)) < 1e-6


@pytest.mark.fidelity
def test_a_kernel_distance_is_the_references():
    """The same subsets for the same seed, by default 100 of them."""
    reference = fidelity.module("metric_kid").kid_features_to_metric(
        torch.from_numpy(X.astype(np.float64)),
        torch.from_numpy(Y.astype(np.float64)),
        kid_subset_size=40,
        verbose=False,
    )
    found = kernel_distance(X, Y, subset_size=40)
    assert apart(found.mean, reference["kernel_inception_distance_mean"]) < 1e-6
    assert apart(found.std, reference["kernel_inception_distance_std"]) < 1e-6


def test_a_kernel_distance_needs_enough_pictures():
    with pytest.raises(ValueError, match=r"needs as many of each set.* 150 and 170"):
        kernel_distance(X, Y, subset_size=151)


def test_sums_of_resamples_are_those_of_repeated_rows():
    """Without pairs of a picture with itself, also where it is there twice."""
    counts = np.zeros((2, 150), np.uint8)
    counts[0], counts[1, :75] = 1, 2
    sums = kernel_sums(polynomial_kernel(), X, Y, counts, block=32)
    twice = np.repeat(X[:75], 2, axis=0).astype(np.float64)
    same = np.repeat(np.arange(75), 2)
    pairs = (twice @ twice.T / 24 + 1) ** 3 * (same[:, None] != same[None])
    both = ((twice @ Y.T.astype(np.float64)) / 24 + 1) ** 3
    of_y = (Y.astype(np.float64) @ Y.T.astype(np.float64) / 24 + 1) ** 3
    within_y = (of_y.sum() - np.trace(of_y)) / (170 * 169)
    expected = pairs.sum() / (same[:, None] != same[None]).sum() + within_y - 2 * both.mean()
    assert apart(unbiased_mmd(sums, 150, 170)[1], expected) < 1e-9


def formula(x: np.ndarray, y: np.ndarray) -> float:
    """The Fréchet distance with SciPy's square root of a matrix."""
    (mx, sx), (my, sy) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x.astype(np.float64), y.astype(np.float64)))
    root = scipy.linalg.sqrtm(sx @ sy)
    return float(((mx - my) ** 2).sum() + np.trace(sx + sy - 2 * np.real(root)))


def ours(x: np.ndarray, y: np.ndarray, block: int = 1024) -> float:
    a, b = moments_of(x, block=block), moments_of(y, block=block)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@pytest.mark.parametrize("block", [16, 1024])
def test_a_frechet_distance_is_its_formula(block):
    assert apart(ours(X, Y, block), formula(X, Y)) < 1e-6


@pytest.mark.fidelity
def test_a_frechet_distance_is_the_references():
    """Also of close sets, and of sets of different spread along each axis."""
    metric = fidelity.module("metric_fid")
    widths = np.geomspace(1e-3, 1, 24).astype(np.float32)
    for x, y in ((X, Y), (X[:70], X[70:]), (X * widths, Y * widths)):
        stats = [metric.fid_features_to_statistics(torch.from_numpy(z.astype(np.float64))) for z in (x, y)]
        reference = metric.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
        assert apart(ours(x, y), reference) < 1e-6


def test_a_frechet_distance_of_fewer_pictures_than_features():
    """Singular covariances: the trace is the sum of the singular values of the product of the centred features."""
    wide = np.random.default_rng(1).normal(size=(40, 300)).astype(np.float32)
    x, y = wide[:15], 0.3 + wide[15:]
    a, b = (z.astype(np.float64) - z.mean(0, dtype=np.float64) for z in (x, y))
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum() / np.sqrt(14 * 24)
    means = ((x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)) ** 2).sum()
    expected = means + (a**2).sum() / 14 + (b**2).sum() / 24 - 2 * shared
    assert apart(ours(x, y), expected) < 1e-6
    directions = shared_directions(x, y)
    assert directions.shape == (300, 40)
    assert apart(ours(x @ directions, y @ directions), expected) < 1e-6


def test_moments_of_resamples_are_those_of_repeated_rows():
    counts = np.random.default_rng(2).integers(0, 3, 150)
    repeated = np.repeat(X, counts, axis=0).astype(np.float64)
    found = moments_of(X, counts, block=13)
    assert found.count == len(repeated)
    np.testing.assert_allclose(found.mean, repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(repeated, rowvar=False), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_the_nearest_candidate(distance):
    x, y = X.astype(np.float64), Y.astype(np.float64)
    if distance == "cosine":
        expected = (of_unit_length(x) @ of_unit_length(y).T).argmax(1)
    else:
        expected = ((x[:, None] - y[None]) ** 2).sum(-1).argmin(1)
    found = nearest_candidates(X, Y, distance, block=32)
    assert np.array_equal(found, expected)
    assert np.array_equal(nearest_candidates(X, X, distance, block=32), np.arange(150))


def test_an_interval_of_a_mean_is_that_of_its_resamples():
    values = X[:, 0].astype(np.float64)
    found = bootstrap_interval(values, level=0.9, resamples=500, seed=3)
    rng = np.random.default_rng(3)
    means = [values[rng.integers(150, size=150)].mean() for _ in range(500)]
    np.testing.assert_allclose([found.low, found.high], np.percentile(means, [5, 95]), rtol=1e-9)
    assert (found.level, found.resamples, found.bias) == (0.9, 500, 0)
    width = 2 * 1.645 * values.std() / np.sqrt(150)
    assert found.high - found.low == pytest.approx(width, rel=0.15)


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(4)
    held = 0
    for seed in range(200):
        found = bootstrap_interval(rng.exponential(size=60), resamples=200, seed=seed)
        held += found.low <= 1 <= found.high
    assert 0.88 * 200 <= held <= 0.99 * 200


def test_an_interval_is_moved_by_its_bias():
    found = Resampling().interval(np.array([3.0, 4.0, 5.0]), value=3.5)
    assert (found.low, found.high, found.bias) == (pytest.approx(2.55), pytest.approx(4.45), 0.5)
    assert Resampling().interval(np.array([1.0]), 1.0) is None


def test_settings_of_intervals_are_checked():
    with pytest.raises(ValueError, match=r"level must be .*; resamples must be .*; values must be"):
        bootstrap_interval(np.zeros((0,)), level=1.0, resamples=-1)
