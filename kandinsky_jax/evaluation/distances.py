"""Scores and distances as pure functions of features.

`clip_scores` is a JAX function that can be differentiated. The distances between two sets are computed on the host in
float64: they are small differences of large sums. Their arguments may be arrays, memory-mapped ones too, or anything
with a length and slices, and are read block by block, so they need not fit into memory.

Sources: CLIP score, Hessel et al. 2021 (arXiv 2104.08718); FID, Heusel et al. 2017 (arXiv 1706.08500); KID, Binkowski
et al. 2018 (arXiv 1801.01401); MMD with a Gaussian kernel of width 10, Jayasumana et al. 2024 (arXiv 2401.09603); the
estimators of MMD, Gretton et al. 2012, equations 3 and 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 1024  # rows that are read at once: a block of a kernel has 8 MB
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # arXiv 2401.09603, section 5
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's


class Rows(Protocol):
    """Features `[N, D]`: an array, or what reads its rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """Return the rows of a slice, or of an array of indices."""


Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # [A, D] and [B, D] -> [A, B], all float64


def blocks(features: Rows, size: int = BLOCK) -> Iterator[np.ndarray]:
    """Yield the rows of features in order, float64 `[at most size, D]`."""
    for start in range(0, len(features), size):
        yield np.asarray(features[start : start + size], np.float64)


# Pictures and their prompts ---------------------------------------------------------------------------------------


def clip_scores(image_embeds: jax.Array | np.ndarray, text_embeds: jax.Array | np.ndarray) -> jax.Array:
    """Compute the CLIP score of each picture, `max(100 cos(image, text), 0)`.

    The cosine is that of CLIP's projected embeddings, which need not be normalised. torchmetrics' `CLIPScore` is the
    mean of these but for pictures whose cosine is below zero: it cuts off the mean, not each picture's score. The
    paper multiplies by 2.5 instead of 100.

    Args:
        image_embeds, text_embeds: float `[B, D]`.
    Returns:
        float32 `[B]`, from 0 to 100. Differentiable; the gradient at a score of 0 is zero.
    """
    image_embeds, text_embeds = jnp.asarray(image_embeds, jnp.float32), jnp.asarray(text_embeds, jnp.float32)
    return jnp.maximum(100 * jnp.sum(unit_length(image_embeds) * unit_length(text_embeds), axis=-1), 0)


def unit_length(embeds: jax.Array | np.ndarray) -> jax.Array:
    """Normalise embeddings `[..., D]`; one of zeros stays zero, with a finite gradient."""
    squares = jnp.sum(jnp.square(embeds), axis=-1, keepdims=True)
    return jnp.where(squares > 0, embeds * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)


def nearest_candidates(
    features: Rows, candidates: Rows, distance: Literal["cosine", "euclidean"] = "cosine", block: int = BLOCK
) -> np.ndarray:
    """Find the candidate that is nearest to each row; of equally near ones, the first.

    Args:
        features: float `[N, D]`.
        candidates: float `[C, D]`.
        distance: of which the least counts.
    Returns:
        indices of candidates, int64 `[N]`.
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f"distance must be 'cosine' or 'euclidean', got {distance!r}")
    found = []
    for rows in blocks(features, block):
        best, which = np.full(len(rows), -np.inf), np.zeros(len(rows), np.int64)
        for start, some in zip(range(0, len(candidates), block), blocks(candidates, block), strict=True):
            lengths = np.linalg.norm(some, axis=1)
            if distance == "cosine":
                nearness = rows @ (some / np.where(lengths > 0, lengths, 1)[:, None]).T
            else:
                nearness = 2 * rows @ some.T - lengths**2  # the rows' own lengths change no order
            nearer = nearness.max(axis=1) > best
            best = np.where(nearer, nearness.max(axis=1), best)
            which = np.where(nearer, start + nearness.argmax(axis=1), which)
        found.append(which)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


# Maximum mean discrepancy -----------------------------------------------------------------------------------------


def gaussian_kernel(sigma: float = CMMD_SIGMA) -> Kernel:
    """Return the kernel `exp(-|x - y|^2 / (2 sigma^2))`."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
        return np.exp(-squares / (2 * sigma**2))

    return kernel


def polynomial_kernel(degree: int = 3, gamma: float | None = None, coef0: float = 1.0) -> Kernel:
    """Return the kernel `(gamma x.y + coef0)^degree`; gamma None is 1 / D."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return ((x @ y.T) * (1 / x.shape[1] if gamma is None else gamma) + coef0) ** degree

    return kernel


class KernelSums(NamedTuple):
    """Sums of a kernel over pairs, for each of `[R]` resamples of the first set.

    Attributes:
        xx: over all pairs of the first set, `[R]`, and x_itself: of each picture with itself.
        xy: over all pairs of a row of the first set and one of the second, `[R]`.
        yy, y_itself: of the second set.
        x_squares: the sum of squared counts, `[R]`.
    """

    xx: np.ndarray
    x_itself: np.ndarray
    xy: np.ndarray
    yy: float
    y_itself: float
    x_squares: np.ndarray


def kernel_sums(kernel: Kernel, x: Rows, y: Rows, counts: np.ndarray | None = None, block: int = BLOCK) -> KernelSums:
    """Sum a kernel over all pairs, block by block.

    Args:
        x, y: features `[N, D]` and `[M, D]`.
        counts: how often each row of `x` is in each resample, `[R, N]`; None is once, in one.
    """
    counts = np.ones((1, len(x)), np.uint8) if counts is None else counts
    xx, x_itself, xy, x_squares = (np.zeros(len(counts)) for _ in range(4))
    yy = y_itself = 0.0
    for i, rows in _numbered(x, block):
        weights = counts[:, i : i + block].astype(np.float64)
        for j, others in _numbered(x, block, i):
            both = kernel(rows, others)
            of_others = counts[:, j : j + block].astype(np.float64)
            xx += (1 if i == j else 2) * ((weights @ both) * of_others).sum(1)
            if i == j:
                x_itself += weights**2 @ np.diagonal(both)
        xy += weights @ np.sum([kernel(rows, others).sum(1) for others in blocks(y, block)], axis=0)
        x_squares += (weights**2).sum(1)
    for i, rows in _numbered(y, block):
        for j, others in _numbered(y, block, i):
            both = kernel(rows, others)
            yy += (1 if i == j else 2) * both.sum()
            y_itself += np.trace(both) if i == j else 0.0
    return KernelSums(xx, x_itself, xy, yy, y_itself, x_squares)


def _numbered(features: Rows, block: int, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks of rows from row `first` on, each with the number of its first row."""
    for start in range(first, len(features), block):
        yield start, np.asarray(features[start : start + block], np.float64)


def biased_mmd(sums: KernelSums, n: int, m: int) -> np.ndarray:
    """Return the squared MMD of each resample, with the pairs of a row with itself: never below zero."""
    return sums.xx / n**2 + sums.yy / m**2 - 2 * sums.xy / (n * m)


def unbiased_mmd(sums: KernelSums, n: int, m: int) -> np.ndarray:
    """Return the squared MMD of each resample, without the pairs of a picture with itself; at least two of each."""
    within = (sums.xx - sums.x_itself) / (n**2 - sums.x_squares)
    return within + (sums.yy - sums.y_itself) / (m * (m - 1)) - 2 * sums.xy / (n * m)


def maximum_mean_discrepancy(
    x: Rows, y: Rows, *, sigma: float = CMMD_SIGMA, scale: float = CMMD_SCALE, block: int = BLOCK
) -> float:
    """Compute the squared maximum mean discrepancy with a Gaussian kernel, by the biased estimator of CMMD.

    Args:
        x, y: features `[N, D]` and `[M, D]`; CMMD's are normalised embeddings of CLIP ViT-L/14 at 336 pixels, and
            values of another network's features are not comparable with its.
        sigma: width of the kernel.
        scale: what the result is multiplied by.
        block: rows that are read at once.
    Returns:
        at least 0, but for rounding.
    """
    return scale * float(biased_mmd(kernel_sums(gaussian_kernel(sigma), x, y, block=block), len(x), len(y))[0])


class KernelDistance(NamedTuple):
    """Kernel distance: the mean over subsets, and their standard deviation."""

    mean: float
    std: float


def kernel_distance(
    x: Rows,
    y: Rows,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = KID_SEED,
    kernel: Kernel | None = None,
) -> KernelDistance:
    """Compute the kernel distance: the unbiased squared MMD with a polynomial kernel, averaged over random subsets.

    The subsets are those of torch-fidelity for the same seed.

    Args:
        x, y: features `[N, D]` and `[M, D]`; KID's are an Inception network's.
        subsets: how many.
        subset_size: rows of each set in each of them, at most N and M.
        seed: of their choice.
        kernel: None is `polynomial_kernel()`.
    Raises:
        ValueError: where a set has fewer rows than `subset_size`, or that is less than 2.
    """
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"a kernel distance of subsets of {subset_size} needs as many of each set, at least 2; there are {len(x)} "
            f"and {len(y)}"
        )
    chosen = np.random.RandomState(seed)  # torch-fidelity's generator
    found = []
    for _ in range(subsets):
        of_x, of_y = (chosen.choice(len(rows), subset_size, replace=False) for rows in (x, y))
        sums = kernel_sums(kernel or polynomial_kernel(), np.asarray(x[of_x]), np.asarray(y[of_y]))
        found.append(unbiased_mmd(sums, subset_size, subset_size)[0])
    return KernelDistance(float(np.mean(found)), float(np.std(found)))


# Fréchet distance -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and spread of features, from which those of more features follow.

    Attributes:
        count: of rows.
        mean: `[D]`, float64.
        scatter: `[D, D]`, the sum of the outer products of what rows differ from the mean by.
    """

    count: float
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, `[D, D]`."""
        return self.scatter / (self.count - 1)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows (Chan et al. 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), scatter)


def moments_of(features: Rows, counts: np.ndarray | None = None, block: int = BLOCK) -> Moments:
    """Compute the moments of features `[N, D]`, N at least 1, block by block.

    Args:
        counts: how often each row counts, `[N]`; None is once.
    """
    total: Moments | None = None
    for start, rows in _numbered(features, block):
        weights = np.ones(len(rows)) if counts is None else counts[start : start + block].astype(np.float64)
        if (count := weights.sum()) == 0:
            continue
        mean = weights @ rows / count
        centred = rows - mean
        part = Moments(count, mean, (centred * weights[:, None]).T @ centred)
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError("moments need at least one row of features")
    return total


def frechet_distance(
    mean_x: np.ndarray, covariance_x: np.ndarray, mean_y: np.ndarray, covariance_y: np.ndarray
) -> float:
    """Compute the squared Fréchet distance of two normal distributions.

    `|mx - my|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2))`. The last trace is the sum of the singular values of
    `Sx^(1/2) Sy^(1/2)`, which is stable where the covariances are singular.

    Args:
        mean_x, mean_y: `[D]`.
        covariance_x, covariance_y: `[D, D]`, symmetric, no eigenvalue below zero but for rounding.
    Returns:
        at least 0, but for rounding.
    Raises:
        ValueError: for numbers that are not finite.
    """
    parts = [np.asarray(part, np.float64) for part in (mean_x, covariance_x, mean_y, covariance_y)]
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("the means and covariances of a Fréchet distance must be finite numbers")
    mean_x, covariance_x, mean_y, covariance_y = parts
    shared = np.linalg.svd(_square_root(covariance_x) @ _square_root(covariance_y), compute_uv=False).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(covariance_x) + np.trace(covariance_y) - 2 * shared)


def _square_root(covariance: np.ndarray) -> np.ndarray:
    """Return the symmetric square root; eigenvalues that are zero but for rounding are zero."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    values = np.where(values > values.max() * len(values) * np.finfo(np.float64).eps, values, 0)
    return (vectors * np.sqrt(values)) @ vectors.T


def shared_directions(*sets: Rows) -> np.ndarray | None:
    """Return orthonormal directions that span some sets of few rows, `[D, fewer than D]`; None where there are many.

    Distances between the sets are the same along these directions alone, and take less time to compute.
    """
    rows = sum(map(len, sets))
    if not rows or rows >= np.shape(sets[0][:1])[1]:
        return None
    basis: np.ndarray = np.linalg.qr(np.concatenate([np.asarray(some[:], np.float64) for some in sets]).T)[0]
    return basis


def projected(features: Rows, directions: np.ndarray) -> np.ndarray:
    """Return features of few rows along some directions, float64."""
    return np.asarray(features[:], np.float64) @ directions
