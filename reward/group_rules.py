"""Length rewards that compare the completions of one prompt with each other.

Each is a pure function ``(lengths, correct, group, **knobs) -> rewards`` over `N` completions. `lengths` are tokens, as
the caller counts them: [`reward.length_penalties.LengthReward`] says how. `correct` holds 0 or 1. `group` holds
integers; completions of one prompt share theirs, in any order.

A prompt with one completion has nothing to compare it with. Whatever its length, a correct one then gets 0 from Kimi's
rule, ``1 - alpha / 2`` from Arora's, `alpha` from ShorterBetter and ``1 / (1 + alpha)`` from GR³; ALP and LASER-D still
price its length.

Default everywhere: the length of a wrong answer does not matter to its own reward, since paying for it teaches to fail
fast. Where a paper lets wrong answers pay, `penalize_wrong=True` is the paper's form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reward.length_rules import check_not_negative, check_share, check_tokens, checked

# LASER-D's tiers by the group's pass rate: easy from 2/3 on, medium from 1/3 on, hard below.
TIERS = ("easy", "medium", "hard")


def kimi_length_reward(lengths: Tensor, correct: Tensor, group: Tensor, *, penalize_wrong: bool = False) -> Tensor:
    """Length term of Kimi k1.5 (arXiv 2501.12599, section 2.3.3): shorter than the group's middle gains, longer loses.

    With ``lam = 0.5 - (L - L_min) / (L_max - L_min)`` over the completions of a prompt: ``lam`` if correct,
    ``min(0, lam)`` if wrong; 0 for a group whose completions are all equally long.

    Gate: in the paper, wrong answers never gain, but long ones lose: `penalize_wrong=True`. By default they get 0. To
    be *added* to the task reward with a weight; the paper turns it on only after a while of training without it.

    Worked example: a group of 10, 20 and 30 tokens, the first two correct: 0.5, 0.0 and 0 (with `penalize_wrong`
    min(0, -0.5) = -0.5).

    Args:
        lengths (`torch.Tensor` of shape `(N,)`): `L`, tokens of each completion.
        correct (`torch.Tensor` of shape `(N,)`): 0 or 1.
        group (`torch.Tensor` of shape `(N,)`): integers; completions of one prompt share theirs.
        penalize_wrong (`bool`, *optional*, defaults to `False`): whether wrong answers lose by their length.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, in [-0.5, 0.5].
    """
    lengths, flags, index = _grouped("kimi_length_reward", lengths, correct, group)
    shortest, longest = _lowest(lengths, index), -_lowest(-lengths, index)
    spread = longest - shortest
    lam = torch.where(spread > 0, 0.5 - (lengths - shortest) / spread.clamp(min=1.0), torch.zeros_like(lengths))
    wrong = lam.clamp(max=0.0) if penalize_wrong else torch.zeros_like(lam)
    return torch.where(flags.bool(), lam, wrong)


def arora_length_reward(lengths: Tensor, correct: Tensor, group: Tensor, *, alpha: float = 0.1) -> Tensor:
    """Correct answers lose by how long they are among the correct ones: ``C * (1 - alpha * sigmoid(z))``.

    ``z = (L - mean) / std`` with mean and standard deviation over the *correct* completions of the prompt; 0 where
    they are all equally long or there is only one. The deviation is the population's.

    Paper: Arora and Zanette, arXiv 2502.04463, `alpha` 0.05, 0.1, 0.2 or 0.4 there. Gate: wrong answers earn 0.
    Contains the task reward; use it in its place.

    Worked example: ``alpha = 0.2``, correct answers of 10 and 30 tokens and a wrong one: mean 20, deviation 10, so
    z = -1 and 1: 1 - 0.2 * 0.2689 = 0.9462, 1 - 0.2 * 0.7311 = 0.8538, and 0.

    Args:
        lengths, correct, group: see [`kimi_length_reward`].
        alpha (`float`, *optional*, defaults to 0.1): the most that a correct answer can lose, in [0, 1].
    """
    lengths, flags, index = _grouped("arora_length_reward", lengths, correct, group)
    check_share("alpha", alpha)
    count = _sum(flags, index).clamp(min=1.0)
    away = lengths - _sum(flags * lengths, index) / count
    deviation = (_sum(flags * away**2, index) / count).sqrt()
    score = torch.where(deviation > 0, away / deviation.clamp(min=1e-6), torch.zeros_like(away))
    return flags * (1.0 - alpha * torch.sigmoid(score))


def alp_length_reward(
    lengths: Tensor, correct: Tensor, group: Tensor, *, beta: float = 1e-7, penalize_wrong: bool = False
) -> Tensor:
    """Every token costs, more so where the prompt is easy: ``C - beta * L * max(p, 1/K)``.

    `p` is the share of the prompt's `K` completions that are correct. Paper: ALP, arXiv 2506.05256, `beta` as reported
    of its runs (K from 16 on, up to 8192 tokens). That small a price, 0.0008 at most, orders the correct answers of a
    group among themselves, which `scale_rewards="group"` then magnifies in groups without a wrong one; without such
    scaling take more, say 1e-4. There all answers pay. Gate: correct ones by default, as
    ``C * max(0, 1 - beta * L * max(p, 1/K))``. Contains the task reward; use it in its place.

    Worked example: ``beta = 0.01``; 10, 20, 30 and 40 tokens, the first correct: p = 1/4 = 1/K, a token costs 0.0025,
    rewards 0.975, 0, 0, 0 (with `penalize_wrong` 0.975, -0.05, -0.075, -0.1). All correct: 0.9, 0.8, 0.7, 0.6.

    Args:
        lengths, correct, group: see [`kimi_length_reward`].
        beta (`float`, *optional*, defaults to 1e-7): price of a token of a prompt that is always solved.
        penalize_wrong (`bool`, *optional*, defaults to `False`): whether wrong answers pay as well.
    """
    lengths, flags, index = _grouped("alp_length_reward", lengths, correct, group)
    check_not_negative("beta", beta)
    cost = beta * lengths * _sum(flags, index).clamp(min=1.0) / _sum(torch.ones_like(flags), index)
    return flags - cost if penalize_wrong else flags * (1.0 - cost).clamp(min=0.0)


def shorter_better_length_reward(
    lengths: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 1e-3,
    penalize_wrong: bool = False,
) -> Tensor:
    """Every token away from the group's best length costs: ``alpha * C - beta * |L - L*|``.

    `L*` is the length of the prompt's shortest correct completion, or the mean of all where none is correct. Paper:
    ShorterBetter, arXiv 2504.21370, `alpha` (1 or 2) and `beta` from there. There all answers pay, also where none is
    correct. Gate: correct ones by default, as ``C * max(0, alpha - beta * |L - L*|)``. Contains the task reward; use it
    in its place.

    Worked example: ``alpha = 2``, ``beta = 0.01``, 100 and 150 tokens correct, 50 wrong: L* = 100, rewards 2, 1.5 and 0
    (with `penalize_wrong` -0.5 for the wrong one).

    Args:
        lengths, correct, group: see [`kimi_length_reward`].
        alpha (`float`, *optional*, defaults to 2): what being correct is worth.
        beta (`float`, *optional*, defaults to 1e-3): price of a token.
        penalize_wrong (`bool`, *optional*, defaults to `False`): whether wrong answers pay as well.
    """
    lengths, flags, index = _grouped("shorter_better_length_reward", lengths, correct, group)
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    best = _lowest(torch.where(flags.bool(), lengths, torch.full_like(lengths, torch.inf)), index)
    mean = _sum(lengths, index) / _sum(torch.ones_like(flags), index)
    cost = beta * (lengths - torch.where(best.isinf(), mean, best)).abs()
    return alpha * flags - cost if penalize_wrong else flags * (alpha - cost).clamp(min=0.0)


def gr3_length_reward(lengths: Tensor, correct: Tensor, group: Tensor, *, alpha: float = 0.33) -> Tensor:
    """The task reward, divided by relative length: ``C / (1 + alpha * L / L_mean)``.

    `L_mean` is over all completions of the prompt. Paper: GR³, arXiv 2603.10535, `alpha` from there. Gate: by the
    product, so that wrong answers earn 0. Contains the task reward; use it in its place.

    Worked example: ``alpha = 1``, 50 and 150 tokens correct, 100 wrong: L_mean = 100, rewards 1 / 1.5 = 0.6667,
    1 / 2.5 = 0.4 and 0.

    Args:
        lengths, correct, group: see [`kimi_length_reward`].
        alpha (`float`, *optional*, defaults to 0.33): strength.
    """
    lengths, flags, index = _grouped("gr3_length_reward", lengths, correct, group)
    check_not_negative("alpha", alpha)
    mean = _sum(lengths, index) / _sum(torch.ones_like(flags), index)
    # Where all lengths are 0, so is the mean.
    return flags / (1.0 + alpha * lengths / torch.where(mean > 0, mean, torch.ones_like(mean)))


def laser_d_length_reward(
    lengths: Tensor, correct: Tensor, group: Tensor, *, targets: Sequence[float], bonus: float = 0.5
) -> Tensor:
    """[`~reward.length_rules.laser_length_reward`] with a target for each difficulty: ``C + bonus * C * 1(L <= L_A)``.

    `L_A` is `targets[0]` where at least 2/3 of the prompt's completions are correct, `targets[1]` from 1/3 on, and
    `targets[2]` below. Paper: LASER-D, arXiv 2505.15612; `bonus` and tiers from there and its released code.
    [`reward.stateful_penalties.adaptive_targets`] is how the targets follow the policy. Gate: correct answers only.
    Contains the task reward; use it in its place.

    Worked example: targets 50, 100 and 200; three completions of 80 tokens, two of them correct: p = 2/3 is easy, 80 is
    over 50: 1, 1, 0. With one correct, p = 1/3 is medium: 1.5, 0, 0.

    Args:
        lengths, correct, group: see [`kimi_length_reward`].
        targets (sequence of three `float`): target lengths in tokens of easy, medium and hard prompts.
        bonus (`float`, *optional*, defaults to 0.5): what staying within the target is worth.
    """
    lengths, flags, index = _grouped("laser_d_length_reward", lengths, correct, group)
    check_not_negative("bonus", bonus)
    if len(targets) != len(TIERS):
        raise ValueError(f"targets must be three lengths, for easy, medium and hard prompts, got {list(targets)}.")
    for name, target in zip(TIERS, targets, strict=True):
        check_tokens(f"the target of {name} prompts", target)
    target = torch.tensor([float(one) for one in targets])[difficulty(flags, index)]
    return flags * (1.0 + bonus * (lengths <= target))


def difficulty(correct: Tensor, group: Tensor) -> Tensor:
    """The tier of each completion's prompt, an index into [`TIERS`].

    Args:
        correct (`torch.Tensor` of shape `(N,)`): 0 or 1.
        group (`torch.Tensor` of shape `(N,)`): integers; completions of one prompt share theirs.

    Returns:
        `torch.LongTensor` of shape `(N,)`.
    """
    # In whole numbers: 2 of 3 must not fall below 2/3 by rounding.
    _, flags, index = _grouped("difficulty", correct, correct, group)
    solved, count = _sum(flags, index).long(), _sum(torch.ones_like(flags), index).long()
    return (3 * solved < 2 * count).long() + (3 * solved < count).long()


def _grouped(name: str, lengths: Tensor, correct: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if group is None:
        raise ValueError(f"{name} needs `group`: the prompt that each completion belongs to.")
    return checked(lengths, correct, group)


def _sum(values: Tensor, index: Tensor) -> Tensor:
    """The sum over each completion's group, for each completion."""
    count = int(index.max()) + 1 if index.numel() else 0
    return values.new_zeros(count).scatter_add(0, index, values)[index]


def _lowest(values: Tensor, index: Tensor) -> Tensor:
    """The lowest value in each completion's group, for each completion."""
    count = int(index.max()) + 1 if index.numel() else 0
    return values.new_zeros(count).scatter_reduce(0, index, values, "amin", include_self=False)[index]
