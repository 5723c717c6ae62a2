"""Length rewards that compare a length with a number: a limit, a target, or a multiplier.

Each is a pure function ``(lengths, correct, group, **knobs) -> rewards`` over `N` completions. `lengths` are tokens, as
the caller counts them: [`reward.length_penalties.LengthReward`] says how. `correct` holds 0 or 1. `group` is not used
here; every rule takes it. Rules that compare within a group are in `reward.group_rules`.

Default everywhere: the length of a wrong answer does not matter, since paying for it teaches to fail fast. Where a
paper lets wrong answers pay, `penalize_wrong=True` is the paper's form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear_length_reward(
    lengths: Tensor, correct: Tensor, group: Tensor | None = None, *, alpha: float, max_length: int
) -> Tensor:
    """Correct answers earn less the longer they are: ``C * (1 - alpha * min(L, L_max) / L_max)``.

    Gate: only correct answers pay, so failing fast is never rewarded. No paper of its own: the simplest
    correctness-gated penalty. Contains the task reward; use it in its place.

    Worked example: ``alpha = 0.5``, ``L_max = 100``: a correct answer of 40 tokens earns 1 - 0.5 * 0.4 = 0.8, one of
    100 or more earns 0.5, a wrong one 0.

    Args:
        lengths (`torch.Tensor` of shape `(N,)`): `L`, tokens of each completion.
        correct (`torch.Tensor` of shape `(N,)`): `C`, 0 or 1.
        group (`torch.Tensor` of shape `(N,)`, *optional*): not used; every penalty takes it.
        alpha (`float`): share of the reward lost at `max_length`, in [0, 1].
        max_length (`int`): `L_max` in tokens; longer completions are treated as this long.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32.
    """
    lengths, flags, _ = checked(lengths, correct, group)
    check_share("alpha", alpha)
    check_tokens("max_length", max_length)
    return flags * (1.0 - alpha * (lengths / max_length).clamp(max=1.0))


def truncation_length_reward(lengths: Tensor, correct: Tensor, group: Tensor | None = None, *, limit: int) -> Tensor:
    """Correct answers count only up to a limit: ``C * 1(L <= limit)``.

    Paper: DLER, arXiv 2510.15110, whose runs use 4000 tokens. Its lesson is that the optimiser matters more than the
    penalty's form: `scale_rewards="batch"`, `epsilon_high=0.28`, and dropping groups whose rewards are all equal.
    Gate: only correct answers can lose. Contains the task reward; use it in its place.

    Worked example: ``limit = 100``: correct answers of 100 and 101 tokens earn 1 and 0, a wrong one 0.

    Args:
        lengths, correct, group: see [`linear_length_reward`].
        limit (`int`): longest completion that counts, in tokens.
    """
    lengths, flags, _ = checked(lengths, correct, group)
    check_tokens("limit", limit)
    return flags * (lengths <= limit)


def soft_overlong_length_reward(
    lengths: Tensor,
    correct: Tensor,
    group: Tensor | None = None,
    *,
    max_length: int,
    cache: int,
    penalize_wrong: bool = False,
) -> Tensor:
    """The last `cache` tokens before the maximum cost: ``-clip((L - (L_max - c)) / c, 0, 1)``.

    Paper: DAPO, arXiv 2503.14476, equation 13; there all answers pay, as with TRL's `get_soft_overlong_punishment`,
    which `penalize_wrong=True` equals. Gate: correct ones by default. To be *added* to the task reward: within the last
    tokens a correct answer earns 1 - 1 = 0, as much as a wrong one.

    Worked example: ``L_max = 100``, ``c = 20``: 80 tokens cost 0, 90 cost 0.5, 100 and more cost 1.

    Args:
        lengths, correct, group: see [`linear_length_reward`].
        max_length (`int`): `L_max` in tokens, the paper's 20480.
        cache (`int`): `c` in tokens, the paper's 4096; at most `max_length`. With 0 there is a step after `max_length`.
        penalize_wrong (`bool`, *optional*, defaults to `False`): whether wrong answers pay as well.
    """
    lengths, flags, _ = checked(lengths, correct, group)
    check_tokens("max_length", max_length)
    if not 0 <= cache <= max_length:
        raise ValueError(f"cache must lie between 0 and max_length={max_length} tokens, got {cache}.")
    over = lengths - (max_length - cache)
    cost = (over / cache).clamp(0.0, 1.0) if cache else (over > 0).float()
    return -cost if penalize_wrong else -cost * flags


def cosine_length_reward(
    lengths: Tensor,
    correct: Tensor,
    group: Tensor | None = None,
    *,
    max_length: int,
    shortest_correct: float = 1.0,
    longest_correct: float = 0.5,
    shortest_wrong: float = -1.0,
    longest_wrong: float = -0.5,
    penalize_wrong: bool = False,
) -> Tensor:
    """From one reward at length 0 to another at the maximum, along half a cosine of ``min(L, L_max) / L_max``.

    Paper: arXiv 2502.03373, appendix C.1. The four rewards are by default those of TRL's `get_cosine_scaled_reward`,
    which `penalize_wrong=True` equals where math-verify is the task reward; the paper's are 2, 1, -10 and 0.

    Gate: correct answers lose by length. With `penalize_wrong` wrong ones lose *less* the longer they are, which pays
    for filling up the budget; by default they earn 0 whatever their length. Contains the task reward; use it in its
    place.

    Worked example: ``L_max = 100``: correct answers of 0, 50 and 100 tokens earn 1, 0.75 and 0.5; wrong ones 0, or with
    `penalize_wrong` -1, -0.75 and -0.5.

    Args:
        lengths, correct, group: see [`linear_length_reward`].
        max_length (`int`): `L_max` in tokens; longer completions are treated as this long.
        shortest_correct, longest_correct (`float`, *optional*): rewards of a correct answer at lengths 0 and `L_max`.
        shortest_wrong, longest_wrong (`float`, *optional*): those of a wrong one.
        penalize_wrong (`bool`, *optional*, defaults to `False`): whether a wrong answer's length counts.
    """
    lengths, flags, _ = checked(lengths, correct, group)
    check_tokens("max_length", max_length)
    short = 0.5 * (1.0 + torch.cos((lengths / max_length).clamp(max=1.0) * math.pi))
    right = longest_correct + (shortest_correct - longest_correct) * short
    wrong = longest_wrong + (shortest_wrong - longest_wrong) * short if penalize_wrong else torch.zeros_like(right)
    return torch.where(flags.bool(), right, wrong)


def l1_exact_length_reward(
    lengths: Tensor,
    correct: Tensor,
    group: Tensor | None = None,
    *,
    target_length: Tensor | int,
    alpha: float = 3e-4,
    penalize_wrong: bool = False,
) -> Tensor:
    """Every token away from the wanted length costs: ``C - alpha * |n - L|``.

    Paper: L1 (LCPO-Exact), arXiv 2503.04697, `alpha` from there; the prompt names `n`. There wrong answers pay, too.
    Gate: correct ones by default, as ``C * max(0, 1 - alpha * |n - L|)``, so that a correct answer never earns less
    than a wrong one. Contains the task reward; use it in its place.

    Worked example: ``n = 100``, ``alpha = 0.01``: correct answers of 100, 80 and 300 tokens earn 1, 0.8 and 0 (-1 with
    `penalize_wrong`); a wrong one of 80 tokens earns 0 (-0.2 with `penalize_wrong`).

    Args:
        lengths, correct, group: see [`linear_length_reward`].
        target_length (`torch.Tensor` of shape `(N,)` or `int`): `n` in tokens, for each completion or for all.
        alpha (`float`, *optional*, defaults to 3e-4): cost of a token.
        penalize_wrong (`bool`, *optional*, defaults to `False`): whether wrong answers pay as well.
    """
    lengths, flags, _ = checked(lengths, correct, group)
    check_not_negative("alpha", alpha)
    cost = alpha * (checked_target(target_length, lengths) - lengths).abs()
    return flags - cost if penalize_wrong else flags * (1.0 - cost).clamp(min=0.0)


def l1_max_length_reward(
    lengths: Tensor,
    correct: Tensor,
    group: Tensor | None = None,
    *,
    target_length: Tensor | int,
    alpha: float = 3e-4,
    delta: float = 0.5,
) -> Tensor:
    """Correct answers earn more the further they stay under a budget: ``C * clip(alpha * (n - L) + delta, 0, 1)``.

    Paper: L1 (LCPO-Max), arXiv 2503.04697, `alpha` and `delta` from there; the prompt names `n`. Gate: wrong answers
    earn 0. Contains the task reward; use it in its place.

    Worked example: ``n = 100``, ``alpha = 0.01``, ``delta = 0.5``: correct answers of 50, 100, 125 and 150 tokens earn
    1, 0.5, 0.25 and 0.

    Args:
        lengths, correct, group: see [`linear_length_reward`].
        target_length (`torch.Tensor` of shape `(N,)` or `int`): `n` in tokens, for each completion or for all.
        alpha (`float`, *optional*, defaults to 3e-4): what a token is worth.
        delta (`float`, *optional*, defaults to 0.5): reward of a correct answer of exactly `n` tokens.
    """
    lengths, flags, _ = checked(lengths, correct, group)
    check_not_negative("alpha", alpha)
    return flags * (alpha * (checked_target(target_length, lengths) - lengths) + delta).clamp(0.0, 1.0)


def laser_length_reward(
    lengths: Tensor, correct: Tensor, group: Tensor | None = None, *, target_length: Tensor | int, bonus: float = 0.5
) -> Tensor:
    """A bonus for correct answers within a target: ``C + bonus * C * 1(L <= L_T)``.

    Paper: LASER, arXiv 2505.15612, `bonus` from there; `L_T` is 2048, 4096 or 8192 tokens in its runs. A correct answer
    that is too long still earns 1. Gate: correct answers only. Contains the task reward; use it in its place.

    Worked example: ``L_T = 100``: correct answers of 100 and 101 tokens earn 1.5 and 1, a wrong one 0.

    Args:
        lengths, correct, group: see [`linear_length_reward`].
        target_length (`torch.Tensor` of shape `(N,)` or `int`): `L_T` in tokens, for each completion or for all.
        bonus (`float`, *optional*, defaults to 0.5): what staying within the target is worth.
    """
    lengths, flags, _ = checked(lengths, correct, group)
    check_not_negative("bonus", bonus)
    return flags * (1.0 + bonus * (lengths <= checked_target(target_length, lengths)))


def leash_length_reward(
    lengths: Tensor, correct: Tensor, group: Tensor | None = None, *, target_length: Tensor | int, multiplier: float
) -> Tensor:
    """Length over a target costs, at a price that changes: ``clip(2C - 1 - lam * max(0, L / L_t - 1), -1, 1)``.

    Paper: Leash, arXiv 2512.21540: reward as great as can be with a mean length of at most `L_t`; `lam` is the
    constraint's multiplier, see [`reward.stateful_penalties.leash_multiplier`]. Gate: one-sided, shorter than `L_t`
    earns nothing; a wrong answer has -1 already and cannot lose more. Contains the task reward, as 1 and -1; use it in
    its place.

    Worked example: ``L_t = 100``, ``lam = 0.5``: correct answers of 100, 200 and 700 tokens earn 1, 1 - 0.5 = 0.5 and
    -1, a wrong one -1.

    Args:
        lengths, correct, group: see [`linear_length_reward`].
        target_length (`torch.Tensor` of shape `(N,)` or `int`): `L_t` in tokens, for each completion or for all.
        multiplier (`float`): `lam`, at least 0.
    """
    lengths, flags, _ = checked(lengths, correct, group)
    check_not_negative("multiplier", multiplier)
    over = (lengths / checked_target(target_length, lengths) - 1.0).clamp(min=0.0)
    return (2.0 * flags - 1.0 - multiplier * over).clamp(-1.0, 1.0)


def checked(lengths: Tensor, correct: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lengths and flags as float32 and groups as indices from 0, or a `ValueError` saying what is wrong."""
    for name, given in (("correct", correct), ("group", group)):
        if given is not None and given.shape != lengths.shape:
            raise ValueError(f"{name} must be shaped like lengths, {tuple(lengths.shape)}, got {tuple(given.shape)}.")
    flags = correct.float()
    if bool(((flags != 0) & (flags != 1)).any()):
        raise ValueError(
            "correct must hold 0 or 1: pass a correctness flag, not a shaped reward "
            f"(found {float(flags[(flags != 0) & (flags != 1)][0]):g})."
        )
    index = None if group is None else torch.unique(group, return_inverse=True)[1]
    return lengths.float(), flags, index


def checked_target(target_length: Tensor | int, lengths: Tensor) -> Tensor:
    """Target lengths as float32, one for each completion, or a `ValueError`."""
    target = torch.as_tensor(target_length, dtype=torch.float32)
    if target.ndim and target.shape != lengths.shape:
        raise ValueError(
            f"target_length must be a number or shaped like lengths, {tuple(lengths.shape)}, got {tuple(target.shape)}."
        )
    if bool((~(target >= 1)).any()):
        raise ValueError(f"target_length must be at least 1 token, got {float(target.min()):g}.")
    return target


def check_share(name: str, value: float) -> None:
    """Raise a `ValueError` if a share of a correct answer's reward is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}: a correct answer would earn less than a wrong one.")


def check_not_negative(name: str, value: float) -> None:
    """Raise a `ValueError` if a price is negative or no number."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number from 0 on, got {value}: below 0 it would pay for length.")


def check_tokens(name: str, value: float) -> None:
    """Raise a `ValueError` if a length is less than a token."""
    if not value >= 1:
        raise ValueError(f"{name} must be at least 1 token, got {value}.")
