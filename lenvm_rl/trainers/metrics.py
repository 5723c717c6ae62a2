"""What the trainers log about lengths, values and streams of advantage.

All numbers are over the tokens or completions of a whole generation batch or optimizer step, of all processes, and come
from one exchange of sums. A number that is not defined for a batch (no finished completion, no correct one) is NaN,
which TRL leaves out of its averages. Lengths are in tokens that the policy wrote, the end-of-sequence token not
counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from lenvm_rl.returns import discounted_return, remaining_from_logits, td_residual, wide_dtype
from lenvm_rl.trainers.streams import Completions, Outcomes, Streams

# Relative variance of numbers that only float32 rounding tells apart.
ROUNDING_VARIANCE = 1e-10
# Sums that are kept of two arrays: the count, x, x^2, xy, y^2, y.
MOMENTS = 6


def for_sums(x: Tensor) -> Tensor:
    """A tensor where there is float64: moments are differences of large sums, and float32 is too coarse for those."""
    return x if wide_dtype(x.device) is torch.float64 else x.cpu()


def _mean(count, x, *_) -> float:
    return x / count if count else math.nan


def _variance(count, x, xx, *_) -> float:
    return max(xx / count - (x / count) ** 2, 0.0) if count else math.nan


def _cosine(count, x, xx, xy, yy, y) -> float:
    return xy / math.sqrt(xx * yy) if xx > 0.0 and yy > 0.0 else math.nan


def _varies(count, y, yy) -> bool:
    """Whether numbers of these sums differ by more than float32 rounding."""
    return count > 0 and yy / count - (y / count) ** 2 > ROUNDING_VARIANCE * (1.0 + (y / count) ** 2)


def _slope(count, x, xx, xy, yy, y) -> float:
    if not _varies(count, y, yy):
        return math.nan
    return (xy / count - (y / count) * x / count) / (yy / count - (y / count) ** 2)


class BatchMetrics:
    """Metrics of a batch, taken in one by one as sums, and read off the totals of these over all processes.

    Every method but `read` takes the metric's name, an array, where it counts (`mask`), and for two of them a second
    array; all three of one shape. What comes in under one name is pooled, as the micro-batches of a step are.
    """

    def __init__(self):
        self._taken: dict[str, tuple[Callable[..., float], Tensor]] = {}

    def _add(self, name: str, read: Callable[..., float], *arrays: tuple[Tensor, Tensor, Tensor | None]) -> None:
        sums = []
        for x, mask, y in arrays:
            mask, x = for_sums(mask.bool()), for_sums(x.detach())
            x = torch.where(mask, x, 0).double()
            y = x if y is None else torch.where(mask, for_sums(y.detach()), 0).double()
            sums += [mask.sum().double(), x.sum(), (x * x).sum(), (x * y).sum(), (y * y).sum(), y.sum()]
        pooled = torch.stack(sums)
        if name in self._taken:
            pooled = pooled + self._taken[name][1]
        self._taken[name] = (read, pooled)

    def mean(self, name: str, x: Tensor, mask: Tensor) -> None:
        """Mean of `x`."""
        self._add(name, lambda sums: _mean(*sums), (x, mask, None))

    def deviation(self, name: str, x: Tensor, mask: Tensor) -> None:
        """Population standard deviation of `x`."""
        self._add(name, lambda sums: math.sqrt(_variance(*sums)), (x, mask, None))

    def cosine(self, name: str, x: Tensor, y: Tensor, mask: Tensor) -> None:
        """Cosine of the angle between `x` and `y`."""
        self._add(name, lambda sums: _cosine(*sums), (x, mask, y))

    def slope(self, name: str, x: Tensor, y: Tensor, mask: Tensor) -> None:
        """Slope of the regression line of `x` on `y`, NaN where `y` does not vary but for float32 rounding."""
        self._add(name, lambda sums: _slope(*sums), (x, mask, y))

    def explained_variance(self, name: str, error: Tensor, target: Tensor, mask: Tensor) -> None:
        """``1 - Var(error) / Var(target)``: 1 for a perfect prediction, 0 for a constant one, NaN for equal targets.

        Targets that float32 rounding alone tells apart count as equal.
        """

        def read(errors: list[float], targets: list[float]) -> float:
            count, x, xx, *_ = targets
            return 1.0 - _variance(*errors) / _variance(*targets) if _varies(count, x, xx) else math.nan

        self._add(name, read, (error, mask, None), (target, mask, None))

    @property
    def sums(self) -> Tensor:
        """Of this process, `(n,)`."""
        return torch.cat([sums for _, sums in self._taken.values()])

    def read(self, totals: Sequence[float]) -> dict[str, float]:
        """All metrics by name, of the sums of all processes."""
        rows = (totals[first : first + MOMENTS] for first in range(0, len(totals), MOMENTS))
        return {name: read(*islice(rows, len(sums) // MOMENTS)) for name, (read, sums) in self._taken.items()}


def add_completions(metrics: BatchMetrics, completions: Completions, outcomes: Outcomes) -> None:
    """`length/…`, of every run.

    - `length/mean`: mean length of all completions, cut ones at the length they were cut at.
    - `length/mean_correct`: mean length of the correct completions.
    - `length/correct`: share of correct completions among those that were judged, NaN if none was.
    - `length/truncated`: share of completions that did not end by themselves.
    """
    lengths, correct = completions.lengths.float(), outcomes.correct.bool()
    everyone = torch.ones_like(correct)
    metrics.mean("length/mean", lengths, everyone)
    metrics.mean("length/mean_correct", lengths, correct)
    metrics.mean("length/correct", correct.float(), outcomes.judged)
    metrics.mean("length/truncated", (~completions.finished).float(), everyone)


def add_values(metrics: BatchMetrics, logits_bt1: Tensor, completions: Completions, gamma: float) -> None:
    """`lenvm/…`, of every run with a length value model: does it still know this policy's lengths?

    - `lenvm/value_mean`: mean of V over the states in which the policy chose a token.
    - `lenvm/td_residual_mean`: mean of ``-(1 - gamma) + gamma V(s_{t+1}) - V(s_t)``; above 0 where completions end
      earlier than the model expects.
    - `lenvm/explained_variance`: of the realised length return by V, over finished completions.
    - `lenvm/calibration_slope`: slope of the realised length return on V, over the same states: 1 where a difference in
      V means that difference in the return, below 1 where V exaggerates it, above 1 where it plays it down.
    - `lenvm/predicted_length`, `lenvm/realised_length`: means over finished completions, predicted from the prompt.

    Args:
        logits_bt1 (`torch.Tensor` of shape `(B, T + 1)`): of the length value model at every state.
    """
    actions, finished = completions.actions, completions.finished
    values_bt1 = -torch.sigmoid(logits_bt1)
    values = values_bt1[:, :-1]
    to_come = actions.flip(1).long().cumsum(dim=1).flip(1)
    returns = discounted_return(to_come.to(values.dtype), gamma)
    ended = actions & finished.unsqueeze(1)
    residuals = td_residual(values, completions.mask, gamma, completions.following(values_bt1), actions)
    metrics.mean("lenvm/value_mean", values, actions)
    metrics.mean("lenvm/td_residual_mean", residuals, actions)
    metrics.explained_variance("lenvm/explained_variance", returns - values, returns, ended)
    metrics.slope("lenvm/calibration_slope", returns, values, ended)
    metrics.mean("lenvm/predicted_length", remaining_from_logits(logits_bt1[:, 0], gamma) - 1.0, finished)
    metrics.mean("lenvm/realised_length", completions.lengths.float(), finished)


def add_streams(metrics: BatchMetrics, streams: Streams, completions: Completions) -> None:
    """`advantage/…`: the streams before they are added, without `length_coef`.

    - `advantage/task_std`: standard deviation of the task stream over the policy's tokens.
    - `advantage/length_mean`, `advantage/length_std`: of the length stream, gated as it is used.
    - `advantage/cosine`: of the angle between the two; -1 where they want opposite things.
    """
    actions = completions.actions
    metrics.deviation("advantage/task_std", streams.task, actions)
    if streams.length is not None:
        metrics.mean("advantage/length_mean", streams.length, actions)
        metrics.deviation("advantage/length_std", streams.length, actions)
        metrics.cosine("advantage/cosine", streams.task, streams.length, actions)


def add_kl_reward(metrics: BatchMetrics, log_ratio: Tensor, coef: float, completions: Completions) -> None:
    """`kl_reward/…`, of a run with the divergence from the reference policy in its rewards.

    - `kl_reward/per_token`: mean of ``log pi - log pi_ref`` over the tokens that the policy chose.
    - `kl_reward/per_completion`: mean over completions of what it adds to their rewards in sum.

    Args:
        log_ratio (`torch.Tensor` of shape `(B, T)`): 0 where no action is.
        coef (`float`): its weight.
    """
    metrics.mean("kl_reward/per_token", log_ratio, completions.actions)
    metrics.mean("kl_reward/per_completion", -coef * log_ratio.sum(dim=1), completions.mask.any(dim=1))


def add_divergence(
    metrics: BatchMetrics, divergence: Tensor, ratio: Tensor, clipped: Tensor | None, mask: Tensor, number: int | None
) -> None:
    """`policy/…`, of a micro-batch whose policy may have moved since it was sampled.

    - `policy/approx_kl`: mean of [`~lenvm_rl.trainers.divergence.approximate_kl`].
    - `policy/ratio`: mean ratio.
    - `policy/pass_<k>/approx_kl`, `policy/pass_<k>/ratio`, `policy/pass_<k>/clip_fraction`: of pass k alone, the last
      the share of tokens in which the clipped loss has no gradient.

    Args:
        divergence, ratio, mask (`torch.Tensor` of shape `(B, T)`): of each token, and which of them count.
        clipped (`torch.BoolTensor` of shape `(B, T)`, *optional*): of a loss that clips.
        number (`int`, *optional*): k; `None` where there is one pass.
    """
    metrics.mean("policy/approx_kl", divergence, mask)
    metrics.mean("policy/ratio", ratio, mask)
    if number is not None:
        metrics.mean(f"policy/pass_{number}/approx_kl", divergence, mask)
        metrics.mean(f"policy/pass_{number}/ratio", ratio, mask)
        if clipped is not None:
            metrics.mean(f"policy/pass_{number}/clip_fraction", clipped.float(), mask)


def add_guidance(metrics: BatchMetrics, ratio: Tensor, truncated: Tensor, completions: Completions) -> None:
    """`guidance/…`, of a run with guided rollouts.

    - `guidance/ratio`: mean importance ratio of the tokens, before it is truncated; about 1 where nothing is wrong.
    - `guidance/truncated`: share of the tokens whose ratio was truncated.
    """
    metrics.mean("guidance/ratio", ratio, completions.mask)
    metrics.mean("guidance/truncated", truncated.float(), completions.mask)


def add_critic(
    metrics: BatchMetrics, values: Tensor, returns: Tensor, mask: Tensor, realised: Tensor | None = None
) -> None:
    """`critic/…`, at sampling time: `critic/value_mean`, `critic/return_mean`, `critic/explained_variance`.

    The returns have lambda 1, whatever the critic's targets are: a target of a lower lambda is made of the
    critic's own values, which explain it however wrong they are.

    Args:
        values, returns, mask (`torch.Tensor` of shape `(B, T)`): of the critic, what was paid from there on, and where
            they count.
        realised (`torch.BoolTensor` of shape `(B,)`, *optional*): rows whose return is made of rewards alone; the
            others, which go on with the critic's own value, are left out of the last two. All rows by default.
    """
    known = mask if realised is None else mask & realised.unsqueeze(1)
    metrics.mean("critic/value_mean", values, mask)
    metrics.mean("critic/return_mean", returns, known)
    metrics.explained_variance("critic/explained_variance", returns - values, returns, known)
