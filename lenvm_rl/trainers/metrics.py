"""What the trainers log about lengths, values and streams of advantage.

All numbers are over the tokens or completions of a whole generation batch, of all processes, and come from one exchange
of sums. A number that is not defined for a batch (no finished completion, no correct one) is NaN, which TRL leaves out
of its averages. Lengths are in tokens that the policy wrote, the end-of-sequence token not counted.
"""

import math

import torch
from torch import Tensor

from lenvm_rl.returns import discounted_return, remaining_from_logits, td_residual, wide_dtype
from lenvm_rl.trainers.streams import Completions

# Relative variance of numbers that only float32 rounding tells apart.
ROUNDING_VARIANCE = 1e-10


def for_sums(x: Tensor) -> Tensor:
    """A tensor where there is float64: moments are differences of large sums, and float32 is too coarse for those."""
    return x if wide_dtype(x.device) is torch.float64 else x.cpu()


class Moments:
    """First and second moments of masked arrays, added up over processes.

    Args:
        reduce (`Callable`): sums a tensor over processes, such as `accelerator.reduce(…, reduction="sum")`.
    """

    def __init__(self, reduce):
        self._reduce = reduce
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, mask: Tensor, y: Tensor | None = None) -> None:
        """Take in `x`, and `y` beside it for a cosine, where `mask` is on (three tensors of one shape)."""
        mask, x = for_sums(mask.bool()), for_sums(x.detach())
        x = torch.where(mask, x, 0).double()
        y = x if y is None else torch.where(mask, for_sums(y.detach()), 0).double()
        sums = [mask.sum().double(), x.sum(), (x * x).sum(), (x * y).sum(), (y * y).sum(), y.sum()]
        self._sums[name] = torch.stack(sums)

    def exchange(self) -> "Moments":
        """Add up the sums of all processes: every process calls this once, after the same calls of `add`."""
        totals = self._reduce(torch.stack(list(self._sums.values())))
        self._sums = dict(zip(self._sums, totals.tolist(), strict=True))
        return self

    def mean(self, name: str) -> float:
        """Mean of `x`."""
        count, total, *_ = self._sums[name]
        return total / count if count else math.nan

    def variance(self, name: str) -> float:
        """Population variance of `x`."""
        count, total, squares, *_ = self._sums[name]
        return max(squares / count - (total / count) ** 2, 0.0) if count else math.nan

    def deviation(self, name: str) -> float:
        """Population standard deviation of `x`."""
        return math.sqrt(self.variance(name))

    def cosine(self, name: str) -> float:
        """Cosine of the angle between `x` and `y`."""
        _, _, xx, xy, yy, _ = self._sums[name]
        return xy / math.sqrt(xx * yy) if xx > 0.0 and yy > 0.0 else math.nan

    def slope(self, name: str) -> float:
        """Slope of the regression line of `x` on `y`, NaN where `y` does not vary but for float32 rounding."""
        count, x, _, xy, yy, y = self._sums[name]
        if not count:
            return math.nan
        mean = y / count
        variance = yy / count - mean**2
        if variance <= ROUNDING_VARIANCE * (1.0 + mean**2):
            return math.nan
        return (xy / count - mean * x / count) / variance

    def explained_variance(self, error: str, target: str) -> float:
        """``1 - Var(error) / Var(target)``: 1 for a perfect prediction, 0 for a constant one, NaN for equal targets.

        Targets that float32 rounding alone tells apart count as equal.
        """
        variance = self.variance(target)
        if variance <= ROUNDING_VARIANCE * (1.0 + self.mean(target) ** 2):
            return math.nan
        return 1.0 - self.variance(error) / variance


def completion_metrics(completions: Completions, correct: Tensor, judged: Tensor, reduce) -> dict[str, float]:
    """`length/…`, of every run.

    - `length/mean`: mean length of all completions, cut ones at the length they were cut at.
    - `length/mean_correct`: mean length of the correct completions.
    - `length/correct`: share of correct completions among those that were judged, NaN if none was.
    - `length/truncated`: share of completions that did not end by themselves.

    Args:
        correct, judged (`torch.BoolTensor` of shape `(B,)`): as [`~lenvm_rl.trainers.gate.Gate.read`] gives them.
    """
    lengths, correct = completions.lengths.float(), correct.bool()
    everyone = torch.ones_like(correct)
    moments = Moments(reduce)
    moments.add("length", lengths, everyone)
    moments.add("correct", lengths, correct)
    moments.add("correct share", correct.float(), judged)
    moments.add("truncated", (~completions.finished).float(), everyone)
    moments.exchange()
    return {
        "length/mean": moments.mean("length"),
        "length/mean_correct": moments.mean("correct"),
        "length/correct": moments.mean("correct share"),
        "length/truncated": moments.mean("truncated"),
    }


def value_metrics(logits: Tensor, completions: Completions, gamma: float, reduce) -> dict[str, float]:
    """`lenvm/…`, of every run with a length value model: does it still know this policy's lengths?

    - `lenvm/value_mean`: mean of V over the states in which the policy chose a token.
    - `lenvm/td_residual_mean`: mean of ``-(1 - gamma) + gamma V(s_{t+1}) - V(s_t)``; above 0 where completions end
      earlier than the model expects.
    - `lenvm/explained_variance`: of the realised length return by V, over finished completions.
    - `lenvm/calibration_slope`: slope of the realised length return on V, over the same states: 1 where a difference in
      V means that difference in the return, below 1 where V exaggerates it, above 1 where it plays it down.
    - `lenvm/predicted_length`, `lenvm/realised_length`: means over finished completions, predicted from the prompt.

    Args:
        logits (`torch.Tensor` of shape `(B, T + 1)`): of the length value model at every state.
    """
    actions = completions.actions
    extended = -torch.sigmoid(logits)
    values = extended[:, :-1]
    residuals = td_residual(values, completions.mask, gamma, completions.following(extended), actions)
    to_come = actions.flip(1).long().cumsum(dim=1).flip(1)
    returns = discounted_return(to_come.to(values.dtype), gamma)
    ended = actions & completions.finished.unsqueeze(1)
    moments = Moments(reduce)
    moments.add("value", values, actions)
    moments.add("residual", residuals, actions)
    moments.add("error", returns - values, ended)
    moments.add("return", returns, ended, values)
    moments.add("predicted", remaining_from_logits(logits[:, 0], gamma) - 1.0, completions.finished)
    moments.add("realised", completions.lengths.float(), completions.finished)
    moments.exchange()
    return {
        "lenvm/value_mean": moments.mean("value"),
        "lenvm/td_residual_mean": moments.mean("residual"),
        "lenvm/explained_variance": moments.explained_variance("error", "return"),
        "lenvm/calibration_slope": moments.slope("return"),
        "lenvm/predicted_length": moments.mean("predicted"),
        "lenvm/realised_length": moments.mean("realised"),
    }


def stream_metrics(task: Tensor, length: Tensor | None, completions: Completions, reduce) -> dict[str, float]:
    """`advantage/…`: the streams before they are added, without `length_coef`.

    - `advantage/task_std`: standard deviation of the task stream over the policy's tokens.
    - `advantage/length_mean`, `advantage/length_std`: of the length stream, gated as it is used.
    - `advantage/cosine`: of the angle between the two; -1 where they want opposite things.

    Args:
        task (`torch.Tensor` of shape `(B, T)`): task stream.
        length (`torch.Tensor` of shape `(B, T)`, *optional*): length stream of a run with a length value model.
    """
    moments = Moments(reduce)
    moments.add("task", task, completions.actions, length)
    if length is not None:
        moments.add("length", length, completions.actions)
    moments.exchange()
    metrics = {"advantage/task_std": moments.deviation("task")}
    if length is not None:
        metrics["advantage/length_mean"] = moments.mean("length")
        metrics["advantage/length_std"] = moments.deviation("length")
        metrics["advantage/cosine"] = moments.cosine("task")
    return metrics


def kl_reward_metrics(log_ratio: Tensor, coef: float, completions: Completions, reduce) -> dict[str, float]:
    """`kl_reward/…`, of a run with the divergence from the reference policy in its rewards.

    - `kl_reward/per_token`: mean of ``log pi - log pi_ref`` over the tokens that the policy chose.
    - `kl_reward/per_completion`: mean over completions of what it adds to their rewards in sum.

    Args:
        log_ratio (`torch.Tensor` of shape `(B, T)`): 0 where no action is.
        coef (`float`): its weight.
    """
    moments = Moments(reduce)
    moments.add("token", log_ratio, completions.actions)
    moments.add("completion", -coef * log_ratio.sum(dim=1), completions.mask.any(dim=1))
    moments.exchange()
    return {"kl_reward/per_token": moments.mean("token"), "kl_reward/per_completion": moments.mean("completion")}


def critic_metrics(
    values: Tensor, returns: Tensor, mask: Tensor, reduce, realised: Tensor | None = None
) -> dict[str, float]:
    """`critic/…`, at sampling time: `critic/value_mean`, `critic/return_mean`, `critic/explained_variance`.

    The returns are those of lambda 1, whatever the critic's targets are: a target of a lower lambda is made of the
    critic's own values, which explain it however wrong they are.

    Args:
        values, returns, mask (`torch.Tensor` of shape `(B, T)`): of the critic, what was paid from there on, and where
            they count.
        realised (`torch.BoolTensor` of shape `(B,)`, *optional*): rows whose return is made of rewards alone; the
            others, which go on with the critic's own value, are left out of the last two. All rows by default.
    """
    known = mask if realised is None else mask & realised.unsqueeze(1)
    moments = Moments(reduce)
    moments.add("value", values, mask)
    moments.add("return", returns, known)
    moments.add("error", returns - values, known)
    moments.exchange()
    return {
        "critic/value_mean": moments.mean("value"),
        "critic/return_mean": moments.mean("return"),
        "critic/explained_variance": moments.explained_variance("error", "return"),
    }
