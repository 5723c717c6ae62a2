"""What a length value model's errors at the prompt are to be read beside, from the lengths alone.

Two predictors that know little (the mean of all, a line on the prompt's length), one that knows as much as a prompt can
tell (its median), and how far the reference that a model is measured against is itself known: two halves of a prompt's
samples give two return-consistent lengths (arXiv 2604.27039, section 4.4), and not even an exact model is nearer to one
half than sampling noise allows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lenvm_rl.returns import discounted_return, remaining_from_value

HALVINGS = 16  # random halvings that are averaged


def mean_by_group(column: Tensor, group: Tensor) -> Tensor:
    """Mean of each group: `(P,)` float64 from `(N,)` and the group's index `(N,)` in 0 … P - 1."""
    total = torch.zeros(int(group.max()) + 1 if len(group) else 0, dtype=torch.double)
    count = total.index_add(0, group, torch.ones(len(group), dtype=torch.double))
    return total.index_add(0, group, column.double()) / count


def half_returns(lengths: Tensor, group: Tensor, gamma: float, splits: int = HALVINGS) -> Tensor:
    """Mean returns of disjoint halves of each prompt's samples, in random halvings.

    Halves are of equal size, one sample of an odd number is left out. The halvings depend on the lengths but not on the
    order in which they come.

    Args:
        lengths (`torch.Tensor` of shape `(N,)`): tokens of each completion.
        group (`torch.Tensor` of shape `(N,)`, int64): index of its prompt, in 0 … P - 1.
        gamma (`float`): discount of the length return.
        splits (`int`, *optional*, defaults to `HALVINGS`): halvings.

    Returns:
        `torch.Tensor` of shape `(splits, 2, P)`, float64: NaN for prompts with a single completion.
    """
    # From here on the order of the data is forgotten.
    order = _by_group_and_length(lengths, group)
    returns, group = discounted_return(lengths[order].double(), gamma), group[order]
    count = torch.bincount(group)
    first = torch.cumsum(count, 0) - count
    draw = torch.Generator().manual_seed(0)
    means = []
    for _ in range(splits):
        shuffled = torch.randperm(len(group), generator=draw)
        shuffled = shuffled[torch.argsort(group[shuffled], stable=True)]
        rank = torch.arange(len(group)) - first[group]
        half = count[group] // 2
        for inside in (rank < half, (rank >= half) & (rank < 2 * half)):
            total = torch.zeros(len(count), dtype=torch.double).index_add_(0, group[inside], returns[shuffled][inside])
            means.append(total / (count // 2))
    return torch.stack(means).unflatten(0, (splits, 2))


def relative_errors(predicted: Tensor, reference: Tensor) -> Tensor:
    """Absolute error over the reference, of any shape."""
    return (predicted - reference).abs() / reference


def regression(x: Tensor, y: Tensor) -> Tensor:
    """Least-squares prediction of y from x, both `(N,)`, at least 1 token; the mean of y where all x are equal."""
    x, y = x.double(), y.double()
    deviation = x - x.mean()
    variance = deviation.square().sum()
    slope = (deviation * (y - y.mean())).sum() / variance if float(variance) > 0.0 else torch.zeros(())
    return (y.mean() + slope * deviation).clamp(min=1.0)


def reference_metrics(
    lengths: Tensor, prompt_tokens: Tensor, finished: Tensor, groups: Tensor, gamma: float
) -> dict[str, float]:
    """Errors at the prompt that need no model, on the data that a model is evaluated on.

    Each predictor is fitted to the very numbers that it is measured against, which flatters it a little.

    Args:
        lengths, prompt_tokens, finished, groups (`torch.Tensor` of shape `(N,)`): tokens of each completion, end of
            sequence counted, tokens of its prompt, whether it ended (else it was cut), and which prompt it belongs to.
        gamma (`float`): discount of the length return.

    Returns:
        `dict[str, float]`: in tokens or relative, against the realised lengths of finished completions and the
        return-consistent lengths of prompts without a cut completion:

        - `reference_mean_length_mae`, `…_length_mre`, `…_consistent_mre`: of the mean of those lengths.
        - `reference_regression_length_mae`, `…_length_mre`, `…_consistent_mre`: of a line on the prompt's tokens.
        - `reference_median_length_mae`: of the median of the prompt's own finished completions.
        - `reference_half_mre`: between the lengths of halves of a prompt's completions, each half in turn being the
          reference; over `reference_half_prompts` prompts, with `reference_half_samples` completions in a half (mean).

        NaN where nothing is defined: no finished completion, no prompt without a cut one.
    """
    ended = finished.bool()
    _, group = torch.unique(groups, return_inverse=True)
    whole = mean_by_group(ended, group) == 1.0
    consistent = remaining_from_value(mean_by_group(discounted_return(lengths.double(), gamma), group), gamma)[whole]
    prompts = mean_by_group(prompt_tokens, group)[whole]
    realised, tokens = lengths[ended].double(), prompt_tokens[ended]
    metrics = {}
    constant = realised.mean().expand(len(realised)), consistent.mean().expand(len(consistent))
    line = regression(tokens, realised), regression(prompts, consistent)
    for name, (of_completion, of_prompt) in {"mean": constant, "regression": line}.items():
        metrics[f"reference_{name}_length_mae"] = float((of_completion - realised).abs().mean())
        metrics[f"reference_{name}_length_mre"] = float(relative_errors(of_completion, realised).mean())
        metrics[f"reference_{name}_consistent_mre"] = float(relative_errors(of_prompt, consistent).mean())
    metrics["reference_median_length_mae"] = float((realised - _medians(realised, group[ended])).abs().mean())
    halved, halves = _halves(lengths, ended, group, gamma)
    count = torch.bincount(group)
    metrics["reference_half_mre"] = float(relative_errors(halves, halves.flip(1)).mean())
    metrics["reference_half_samples"] = float((count[halved] // 2).double().mean())
    metrics["reference_half_prompts"] = float(halved.sum())
    return metrics


def _medians(lengths: Tensor, group: Tensor) -> Tensor:
    """The (lower) median of each completion's group, `(N,)`: no number has a smaller mean absolute error to it."""
    order = _by_group_and_length(lengths, group)
    count = torch.bincount(group)
    middle = torch.cumsum(count, 0) - count + (count - 1).clamp(min=0) // 2
    return lengths[order][middle[group]] if len(group) else lengths


def half_errors(predicted: Tensor, lengths: Tensor, finished: Tensor, group: Tensor, gamma: float) -> float:
    """The mean relative error of a length for each prompt, `(P,)`, against halves of its samples; NaN of no prompt.

    As in `reference_half_mre`, prompts with a cut completion, or with a single one, are left out.
    """
    halved, halves = _halves(lengths, finished.bool(), group, gamma)
    return float(relative_errors(predicted[halved], halves).mean())


def _halves(lengths: Tensor, ended: Tensor, group: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Which prompts can be halved, `(P,)`, and the return-consistent lengths of their halves, `(splits, 2, …)`."""
    halved = (mean_by_group(ended, group) == 1.0) & (torch.bincount(group) >= 2)
    return halved, remaining_from_value(half_returns(lengths, group, gamma)[:, :, halved], gamma)


def _by_group_and_length(lengths: Tensor, group: Tensor) -> Tensor:
    order = torch.argsort(lengths, stable=True)
    return order[torch.argsort(group[order], stable=True)]
