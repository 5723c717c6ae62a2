"""Bootstrap confidence intervals for evaluations: of means, and of functions of means.

Completions of one prompt are not independent: a hard prompt is hard for all of them. So whole prompts are resampled
(the cluster bootstrap: Davison & Hinkley, *Bootstrap Methods and their Application*, 1997, section 3.8) wherever
`groups` says which prompt each completion belongs to. Intervals are percentile intervals (Efron & Tibshirani, *An
Introduction to the Bootstrap*, 1993, chapter 13). The same seed gives the same interval. A single prompt gives none:
the ends are NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Entries of the (resamples, clusters) matrix of counts held at once.
CHUNK_ENTRIES = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate from the data itself, the ends of its confidence interval, and the interval's nominal coverage."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95


def quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by, as in a resample of one prompt only."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def resample_counts(clusters: int, num_resamples: int, seed: int | np.random.Generator) -> np.ndarray:
    """How often each of the clusters is drawn in each resample, `(R, clusters)`."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(clusters, np.full(clusters, 1 / clusters), size=num_resamples).astype(float)


def resampled_means(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Means of bootstrap resamples of the data: rows are drawn with replacement, or whole groups of rows.

    Args:
        values (array of shape `(N,)` or `(N, K)`): `K` quantities of each of `N` completions.
        groups (array of shape `(N,)`, *optional*): equal entries, of any type, are one prompt and drawn together.
        weights (array like `values`, *optional*):
            Not negative. A weight of 0 leaves an entry out of its mean: the mean length of correct completions has the
            lengths as values and correctness as weights.
        num_resamples (`int`, *optional*, defaults to `2000`): number of resamples `R`.
        seed (`int`, *optional*, defaults to `0`): seed of the draws.

    Returns:
        Array of shape `(R,)` or `(R, K)`: NaN where the weights of a resample sum to 0, and everywhere where there is
        one group only: how groups differ is not to be seen in one.
    """
    columns, weight, cluster = _checked(values, groups, weights)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}.")
    clusters = int(cluster.max()) + 1
    sums, totals = np.zeros((2, clusters, columns.shape[1]))
    np.add.at(sums, cluster, columns * weight)
    np.add.at(totals, cluster, weight)
    draws = np.full((num_resamples, columns.shape[1]), np.nan)
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_ENTRIES // clusters)
    for start in range(0, num_resamples if clusters > 1 else 0, rows):
        part = draws[start : start + rows]
        counts = resample_counts(clusters, len(part), generator)
        part[:] = quotient(counts @ sums, counts @ totals)
    return draws[:, 0] if np.ndim(values) == 1 else draws


def statistic_interval(
    values: ArrayLike,
    statistic: Callable[[np.ndarray], ArrayLike],
    groups: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Confidence interval of a function of one or several means, such as the distance of a point to a curve.

    Args:
        values, groups, weights, num_resamples, seed: as in [`resampled_means`].
        statistic (`Callable`):
            Takes means of shape `(R,)` or `(R, K)` and returns the statistic of each, of shape `(R,)`. Called with
            ``R = 1`` for the estimate.
        confidence (`float`, *optional*, defaults to `0.95`): nominal coverage.

    Returns:
        [`Interval`]: NaN at both ends if there is one group only, or some resample has no weight at all. Among 2000
        resamples the latter is to be expected where fewer than about ten groups carry weight: too few for an interval.
    """
    columns, weight, _ = _checked(values, groups, weights)
    means = quotient((columns * weight).sum(axis=0), weight.sum(axis=0))
    estimate = np.asarray(statistic(means if np.ndim(values) == 1 else means[None]), dtype=float)
    draws = np.asarray(statistic(resampled_means(values, groups, weights, num_resamples, seed)), dtype=float)
    if estimate.shape != (1,) or draws.shape != (num_resamples,):
        raise ValueError(
            f"statistic must return one number for each row of means: it returned shapes {estimate.shape} and "
            f"{draws.shape} for 1 and {num_resamples} rows."
        )
    return percentile_interval(float(estimate[0]), draws, confidence)


def mean_interval(
    values: ArrayLike, groups: ArrayLike | None = None, weights: ArrayLike | None = None, **bootstrap: Any
) -> Interval:
    """Confidence interval of the mean of `values` `(N,)`; all arguments are as in [`statistic_interval`]."""
    if np.ndim(values) != 1:
        raise ValueError(f"values must have shape (N,), got {np.shape(values)}; use statistic_interval for several.")
    return statistic_interval(values, lambda means: means, groups, weights, **bootstrap)


def percentile_interval(estimate: float, draws: np.ndarray, confidence: float = 0.95) -> Interval:
    """The interval between the two percentiles of `draws` `(R,)` that leave `confidence` between them."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}.")
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), confidence)


def _checked(
    values: ArrayLike, groups: ArrayLike | None, weights: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values and weights as `(N, K)` float arrays and the cluster of each row as `(N,)` integers."""
    columns = np.asarray(values, dtype=float)
    if columns.ndim not in (1, 2) or columns.shape[0] == 0:
        raise ValueError(f"values must have shape (N,) or (N, K) with N of at least 1, got {columns.shape}.")
    weight = np.ones_like(columns) if weights is None else np.asarray(weights, dtype=float)
    if weight.shape != columns.shape:
        raise ValueError(f"weights must have the shape of values, {columns.shape}, got {weight.shape}.")
    if not np.isfinite(columns).all() or not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError("values and weights must be finite, and weights not negative.")
    cluster = np.arange(columns.shape[0])
    if groups is not None:
        names = np.asarray(groups)
        if names.shape != (columns.shape[0],):
            raise ValueError(f"groups must have shape ({columns.shape[0]},), got {names.shape}.")
        cluster = np.unique(names, return_inverse=True)[1]
    return columns.reshape(columns.shape[0], -1), weight.reshape(columns.shape[0], -1), cluster
