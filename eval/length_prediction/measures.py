"""What a length value model says along completions, boiled down to metrics with 95 % bootstrap intervals over prompts.

Metrics are as in value pretraining (`lenvm_rl.pretraining.metrics`, `lenvm_rl.pretraining.references`); added
are the slope of the calibration, errors against halves of a prompt's completions, and whether completions are put in
the right order (Kendall's tau-b and pairwise accuracy). Tokens count the end-of-sequence token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eval.statistics import Interval, mean_interval, percentile_interval, quotient, statistic_interval
from lenvm_rl.modeling.completions import state_logits
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.metrics import POINTS, kendall_tau, point_index, sequence_statistics, summarize
from lenvm_rl.pretraining.references import half_returns, mean_by_group, reference_metrics, relative_errors
from lenvm_rl.returns import discounted_return, remaining_from_logits, remaining_from_value

# Measured at each point of the way.
ALONG = ("length_mae", "length_mre", "length_bias", "explained_variance", "calibration_slope", "kendall_tau")
ALONG += ("pairwise_accuracy",)
# Pairs of completions compared at once.
CHUNK_PAIRS = 4_000_000


@dataclass(frozen=True)
class CompletionStatistics:
    """What a model said along completions, a row for each.

    Args:
        statistics (`torch.Tensor` of shape `(N, 11)`): as [`~lenvm_rl.pretraining.metrics.sequence_statistics`] has
            them.
        lengths, finished, groups, prompt_tokens (`torch.Tensor` of shape `(N,)`): tokens, whether it ended, its prompt,
            and the prompt's tokens.
        gamma (`float`): discount of the length return.
    """

    statistics: Tensor
    lengths: Tensor
    finished: Tensor
    groups: Tensor
    prompt_tokens: Tensor
    gamma: float

    def select(self, rows: Tensor) -> CompletionStatistics:
        """Some of the rows, by mask or index."""
        columns = (self.statistics, self.lengths, self.finished, self.groups, self.prompt_tokens)
        return CompletionStatistics(*(column[rows] for column in columns), self.gamma)

    def at(self, percent: int) -> tuple[Tensor, Tensor]:
        """Logits and true remaining tokens at a point of the way, float64."""
        remaining = self.lengths - point_index(self.lengths, percent)
        return self.statistics[:, POINTS.index(percent)].double(), remaining.double()

    @property
    def prompt_index(self) -> Tensor:
        """Each completion's prompt, numbered 0 … P - 1: `(N,)`."""
        return torch.unique(self.groups, return_inverse=True)[1]

    @property
    def predicted(self) -> Tensor:
        """The length predicted at each prompt, `(P,)` float64."""
        return mean_by_group(remaining_from_logits(self.at(0)[0], self.gamma), self.prompt_index)

    @property
    def whole(self) -> Tensor:
        """The prompts none of whose completions was cut, `(P,)` bool."""
        return mean_by_group(self.finished, self.prompt_index) == 1.0


def read_statistics(model: LengthValueModel, rollouts: Dataset, forward_tokens: int = 16384) -> CompletionStatistics:
    """Runs a model in eval mode along every completion."""
    prompts, completions = rollouts["prompt_ids"][:], rollouts["completion_ids"][:]
    prompt_tokens, lengths = (torch.tensor([len(row) for row in rows]) for rows in (prompts, completions))
    finished = torch.tensor([reason == "stop" for reason in rollouts["finish_reason"][:]])
    statistics = torch.zeros(len(lengths), len(POINTS) + 7)
    ends, gamma = finished.tolist(), model.config.gamma
    for batch, states in state_logits(model, prompts, completions, finished=ends, max_tokens=forward_tokens):
        # The state after a cut, where there is one, is past the length and so not read.
        logits = pad_sequence(states, batch_first=True)
        statistics[batch] = sequence_statistics(logits, lengths[batch], finished[batch], gamma).float()
    groups = torch.tensor(rollouts["group"][:])
    return CompletionStatistics(statistics, lengths, finished, groups, prompt_tokens, gamma)


def moment_intervals(
    values: Tensor, returns: Tensor, squares: Tensor, groups: Tensor, weights: Tensor | None = None, **bootstrap: int
) -> dict[str, Interval]:
    """Explained variance and calibration slope (of G regressed on V), with intervals over prompts.

    Args:
        values, returns (`torch.Tensor` of shape `(N,)`): V and G, or their means over the states of a completion.
        squares (`torch.Tensor` of shape `(N, 3)`): means of V², G² and V·G.
        groups (`torch.Tensor` of shape `(N,)`): the prompts.
        weights (`torch.Tensor` of shape `(N,)`, *optional*): states of each completion; 1 when omitted.
    """
    table = torch.cat([torch.stack([values, returns], dim=1), squares], dim=1).double().numpy()
    weights = torch.ones(len(table)) if weights is None else weights
    weights = np.repeat(weights.double().numpy()[:, None], table.shape[1], axis=1)

    def variances(m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return m[:, 2] - m[:, 0] ** 2, m[:, 3] - m[:, 1] ** 2, m[:, 4] - m[:, 0] * m[:, 1]

    def explained(m: np.ndarray) -> np.ndarray:
        value, target, joint = variances(m)
        return 1 - quotient(value + target - 2 * joint, target)

    def slope(m: np.ndarray) -> np.ndarray:
        value, _, joint = variances(m)
        return quotient(joint, value)

    statistics: dict[str, Callable] = {"explained_variance": explained, "calibration_slope": slope}
    return {name: statistic_interval(table, each, groups, weights, **bootstrap) for name, each in statistics.items()}


def point_intervals(data: CompletionStatistics, percent: int, **bootstrap: int) -> dict[str, Interval]:
    """The metrics of [`ALONG`], each with ``_at_<percent>`` after its name; all completions must have ended."""
    logits, remaining = data.at(percent)
    group, predicted = data.prompt_index, remaining_from_logits(logits, data.gamma)
    # A prompt has one prediction; what tells its completions apart is rounding, which would pass for an order.
    ranked = data.predicted[group] if percent == 0 else predicted
    values, returns = -torch.sigmoid(logits), discounted_return(remaining, data.gamma)
    squares = torch.stack([values.square(), returns.square(), values * returns], dim=1)
    found = {
        "length_mae": mean_interval((predicted - remaining).abs().numpy(), group, **bootstrap),
        "length_mre": mean_interval(relative_errors(predicted, remaining).numpy(), group, **bootstrap),
        "length_bias": mean_interval((predicted - remaining).numpy(), group, **bootstrap),
        **moment_intervals(values, returns, squares, group, **bootstrap),
        **rank_intervals(ranked, remaining, group, **bootstrap),
    }
    return {f"{name}_at_{percent}": interval for name, interval in found.items()}


def median_intervals(data: CompletionStatistics, **bootstrap: int) -> dict[str, Interval]:
    """What the (lower) median of a prompt's own completions, all of which must have ended, would reach as a prediction.

    No prediction made at the prompt has a smaller mean absolute error; that each completion is among those that its
    median is of flatters it further where samples are few.
    """
    lengths, group = data.lengths.double(), data.prompt_index
    by_prompt = lengths[torch.argsort(group, stable=True)].split(torch.bincount(group).tolist())
    medians = torch.stack([part.median() for part in by_prompt])[group]
    found = {
        "length_mae": mean_interval((medians - lengths).abs().numpy(), group, **bootstrap),
        "length_mre": mean_interval(relative_errors(medians, lengths).numpy(), group, **bootstrap),
        **rank_intervals(medians, lengths, group, **bootstrap),
    }
    return {f"reference_median_{name}": interval for name, interval in found.items()}


def boundary_lengths(data: CompletionStatistics) -> tuple[Tensor, Tensor]:
    """Predicted and return-consistent lengths of the prompts that have no cut completion, both `(P,)`."""
    returns = mean_by_group(discounted_return(data.lengths.double(), data.gamma), data.prompt_index)
    return data.predicted[data.whole], remaining_from_value(returns, data.gamma)[data.whole]


def half_intervals(data: CompletionStatistics, **bootstrap: int) -> dict[str, Interval]:
    """Errors against halves of a prompt's completions: the model's, the other half's, and the ratio of the two.

    A model that knows every prompt's expected return exactly has about 0.7 times the error between halves, since only
    one of its two sides is noisy. Prompts with a cut completion, or with a single one, are left out.
    """
    group = data.prompt_index
    halved = data.whole & (torch.bincount(group) >= 2)
    if not bool(halved.any()):
        return {}
    halves = remaining_from_value(half_returns(data.lengths, group, data.gamma)[:, :, halved], data.gamma)
    errors = relative_errors(data.predicted[halved], halves), relative_errors(halves, halves.flip(1))
    table = torch.stack([each.mean(dim=(0, 1)) for each in errors], dim=1).numpy()
    statistics: dict[str, Callable] = {
        "half_mre": lambda means: means[:, 0],
        "reference_half_mre": lambda means: means[:, 1],
        "half_ratio": lambda means: quotient(means[:, 0], means[:, 1]),
    }
    return {name: statistic_interval(table, each, **bootstrap) for name, each in statistics.items()}


def length_metrics(data: CompletionStatistics, num_resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """Every metric, with an interval where one is bootstrapped and NaN for its ends elsewhere.

    Returns:
        `dict[str, Interval]`: see [`~lenvm_rl.pretraining.length_value_metrics`] (without `loss`, which depends on
        what cut completions are taken for), [`~lenvm_rl.pretraining.references.reference_metrics`],
        [`median_intervals`], [`half_intervals`], and [`ALONG`] at each point. Where no completion ended: `completions`
        and `truncated_share` alone.
    """
    ended, bootstrap = data.select(data.finished.bool()), {"num_resamples": num_resamples, "seed": seed}
    metrics = {"completions": float(len(data.lengths)), "truncated_share": 1 - len(ended.lengths) / len(data.lengths)}
    if len(ended.lengths):
        common = (data.finished, data.groups, data.gamma)
        metrics |= summarize(data.statistics, data.lengths, *common)
        metrics |= reference_metrics(data.lengths, data.prompt_tokens, *common)
        del metrics["loss"]
    found = {name: Interval(value, math.nan, math.nan) for name, value in metrics.items()}
    if not len(ended.lengths):
        return found
    for percent in POINTS:
        found |= point_intervals(ended, percent, **bootstrap)
    found |= median_intervals(ended, **bootstrap)
    value, target, *spreads = ended.statistics.double()[:, len(POINTS) : len(POINTS) + 5].unbind(1)
    centers = (value.square(), target.square(), value * target)
    squares = torch.stack([spread + center for spread, center in zip(spreads, centers, strict=True)], dim=1)
    found |= moment_intervals(value, target, squares, ended.groups, ended.lengths, **bootstrap)
    predicted, consistent = boundary_lengths(data)
    if len(predicted):
        found["consistent_mae"] = mean_interval((predicted - consistent).abs().numpy(), **bootstrap)
        found["consistent_mre"] = mean_interval(relative_errors(predicted, consistent).numpy(), **bootstrap)
    return found | half_intervals(data, **bootstrap) | {"kendall_tau": found["kendall_tau_at_0"]}


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


def rank_intervals(
    predicted: Tensor, realised: Tensor, group: Tensor, num_resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """Kendall's tau-b and pairwise accuracy, with intervals over prompts; arguments as in [`pair_counts`].

    The accuracy is the share of pairs of two prompts' completions, unequal in length, whose order is predicted; a tie
    counts half. Both are sums over pairs, and a pair counts as often as its two prompts were drawn together: every
    resample is a quadratic form in the numbers of draws, so that pairs are compared once. A single prompt has no
    interval: NaN at both ends.
    """
    counts, prompts = pair_counts(predicted, realised, group), int(group.max()) + 1
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(prompts, np.full(prompts, 1 / prompts), size=num_resamples).astype(float)
    if prompts == 1:
        weights[:] = np.nan
    tau, accuracy = kendall_tau(predicted, realised), float(_accuracy(counts, np.ones((1, prompts)))[0])
    return {
        "kendall_tau": percentile_interval(tau, _tau(counts, weights)),
        "pairwise_accuracy": percentile_interval(accuracy, _accuracy(counts, weights)),
    }


def _accuracy(counts: tuple[np.ndarray, ...], weights: np.ndarray) -> np.ndarray:
    signed, unequal = (_quadratic(total, weights) - weights**2 @ np.diag(total) for total in counts[:2])
    return (1 + quotient(signed, unequal)) / 2


def _tau(counts: tuple[np.ndarray, ...], weights: np.ndarray) -> np.ndarray:
    signed, first, second = (_quadratic(total, weights) for total in counts)
    return quotient(signed, np.sqrt(first * second))


def _quadratic(total: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``w' A w`` for each row w of `weights` `(R, P)`: the count in a resample that holds each prompt w times."""
    return ((weights @ total) * weights).sum(axis=1)
