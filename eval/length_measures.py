"""What a length value model says along completions, boiled down to metrics with 95 % bootstrap intervals over prompts.

The metrics are those of value pretraining (`lenvm_rl.pretraining.metrics`, `lenvm_rl.pretraining.references`); added
are the slope of the calibration and the rank agreement at each of the points. Tokens count the end-of-sequence token.
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

from eval.rank_agreement import rank_intervals
from eval.statistics import Interval, mean_interval, quotient, statistic_interval
from lenvm_rl.modeling.completions import state_logits
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.metrics import POINTS, point_index, sequence_statistics, summarize
from lenvm_rl.pretraining.references import half_returns, mean_by_group, reference_metrics, relative_errors
from lenvm_rl.returns import discounted_return, remaining_from_logits, remaining_from_value

# Measured at each point of the way.
ALONG = ("length_mae", "length_mre", "length_bias", "explained_variance", "calibration_slope", "kendall_tau")
ALONG += ("pairwise_accuracy",)


@dataclass(frozen=True)
class Completions:
    """What a model said along completions, a row for each.

    Args:
        statistics (`torch.Tensor` of shape `(N, 11)`): as [`~lenvm_rl.pretraining.metrics.sequence_statistics`] has
        them. lengths, finished, groups, prompt_tokens (`torch.Tensor` of shape `(N,)`): tokens, whether it ended, its
        prompt,
            and the prompt's tokens.
        gamma (`float`): discount of the length return.
    """

    statistics: Tensor
    lengths: Tensor
    finished: Tensor
    groups: Tensor
    prompt_tokens: Tensor
    gamma: float

    def select(self, rows: Tensor) -> Completions:
        """Some of the rows, by mask or index."""
        columns = (self.statistics, self.lengths, self.finished, self.groups, self.prompt_tokens)
        return Completions(*(column[rows] for column in columns), self.gamma)

    def at(self, percent: int) -> tuple[Tensor, Tensor]:
        """Logits and true remaining tokens at a point of the way, float64."""
        remaining = self.lengths - point_index(self.lengths, percent)
        return self.statistics[:, POINTS.index(percent)].double(), remaining.double()


@torch.no_grad()
def read_completions(model: LengthValueModel, rollouts: Dataset, forward_tokens: int = 16384) -> Completions:
    """Runs the model along every completion.

    Args:
        model (`LengthValueModel`): in eval mode.
        rollouts (`datasets.Dataset`): as `read_rollouts` gives them.
        forward_tokens (`int`, *optional*, defaults to `16384`): most tokens in a forward, padding counted (more where
            one completion is longer).
    """
    prompts, completions = rollouts["prompt_ids"][:], rollouts["completion_ids"][:]
    prompt_tokens, lengths = (torch.tensor([len(row) for row in rows]) for rows in (prompts, completions))
    finished = torch.tensor([reason == "stop" for reason in rollouts["finish_reason"][:]])
    statistics = torch.zeros(len(lengths), len(POINTS) + 7)
    ends = finished.tolist()
    for batch, states in state_logits(model, prompts, completions, finished=ends, max_tokens=forward_tokens):
        # The state after a cut, where there is one, is past the length and so not read.
        logits = pad_sequence(states, batch_first=True)
        rows = sequence_statistics(logits, lengths[batch], finished[batch], model.config.gamma)
        statistics[batch] = rows.float()
    return Completions(
        statistics, lengths, finished, torch.tensor(rollouts["group"][:]), prompt_tokens, model.config.gamma
    )


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


def point_intervals(data: Completions, percent: int, **bootstrap: int) -> dict[str, Interval]:
    """The metrics of [`ALONG`], each with ``_at_<percent>`` after its name; all completions must have ended."""
    logits, remaining = data.at(percent)
    _, group = torch.unique(data.groups, return_inverse=True)
    predicted = remaining_from_logits(logits, data.gamma)
    # A prompt has one prediction; what tells its completions apart is rounding, which would pass for an order.
    ranked = mean_by_group(predicted, group)[group] if percent == 0 else predicted
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


def median_intervals(data: Completions, **bootstrap: int) -> dict[str, Interval]:
    """What the (lower) median of a prompt's own completions, all of which must have ended, would reach as a prediction.

    No prediction made at the prompt has a smaller mean absolute error; that each completion is among those that its
    median is of flatters it further where samples are few.
    """
    lengths = data.lengths.double()
    _, group = torch.unique(data.groups, return_inverse=True)
    medians = torch.stack([part.median() for part in _split(lengths, group)])[group]
    return {
        "reference_median_length_mae": mean_interval((medians - lengths).abs().numpy(), group, **bootstrap),
        "reference_median_length_mre": mean_interval(relative_errors(medians, lengths).numpy(), group, **bootstrap),
        **{f"reference_median_{k}": v for k, v in rank_intervals(medians, lengths, group, **bootstrap).items()},
    }


def _split(column: Tensor, group: Tensor) -> tuple[Tensor, ...]:
    return column[torch.argsort(group, stable=True)].split(torch.bincount(group).tolist())


def boundary_table(data: Completions) -> tuple[Tensor, Tensor]:
    """Predicted and return-consistent lengths of the prompts that have no cut completion, both `(P,)`."""
    _, group = torch.unique(data.groups, return_inverse=True)
    whole = mean_by_group(data.finished, group) == 1.0
    predicted = mean_by_group(remaining_from_logits(data.at(0)[0], data.gamma), group)
    returns = mean_by_group(discounted_return(data.lengths.double(), data.gamma), group)
    return predicted[whole], remaining_from_value(returns, data.gamma)[whole]


def half_intervals(data: Completions, **bootstrap: int) -> dict[str, Interval]:
    """Errors against halves of a prompt's completions: the model's, the other half's, and the ratio of the two.

    A model that knows every prompt's expected return exactly has about 0.7 times the error between halves, since only
    one of its two sides is noisy. Prompts with a cut completion, or with a single one, are left out.
    """
    _, group = torch.unique(data.groups, return_inverse=True)
    halved = (mean_by_group(data.finished, group) == 1.0) & (torch.bincount(group) >= 2)
    if not bool(halved.any()):
        return {}
    halves = remaining_from_value(half_returns(data.lengths, group, data.gamma)[:, :, halved], data.gamma)
    predicted = mean_by_group(remaining_from_logits(data.at(0)[0], data.gamma), group)[halved]
    errors = relative_errors(predicted, halves), relative_errors(halves, halves.flip(1))
    table = torch.stack([each.mean(dim=(0, 1)) for each in errors], dim=1).numpy()
    statistics: dict[str, Callable] = {
        "half_mre": lambda means: means[:, 0],
        "reference_half_mre": lambda means: means[:, 1],
        "half_ratio": lambda means: quotient(means[:, 0], means[:, 1]),
    }
    return {name: statistic_interval(table, each, **bootstrap) for name, each in statistics.items()}


def measure(data: Completions, num_resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """Every metric, with an interval where one is bootstrapped and NaN for its ends elsewhere.

    Args:
        data ([`Completions`]): of one domain, or all.
        num_resamples (`int`, *optional*, defaults to `2000`): resamples of the prompts.
        seed (`int`, *optional*, defaults to `0`): of the bootstrap.

    Returns:
        `dict[str, Interval]`: see [`~lenvm_rl.pretraining.length_value_metrics`] (without `loss`, which depends on
        what cut completions are taken for), [`~lenvm_rl.pretraining.references.reference_metrics`],
        [`median_intervals`], [`half_intervals`], and [`ALONG`] at each point. Where no completion ended: `completions`
        and `truncated_share` alone.
    """
    counts = {
        "completions": float(len(data.lengths)),
        "truncated_share": float((~data.finished.bool()).double().mean()),
    }
    if not bool(data.finished.any()):
        return {name: Interval(value, math.nan, math.nan) for name, value in counts.items()}
    common = (data.finished, data.groups, data.gamma)
    metrics = summarize(data.statistics, data.lengths, *common)
    del metrics["loss"]
    metrics.update(reference_metrics(data.lengths, data.prompt_tokens, *common))
    found = {name: Interval(value, math.nan, math.nan) for name, value in metrics.items()}
    ended, bootstrap = data.select(data.finished.bool()), {"num_resamples": num_resamples, "seed": seed}
    for percent in POINTS:
        found.update(point_intervals(ended, percent, **bootstrap))
    found.update(median_intervals(ended, **bootstrap))
    value, target, *spreads = ended.statistics.double()[:, len(POINTS) : len(POINTS) + 5].unbind(1)
    centers = (value.square(), target.square(), value * target)
    squares = torch.stack([spread + center for spread, center in zip(spreads, centers, strict=True)], dim=1)
    found.update(moment_intervals(value, target, squares, ended.groups, ended.lengths, **bootstrap))
    predicted, consistent = boundary_table(data)
    if len(predicted):
        errors = (predicted - consistent).abs()
        found["consistent_mae"] = mean_interval(errors.numpy(), **bootstrap)
        found["consistent_mre"] = mean_interval((errors / consistent).numpy(), **bootstrap)
    found.update(half_intervals(data, **bootstrap))
    found["kendall_tau"] = found["kendall_tau_at_0"]
    return found
