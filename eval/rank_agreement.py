"""Whether predictions put completions in the right order: Kendall's tau-b and pairwise accuracy, bootstrapped.

Both are sums over pairs of completions. Resampled prompt by prompt, a pair counts as often as its two prompts were
drawn together, so every resample is a quadratic form in the numbers of draws: pairs are compared once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.statistics import Interval, percentile_interval, quotient
from lenvm_rl.pretraining.metrics import kendall_tau

# Pairs of completions compared at once.
CHUNK_PAIRS = 4_000_000


def pair_counts(predicted: Tensor, realised: Tensor, group: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How pairs of completions are ordered, summed over the pairs of each two prompts.

    Args:
        predicted, realised (`torch.Tensor` of shape `(N,)`): two measurements of each completion.
        group (`torch.Tensor` of shape `(N,)`, int64): index of its prompt, in 0 … P - 1.

    Returns:
        three arrays `(P, P)`: concordant minus discordant pairs, pairs that differ in `realised`, and in `predicted`;
        each pair is counted in both directions.
    """
    prompts = int(group.max()) + 1
    totals = torch.zeros(3, prompts, prompts)
    for rows in torch.arange(len(group)).split(max(1, CHUNK_PAIRS // len(group))):
        signs = [torch.sign(each[rows].unsqueeze(1) - each).float() for each in (predicted, realised)]
        for total, pairs in zip(totals, (signs[0] * signs[1], signs[1].abs(), signs[0].abs()), strict=True):
            total.index_add_(0, group[rows], torch.zeros(len(rows), prompts).index_add_(1, group, pairs))
    return tuple(total.double().numpy() for total in totals)


def pairwise_accuracy(predicted: Tensor, realised: Tensor, group: Tensor) -> float:
    """Share of pairs of two prompts' completions, unequal in length, whose order is predicted; a tie counts half.

    Args as in [`pair_counts`]. NaN if there is no such pair.
    """
    return float(_accuracy(pair_counts(predicted, realised, group), np.ones((1, int(group.max()) + 1)))[0])


def _accuracy(counts: tuple[np.ndarray, ...], weights: np.ndarray) -> np.ndarray:
    signed, unequal = (_quadratic(total, weights) - weights**2 @ np.diag(total) for total in counts[:2])
    return (1 + quotient(signed, unequal)) / 2


def _tau(counts: tuple[np.ndarray, ...], weights: np.ndarray) -> np.ndarray:
    signed, first, second = (_quadratic(total, weights) for total in counts)
    return quotient(signed, np.sqrt(first * second))


def _quadratic(total: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``w' A w`` for each row w of `weights` `(R, P)`: the count in a resample that holds each prompt w times."""
    return ((weights @ total) * weights).sum(axis=1)


def rank_intervals(
    predicted: Tensor, realised: Tensor, group: Tensor, num_resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """`kendall_tau` and `pairwise_accuracy` with intervals over prompts; arguments as in [`pair_counts`].

    A single prompt has no interval: NaN at both ends.
    """
    counts, prompts = pair_counts(predicted, realised, group), int(group.max()) + 1
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(prompts, np.full(prompts, 1 / prompts), size=num_resamples).astype(float)
    estimates = (kendall_tau(predicted, realised), float(_accuracy(counts, np.ones((1, prompts)))[0]))
    draws = (_tau(counts, weights), _accuracy(counts, weights))
    if prompts == 1:
        draws = tuple(np.full(num_resamples, np.nan) for _ in draws)
    names = ("kendall_tau", "pairwise_accuracy")
    return {
        name: percentile_interval(estimate, drawn)
        for name, estimate, drawn in zip(names, estimates, draws, strict=True)
    }
