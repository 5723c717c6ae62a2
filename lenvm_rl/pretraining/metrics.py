"""How good a length value model is: errors in value and in tokens, at four points of the way, and rank agreement.

The unit is the completion: each is boiled down to one row of numbers ([`sequence_statistics`]), and the rows of a data
set, or of one of its domains, to metrics ([`summarize`]). So there is no padding to dilute a mean with, and little has
to cross processes. Cut completions count in the loss only: their true length is unknown.

"Tokens" are tokens still to come, the end-of-sequence token counted, so the true number is at least 1 and a relative
error is always defined.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor

from lenvm_rl.pretraining.references import half_errors, mean_by_group
from lenvm_rl.returns import discounted_return, remaining_from_logits, remaining_from_value

POINTS = (0, 25, 50, 75)  # percent of a completion's tokens that stand already
_COLUMNS = ("value", "target", "value_spread", "target_spread", "joint_spread", "absolute_error", "loss")
# Before the name of a metric that is of one domain only.
DOMAIN_PREFIX = "domain/"

logger = logging.getLogger(__name__)


def sequence_statistics(
    logits: Tensor, lengths: Tensor, finished: Tensor, gamma: float, targets: Tensor | None = None
) -> Tensor:
    """One row of numbers per completion, from which [`summarize`] makes metrics.

    Args:
        logits (`torch.Tensor` of shape `(B, T)`): logits of ``s_0 ... s_{L-1}``; entries from L on are ignored.
        lengths (`torch.Tensor` of shape `(B,)`, int64): tokens L of each completion.
        finished (`torch.Tensor` of shape `(B,)`): whether it ended (else it was cut).
        gamma (`float`): discount of the length return.
        targets (`torch.Tensor` of shape `(B, T)`, *optional*): what the values were fitted to, for the loss; the Monte
            Carlo return of the length when omitted.

    Returns:
        `torch.Tensor` of shape `(B, 11)`: the logits at 0, 25, 50 and 75 % of the way, and means over states of value,
        return, their squares and product about those means, absolute error, and squared error to the targets.
    """
    steps = torch.arange(logits.shape[1], device=logits.device)
    exists = steps < lengths.unsqueeze(1)
    zero = torch.zeros_like(logits)
    values = torch.where(exists, -torch.sigmoid(logits), zero)
    remaining = (lengths.unsqueeze(1) - steps).clamp(min=0)
    returns = torch.where(exists, discounted_return(remaining.to(logits.dtype), gamma), zero)
    fitted = returns if targets is None else torch.where(exists, targets, zero)

    def mean(column: Tensor) -> Tensor:
        return torch.where(exists, column, zero).sum(dim=1) / lengths

    # Squares about the mean of the sequence: raw squares would drown a small variance in rounding.
    value, target = mean(values), mean(returns)
    value_deviation, target_deviation = values - value.unsqueeze(1), returns - target.unsqueeze(1)
    means = (
        value,
        target,
        mean(value_deviation.square()),
        mean(target_deviation.square()),
        mean(value_deviation * target_deviation),
        mean((values - returns).abs()),
        mean((values - fitted).square()),
    )
    places = torch.stack([point_index(lengths, point) for point in POINTS], dim=1)
    return torch.cat([logits.gather(1, places), torch.stack(means, dim=1)], dim=1)


def point_index(lengths: Tensor, percent: int) -> Tensor:
    """The state at `percent` of the way: ``floor(L * percent / 100)``, at most L - 1."""
    return lengths * percent // 100


def summarize(statistics: Tensor, lengths: Tensor, finished: Tensor, groups: Tensor, gamma: float) -> dict[str, float]:
    """The metrics of [`length_value_metrics`], from what [`sequence_statistics`] returned, `(N, 11)`."""
    statistics = statistics.double()
    ended = finished.bool()
    if not bool(ended.any()):
        raise ValueError("No completion ended, so no true length is known; sample the evaluation with more new tokens.")
    loss = statistics[:, len(POINTS) + _COLUMNS.index("loss")]
    metrics = {
        "loss": float((loss * lengths).sum() / lengths.sum()),
        "completions": float(len(lengths)),
        "truncated_share": float((~ended).double().mean()),
    }
    metrics.update(_state_metrics(statistics[ended, len(POINTS) :], lengths[ended].double()))
    for place, point in enumerate(POINTS):
        remaining = lengths[ended] - point_index(lengths[ended], point)
        metrics.update(_point_metrics(statistics[ended, place], remaining.double(), gamma, point))
    metrics.update(_boundary_metrics(statistics[:, 0], lengths.double(), ended, groups, gamma))
    return metrics


def length_value_metrics(
    logits: Tensor, lengths: Tensor, finished: Tensor, groups: Tensor, gamma: float, targets: Tensor | None = None
) -> dict[str, float]:
    """Metrics of logits against completions whose lengths are known (arXiv 2604.27039, sections 4.4 and 5).

    Args:
        logits (`torch.Tensor` of shape `(B, T)`): logits of ``s_0 ... s_{L-1}``; entries from L on are ignored.
        lengths (`torch.Tensor` of shape `(B,)`, int64): tokens L of each completion.
        finished (`torch.Tensor` of shape `(B,)`): whether it ended (else it was cut).
        groups (`torch.Tensor` of shape `(B,)`, int64): the prompt that it belongs to.
        gamma (`float`): discount of the length return.
        targets (`torch.Tensor` of shape `(B, T)`, *optional*): see [`sequence_statistics`].

    Returns:
        `dict[str, float]`, means over finished completions unless said otherwise:

        - `loss`: squared error to the targets, mean over the states of all completions; `completions` (number) and
          `truncated_share`: of all completions.
        - `value_mae`, `value_bias` (V - G), `explained_variance` (1 - Var(G - V) / Var(G)), `calibration_slope` (of G
          regressed on V; 1 is calibrated): over states.
        - at each point p of 0, 25, 50, 75 % of the way, `value_mae_at_p`, `value_bias_at_p`, `explained_variance_at_p`,
          and in tokens `length_mae_at_p`, `length_bias_at_p`, `length_mre_at_p` (error over true), against the
          realised length. A length read off V underestimates the mean length (Jensen's inequality), so a model that is
          exact in value has a negative bias in tokens.
        - at the prompt, `consistent_mae`, `consistent_mre`: against the return-consistent length
          ``ln(1 - mean_i(1 - gamma^L_i)) / ln(gamma)`` of each prompt, mean over the `consistent_prompts` prompts that
          have no cut completion; `prompt_explained_variance`: of the mean return between those prompts, by V;
          `prompt_explained_ceiling`: what of it an exact V would explain, the rest being the noise of means of so few
          completions (the variance within prompts, pooled, over the number of completions);
          `half_mre`: as `consistent_mre`, against halves of a prompt's completions (see
          [`lenvm_rl.pretraining.references.reference_metrics`], whose `reference_half_mre` an exact model has about
          0.7 of);
          `kendall_tau`: rank agreement (tau-b) of predicted and realised lengths.

        NaN where nothing is defined: a quotient by a variance of 0, no prompt without a cut completion.
    """
    statistics = sequence_statistics(logits, lengths, finished, gamma, targets)
    return summarize(statistics, lengths, finished, groups, gamma)


def kendall_tau(first: Tensor, second: Tensor) -> float:
    """Kendall's tau-b of two measurements of the same things, `(N,)` each (Kendall 1945, Biometrika 33).

    It is ``(concordant - discordant) / sqrt((pairs - ties in first) (pairs - ties in second))``, in [-1, 1]; NaN if all
    values of one of them are equal. The cost is N log N (Knight 1966, Journal of the American Statistical Association
    61).
    """
    _, first = torch.unique(first, return_inverse=True)
    _, second = torch.unique(second, return_inverse=True)
    pairs = len(first) * (len(first) - 1) // 2
    joint = first * (int(second.max()) + 1) + second if len(first) else first
    ties_first, ties_second, ties_both = (_tied_pairs(ranks) for ranks in (first, second, joint))
    discordant = _inversions(second[torch.argsort(joint)])
    concordant = pairs - ties_first - ties_second + ties_both - discordant
    return _ratio(concordant - discordant, math.sqrt((pairs - ties_first) * (pairs - ties_second)))


def _tied_pairs(ranks: Tensor) -> int:
    counts = torch.unique(ranks, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _inversions(ranks: Tensor) -> int:
    """Pairs whose larger rank comes first. Each is found once, at the highest bit in which the two ranks differ."""
    total = 0
    for bit in reversed(range(int(ranks.max()).bit_length() if len(ranks) else 0)):
        # Sorted by the higher bits, in the original order within each run of equal higher bits.
        ones = (ranks >> bit) & 1
        before = torch.cumsum(ones, 0) - ones
        prefix = ranks >> (bit + 1)
        before = before - before[torch.searchsorted(prefix, prefix)]
        total += int((before * (1 - ones)).sum())
        ranks = ranks[torch.argsort(ranks >> bit, stable=True)]
    return total


def _state_metrics(means: Tensor, lengths: Tensor) -> dict[str, float]:
    """Metrics over all states, from the means of each completion: total variance = within + between completions."""
    column = {name: means[:, place] for place, name in enumerate(_COLUMNS)}

    def mean(values: Tensor) -> Tensor:
        return (values * lengths).sum() / lengths.sum()

    value, target = mean(column["value"]), mean(column["target"])
    value_deviation, target_deviation = column["value"] - value, column["target"] - target
    value_variance = mean(column["value_spread"] + value_deviation.square())
    target_variance = mean(column["target_spread"] + target_deviation.square())
    covariance = mean(column["joint_spread"] + value_deviation * target_deviation)
    error_variance = value_variance + target_variance - 2 * covariance
    return {
        "value_mae": float(mean(column["absolute_error"])),
        "value_bias": float(value - target),
        "explained_variance": 1.0 - _ratio(float(error_variance), float(target_variance)),
        "calibration_slope": _ratio(float(covariance), float(value_variance)),
    }


def _point_metrics(logits: Tensor, remaining: Tensor, gamma: float, point: int) -> dict[str, float]:
    values, returns = -torch.sigmoid(logits), discounted_return(remaining, gamma)
    value_errors = values - returns
    length_errors = remaining_from_logits(logits, gamma) - remaining
    variance = float(value_errors.var(correction=0))
    return {
        f"value_mae_at_{point}": float(value_errors.abs().mean()),
        f"value_bias_at_{point}": float(value_errors.mean()),
        f"explained_variance_at_{point}": 1.0 - _ratio(variance, float(returns.var(correction=0))),
        f"length_mae_at_{point}": float(length_errors.abs().mean()),
        f"length_bias_at_{point}": float(length_errors.mean()),
        f"length_mre_at_{point}": float((length_errors.abs() / remaining).mean()),
    }


def _boundary_metrics(logits: Tensor, lengths: Tensor, ended: Tensor, groups: Tensor, gamma: float) -> dict[str, float]:
    _, group = torch.unique(groups, return_inverse=True)
    # A prompt has one prediction: the mean evens out rounding, which would pass for an order in kendall_tau.
    predicted = mean_by_group(remaining_from_logits(logits, gamma), group)
    value = mean_by_group(-torch.sigmoid(logits), group)
    whole = mean_by_group(ended, group) == 1.0
    mean_return = mean_by_group(discounted_return(lengths, gamma), group)
    consistent = remaining_from_value(mean_return, gamma)[whole]
    errors = (predicted[whole] - consistent).abs()
    variance = _variance(mean_return[whole])
    unexplained = _ratio(_variance((value - mean_return)[whole]), variance)
    deviations = (discounted_return(lengths, gamma) - mean_return[group])[whole[group]]
    counts = torch.bincount(group)[whole].double()
    noise = _ratio(float(deviations.square().sum()), float((counts - 1).sum())) * float((1 / counts).mean())
    return {
        "consistent_prompts": float(whole.sum()),
        "consistent_mae": float(errors.mean()),
        "consistent_mre": float((errors / consistent).mean()),
        "half_mre": half_errors(predicted, lengths, ended, group, gamma),
        "prompt_explained_variance": 1.0 - unexplained,
        "prompt_explained_ceiling": 1.0 - _ratio(noise, variance),
        "kendall_tau": kendall_tau(predicted[group][ended], lengths[ended]),
    }


def _variance(column: Tensor) -> float:
    """Of the population; NaN of nothing."""
    return float(column.var(correction=0)) if len(column) else math.nan


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0.0 else math.nan


def domains_of_prompts(rollouts: Dataset, column: str) -> dict[int, str]:
    """The domain of each prompt, by its group; its completions must agree on it."""
    if column not in rollouts.column_names:
        raise ValueError(f"domain_column={column!r} is no column of the rollouts: they have {rollouts.column_names}.")
    domains: dict[int, str] = {}
    for group, domain in zip(rollouts["group"][:], rollouts[column][:], strict=True):
        if domains.setdefault(group, str(domain)) != str(domain):
            raise ValueError(f"the completions of group {group} are of different domains: a prompt has one.")
    return domains


def metrics_for_card(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of an evaluation as the model's config keeps them: of all held-out prompts, and of each domain."""
    kept: dict[str, dict[str, float]] = {"held-out prompts": {}}
    for name, value in metrics.items():
        if not (isinstance(value, float) and math.isfinite(value)):
            continue
        prefix = f"eval_{DOMAIN_PREFIX}"
        if name.startswith(prefix):
            domain, _, name = name.removeprefix(prefix).rpartition("/")
            kept.setdefault(domain, {})[name] = value
        else:
            kept["held-out prompts"][name.removeprefix("eval_")] = value
    return kept


def domain_metrics(
    metrics_of: Callable[[Tensor, Tensor], dict[str, float]],
    statistics: Tensor,
    labels: Tensor,
    domain_of: dict[int, str],
) -> dict[str, float]:
    """The metrics of each domain, named `domain/<domain>/<metric>`.

    Args:
        metrics_of (callable): metrics of statistics and labels.
        statistics (`torch.Tensor` of shape `(N, …)`), labels (`torch.Tensor` of shape `(N, 4)`): of each completion;
            labels are its tokens, whether it ended, its group, and the tokens of its prompt.
        domain_of (`dict[int, str]`): the domain of each group, if there are any.
    """
    found = {}
    for domain in sorted(set(domain_of.values())):
        own = torch.tensor([domain_of[group] == domain for group in labels[:, 2].tolist()])
        if not bool((own & (labels[:, 1] != 0)).any()):
            logger.warning("domain %s: none of its completions ended, so it has no metrics", domain)
            continue
        metrics = metrics_of(statistics[own], labels[own])
        found.update({f"{DOMAIN_PREFIX}{domain}/{name}": value for name, value in metrics.items()})
    return found
