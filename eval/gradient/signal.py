"""Signal and noise of gradients: what independent batches say about the expected gradient, from inner products alone.

Let ``g_1 … g_B`` be the gradients of an estimator in B independent batches, ``mu`` their expectation.

- Signal ``|mu|^2``: split the batches into halves at random and take the product of the two means. Noise that is in one
  half is not in the other, so nothing has to be subtracted; the mean over *all* splits is
  ``S(g, g) = sum_{i != j} g_i . g_j / (B (B - 1))``, which is computed here.
- Noise ``tr Cov(g)``: ``sum_i |g_i - mean|^2 / (B - 1) = sum_{i != j} |g_i - g_j|^2 / (2 B (B - 1))``.
- Signal-to-noise ratio ``SNR = S(g, g) / tr Cov(g)``: both unbiased. It is the ratio for one batch, and proportional to
  the number of completions in it: at 1, the mean gradient is as long as its noise.
- Cosine of two estimators' expected gradients, ``S(g, h) / sqrt(S(g, g) S(h, h))``: what is left when noise is taken
  out, so it may lie beyond 1 by chance, and is not defined where a signal is lost in the noise.

Intervals are bootstraps over batches. A resample holds some batches several times; a batch with itself makes no two
halves, so such pairs are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eval.statistics import Interval, percentile_interval, quotient, resample_counts

# Entries of gradients held at once while their inner products are taken.
CHUNK_ENTRIES = 2**25


def inner_products(gradients: np.ndarray) -> np.ndarray:
    """Inner products of all gradients.

    Args:
        gradients (`numpy.ndarray` of shape `(E, B, D)`): of E estimators in B batches; may be mapped from a file.

    Returns:
        `numpy.ndarray` of shape `(E, E, B, B)`, float64: entry `[e, f, i, j]` is of estimator `e` in batch `i` with
        estimator `f` in batch `j`.
    """
    count, batches, size = gradients.shape
    total = np.zeros((count * batches, count * batches))
    step = max(1, CHUNK_ENTRIES // (count * batches))
    for start in range(0, size, step):
        part = np.ascontiguousarray(gradients[:, :, start : start + step]).reshape(count * batches, -1)
        total += part @ part.T
    return total.reshape(count, batches, count, batches).transpose(0, 2, 1, 3)


@dataclass(frozen=True)
class GradientStatistics:
    """Signal, noise and cosines with intervals, of several estimators in the same batches.

    Args:
        products (`numpy.ndarray` of shape `(E, E, B, B)`): see [`inner_products`].
        seed (`int`, *optional*, defaults to `0`): seed of the resamples, the same for every statistic.
        num_resamples (`int`, *optional*, defaults to `2000`): R.
    """

    products: np.ndarray
    seed: int = 0
    num_resamples: int = 2000

    def __post_init__(self) -> None:
        if self.products.ndim != 4 or self.products.shape[-1] < 2:
            raise ValueError(
                f"Noise is what differs between batches, so there must be two; products are {self.products.shape}."
            )

    def snr(self, index: int) -> Interval:
        """Signal-to-noise ratio of one estimator."""
        return self._interval(lambda counts: self._snr(index, counts))

    def signal_and_noise(self, index: int) -> tuple[float, float]:
        """``S(g, g)`` and ``tr Cov(g)`` of one estimator; the former may be negative where there is no signal."""
        return float(self._signal(index, index, self._once)[0]), float(self._noise(index, self._once)[0])

    def cosine(self, first: int, second: int) -> Interval:
        """Cosine of two estimators' expected gradients; NaN at both ends if some resample has a signal below 0."""
        return self._interval(lambda counts: self._cosine(first, second, counts))

    def cosines(self) -> np.ndarray:
        """Cosines of all pairs of estimators, `(E, E)`, NaN where there is none."""
        every = range(len(self.products))
        return np.array([[self._cosine(first, second, self._once)[0] for second in every] for first in every])

    def snr_ratio(self, index: int, others: list[int]) -> Interval:
        """An estimator's SNR over the best of several others', the best being chosen anew in every resample."""
        # Those that have none are no rivals.
        return self._interval(
            lambda counts: quotient(
                self._snr(index, counts), np.fmax.reduce([self._snr(other, counts) for other in others])
            )
        )

    @property
    def _once(self) -> np.ndarray:
        """How often each batch counts in the estimate, `(1, B)`."""
        return np.ones((1, self.products.shape[-1]))

    def _interval(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """From how often each batch counts, `(R, B)`: once each for the estimate, then in the resamples."""
        resamples = resample_counts(self.products.shape[-1], self.num_resamples, self.seed)
        return percentile_interval(float(statistic(self._once)[0]), statistic(resamples))

    def _signal(self, first: int, second: int, counts: np.ndarray) -> np.ndarray:
        products = self.products[first, second]
        same = counts**2 @ np.diagonal(products)
        return quotient(((counts @ products) * counts).sum(axis=1) - same, _pairs(counts))

    def _noise(self, index: int, counts: np.ndarray) -> np.ndarray:
        products = self.products[index, index]
        squares = counts.sum(axis=1) * (counts @ np.diagonal(products))
        return quotient(squares - ((counts @ products) * counts).sum(axis=1), _pairs(counts))

    def _snr(self, index: int, counts: np.ndarray) -> np.ndarray:
        return quotient(self._signal(index, index, counts), self._noise(index, counts))

    def _cosine(self, first: int, second: int, counts: np.ndarray) -> np.ndarray:
        signals = [self._signal(index, index, counts) for index in (first, second)]
        lengths = np.sqrt(np.maximum(signals[0], 0.0) * np.maximum(signals[1], 0.0))
        return quotient(self._signal(first, second, counts), lengths)


def _pairs(counts: np.ndarray) -> np.ndarray:
    """Number of ordered pairs of different batches in each resample, `(R,)`."""
    return counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
