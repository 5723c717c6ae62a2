"""Potential-based shaping with a frozen Length Value Model as the potential.

``F_t = gamma * Phi(s_{t+1}) - Phi(s_t)`` leaves the optimal policy of the *task* return unchanged if `gamma` is the
discount of that return (Ng, Harada and Russell, 1999); it is not the discount of the Length Value Model. What it can
change is how early and how noisily a policy learns:

- its discounted sum is ``-Phi(s_0)`` for every completion, so summed into a group-relative reward it does nothing;
- with a critic that says ``v`` it equals no shaping with a critic that says ``v + Phi`` (Wiewiora, 2003): it is a
  start for the critic, and vanishes once the critic has absorbed it;
- at ``lam = 1`` it is a baseline; below that, without a critic that has absorbed it, the policy gradient changes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lenvm_rl.returns import check_mask, next_values, remaining_from_logits


def potential_shaping(
    potential: Tensor,
    mask: Tensor,
    gamma: float | Tensor,
    bootstrap: Tensor | None = None,
    action_mask: Tensor | None = None,
) -> Tensor:
    """Shaping reward ``F_t = gamma * Phi(s_{t+1}) - Phi(s_t)`` (Ng et al., 1999; arXiv 2604.27039, appendix C.3).

    Args:
        potential (`torch.Tensor` of shape `(B, T)`): ``Phi(s_t)`` before each token. No gradient passes through it.
        mask (`torch.Tensor` of shape `(B, T)`): 1 where token `t` exists, a prefix of ones.
        gamma (`float` or `torch.Tensor` of shape `(B, T)`): discount of the *task* return.
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*):
            potential after the last token. It must follow the task stream: 0 wherever the task treats the end as
            terminal (the default everywhere), ``Phi(s_L)`` only where the task itself bootstraps.
        action_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 where the policy chose the token, see
            [`~lenvm_rl.returns.next_values`]; the others are paid nothing.

    Returns:
        `torch.Tensor` of shape `(B, T)`, 0 at masked slots and at tokens that are not actions.
        ``sum_t gamma^t F_t = -Phi(s_0)`` for terminal rows.
    """
    exists = check_mask(mask)
    potential = potential.detach()
    if isinstance(gamma, Tensor):
        gamma = gamma.to(potential.dtype)
    following = next_values(potential, mask, None if bootstrap is None else bootstrap.detach(), action_mask)
    counts = exists if action_mask is None else exists & action_mask.bool()
    return torch.where(counts, gamma * following - potential, torch.zeros_like(potential))


def value_potential(logits: Tensor) -> Tensor:
    """``Phi = V = -sigmoid(z)``: bounded in (-1, 0), flat far from the end. Any shape."""
    return -torch.sigmoid(logits)


def length_potential(logits: Tensor, gamma: float, max_length: int) -> Tensor:
    """``Phi = -n / max_length`` in tokens, from logits: equally steep at every distance from the end. Any shape.

    `gamma` is the Length Value Model's discount; `max_length` the length (in tokens) that counts as 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}.")
    return -remaining_from_logits(logits, gamma) / max_length


def check_shaping_gamma(shaping_gamma: float | None, task_gamma: float, allow_gamma_mismatch: bool = False) -> float:
    """The discount to shape with: `shaping_gamma`, by default `task_gamma`.

    Raises:
        `ValueError`: if the two differ and `allow_gamma_mismatch` is off. A perfect Length Value Model as potential
            with its own gamma, under an undiscounted task return, gives ``F_t = 1 - gamma`` at every token: it *pays*
            for length, ``(1 - gamma) * L`` in sum.
    """
    if shaping_gamma is None:
        return task_gamma
    if not math.isclose(shaping_gamma, task_gamma, rel_tol=0.0, abs_tol=1e-12) and not allow_gamma_mismatch:
        raise ValueError(
            f"shaping_gamma={shaping_gamma} differs from task_gamma={task_gamma}: such shaping is not potential-based "
            "and changes what is optimal (with the length model's own gamma it pays for length). Leave shaping_gamma "
            "unset, or set allow_gamma_mismatch=True if that is the experiment."
        )
    return shaping_gamma
