"""Advantages: generalised advantage estimation, the length stream, and how two streams become one.

Arrays are `(B, T)` and aligned with the completion (see [`lenvm_rl.returns`]). All functions are pure, keep the dtype
of ``values``, give 0 at masked slots, and do not read what stands there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lenvm_rl.returns import check_gamma, check_mask, discounted_return, discounted_sums, next_values


def _per_step(x: float | Tensor, like: Tensor, name: str) -> Tensor:
    """A float or a `(B, T)` tensor as a `(B, T)` tensor of the dtype of `like`."""
    if not isinstance(x, Tensor):
        return torch.full_like(like, x)
    if x.dim() != 0 and x.shape != like.shape:
        raise ValueError(f"{name} must be a float or have shape {tuple(like.shape)}, got {tuple(x.shape)}.")
    return x.to(like).expand_as(like)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None = None,
    action_mask: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, equation 16) over ragged rows.

    ``d_t = r_t + gamma_t * V(s_{t+1}) - V(s_t)`` and ``A_t = d_t + gamma_t * lam_t * A_{t+1}``, where the state after a
    row's last token has the value `bootstrap` and no advantage after it. ``lam = 1`` gives ``(discounted return) - V``,
    ``lam = 0`` gives ``d_t``. The targets of a critic are ``A + values``.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): reward paid for choosing token `t`.
        values (`torch.Tensor` of shape `(B, T)`): value of the state before token `t`.
        mask (`torch.Tensor` of shape `(B, T)`): 1 where token `t` exists, a prefix of ones.
        gamma (`float` or `torch.Tensor` of shape `(B, T)`): discount, in [0, 1].
        lam (`float` or `torch.Tensor` of shape `(B, T)`): bias-variance trade-off, in [0, 1].
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*):
            value after the last token: 0 for a finished row, ``V(s_L)`` for a truncated one. All 0 when omitted.
        action_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 where the policy chose token `t`. Across the others (tool output, environment text) gamma and lambda are
            1, nothing is paid, and the value is carried from the next action.

    Returns:
        `torch.Tensor` of shape `(B, T)`, 0 at masked slots and at tokens that are not actions.

    Example: rewards ``[0, 0, 1]``, values ``[.5, .5, .5]``, gamma = 1, lam = 0.5 give deltas ``[0, 0, .5]`` and
    advantages ``[.125, .25, .5]``.
    """
    exists = check_mask(mask)
    actions = exists if action_mask is None else exists & action_mask.bool()
    zero = torch.zeros_like(values)
    rewards = torch.where(actions, rewards.to(values.dtype), zero)
    if isinstance(gamma, (int, float)) and isinstance(lam, (int, float)) and gamma == lam == 1:
        # Closed form: all that is still to be paid, and the value after the end.
        end = zero[:, :1] if bootstrap is None else bootstrap.to(values.dtype).unsqueeze(1)
        return torch.where(actions, rewards.flip(1).cumsum(dim=1).flip(1) + end - values, zero)
    following = next_values(values, mask, bootstrap, action_mask)
    discount = torch.where(actions, _per_step(gamma, values, "gamma"), zero)
    deltas = torch.where(actions, rewards + discount * following - values, zero)
    # Tokens that are no actions pass the advantage on as it is.
    trace = torch.where(actions, discount * _per_step(lam, values, "lam"), exists.to(values.dtype))
    return torch.where(actions, discounted_sums(deltas, trace), zero)


def length_advantage(
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
    action_mask: Tensor | None = None,
) -> Tensor:
    """Advantage of the length return ``r_t = -(1 - gamma)`` with a Length Value Model as the baseline.

    Positive: the token led to an earlier end than the model expected (arXiv 2604.27039, appendix C.2, with the sign
    convention of [`lenvm_rl.returns`]). With ``lam = 1`` on finished rows it is ``G_t - V(s_t)``: V is a pure baseline,
    so the expected policy gradient is the same for any V. With ``lam < 1``, and on bootstrapped rows, errors of V enter
    the gradient in exchange for less variance.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): ``V(s_t)`` of the Length Value Model, in (-1, 0).
        mask (`torch.Tensor` of shape `(B, T)`): 1 where token `t` exists, a prefix of ones.
        gamma (`float`): discount of the Length Value Model, in (0, 1).
        lam (`float` or `torch.Tensor` of shape `(B, T)`, *optional*, defaults to `1.0`): as in [`gae`].
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*):
            value after the last token: exactly 0 for a finished row, ``V(s_L)`` for a cut one. All 0 when omitted.
        action_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 where the policy chose token `t`, 0 for tool output and environment text. These tokens cost nothing, do
            not discount, and get no advantage.

    Returns:
        `torch.Tensor` of shape `(B, T)`, 0 at masked slots and at tokens that are not actions.
    """
    gamma = check_gamma(gamma)
    exists = check_mask(mask)
    actions = exists if action_mask is None else exists & action_mask.bool()
    zero = torch.zeros_like(values)
    if isinstance(lam, (int, float)) and lam == 1:
        # Closed form, free of the rounding of a long sum: with n actions to come, G_t = -(1 - gamma^n) + gamma^n V_end.
        remaining = actions.to(values.dtype).flip(1).cumsum(dim=1).flip(1)
        returns = discounted_return(remaining, gamma)
        if bootstrap is not None:
            returns = returns + (returns + 1.0) * bootstrap.to(values.dtype).unsqueeze(1)
        return torch.where(actions, returns - values, zero)
    return gae(torch.full_like(values, -(1.0 - gamma)), values, mask, gamma, lam, bootstrap, action_mask)


def combine(task: Tensor, length: Tensor, mask: Tensor, coef: float, gate: Tensor | None = None) -> Tensor:
    """Two streams of advantage as one, ``A = A_task + coef * gate * A_len`` (arXiv 2604.27039, appendix C.2).

    ``coef > 0`` discourages length. This changes the objective: that is its purpose.

    Args:
        task (`torch.Tensor` of shape `(B,)` or `(B, T)`): task advantage, per completion or per token.
        length (`torch.Tensor` of shape `(B, T)`): length advantage.
        mask (`torch.Tensor` of shape `(B, T)`): 1 where token `t` exists.
        coef (`float`): weight of the length stream.
        gate (`torch.Tensor` of shape `(B,)`, *optional*): weight of each row's length stream, e.g. 1 where correct.

    Returns:
        `torch.Tensor` of shape `(B, T)`, 0 at masked slots.
    """
    exists = check_mask(mask)
    if task.dim() == 1:
        task = task.unsqueeze(1)
    zero = torch.zeros_like(length)
    clean = torch.where(exists, length, zero)
    if gate is not None:
        clean = gate.to(length.dtype).unsqueeze(1) * clean
    return torch.where(exists, task.to(length.dtype) + coef * clean, zero)
