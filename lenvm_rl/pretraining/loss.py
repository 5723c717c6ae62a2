"""Regression targets of value pretraining, and the token-mean loss (Length Value Model, arXiv 2604.27039, section 3.3).

Arrays are `(R, C)` rows of columns. A column whose token ends a state to be fitted holds in `remaining` how many tokens
follow until the completion ends or is cut; every other column (earlier prompt tokens, padding, the last token) holds
`IGNORED`. The states of one completion stand in neighbouring columns, so rows may be padded on either side or packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lenvm_rl.returns import discounted_return, discounted_sums

IGNORED = -100  # what transformers' Trainer leaves out when it counts the items of an optimizer step

# How the completion of a column goes on after its last state.
FINISHED = 0  # it ended: the state after the last token is worth exactly 0
CUT = 1  # it was cut: the state after the last token is worth what the model says, and stands in the row
ENDLESS = 2  # it is taken to go on for ever: worth -1


def value_targets(
    values: Tensor, remaining: Tensor, endings: Tensor, gamma: float, lam: float = 1.0, ends: Tensor | None = None
) -> Tensor:
    """What each value is fitted to: the length return, or its lambda-return.

    With n tokens until the completion ends or is cut, and `V_end` the value after the last of them, the return is
    ``G = -(1 - gamma^n) + gamma^n V_end``. For a finished completion `V_end` is 0, and G the Monte Carlo return. For a
    cut one (its true length is unknown: it is censored) `V_end` is the model's own value there, without gradient.
    For ``lam < 1`` the target is ``G_t = r + gamma ((1 - lam) V(s_{t+1}) + lam G_{t+1})`` with ``r = -(1 - gamma)``
    (Sutton & Barto, "Reinforcement Learning", 2nd edition, section 12.1), for all states at once in ``log2 C`` steps.

    Args:
        values (`torch.Tensor` of shape `(R, C)`): the model's values; no gradient flows through the targets.
        remaining (`torch.Tensor` of shape `(R, C)`, int64): tokens to come, at least 1; `IGNORED` without a state.
        endings (`torch.Tensor` of shape `(R, C)`, int): `FINISHED`, `CUT` or `ENDLESS`. For `CUT` the state after the
            last token stands `remaining` columns further on, or where `ends` says.
        gamma (`float`): discount of the length return, in (0, 1).
        lam (`float`, *optional*, defaults to `1.0`): in [0, 1]; 1 is the closed form without a loop.
        ends (`torch.Tensor` of shape `(R, C)`, int64, *optional*): column of the state after the completion's last
            token, where not every token counts as one to come. For lambda 1 alone.

    Returns:
        `torch.Tensor` of shape `(R, C)` in the dtype of `values`, in [-1, 0]; 0 where there is no state.
    """
    values = values.detach()
    scored = remaining != IGNORED
    steps = torch.where(scored, remaining, torch.zeros_like(remaining))
    end_values = _end_values(values, steps, endings, ends)
    if lam == 1.0:
        returns = discounted_return(steps.to(values.dtype), gamma)
        return torch.where(scored, returns + (1.0 + returns) * end_values, torch.zeros_like(values))
    last = scored & (steps == 1)
    following = torch.where(last, end_values, (1.0 - lam) * torch.nn.functional.pad(values[:, 1:], (0, 1)))
    target = torch.where(scored, gamma * following - (1.0 - gamma), torch.zeros_like(values))
    weight = torch.where(scored & ~last, torch.full_like(values, gamma * lam), torch.zeros_like(values))
    return discounted_sums(target, weight)


def _end_values(values: Tensor, steps: Tensor, endings: Tensor, ends: Tensor | None) -> Tensor:
    """Value after the last token of the completion that each column belongs to."""
    if ends is None:
        ends = torch.arange(values.shape[1], device=values.device) + steps
    at_cut = values.gather(1, ends.clamp(max=values.shape[1] - 1))
    end_values = torch.where(endings == CUT, at_cut, torch.zeros_like(values))
    return torch.where(endings == ENDLESS, torch.full_like(values, -1.0), end_values)


def length_value_loss(values: Tensor, targets: Tensor, scored: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Squared error summed over states and divided by the number of states (arXiv 2604.27039, section 3.3).

    The mean runs over tokens, not over sequences: a weight that depends on a sequence's length depends on the future of
    its states, and shifts what they converge to.

    Args:
        values, targets (`torch.Tensor` of any shape): the model's values, and what [`value_targets`] gives.
        scored (`torch.Tensor` of the same shape, bool): where there is a state; nothing else matters, NaN included.
        num_items (`torch.Tensor` or `int`, *optional*): states to divide by: all of the optimizer step, over its
            micro-batches and processes. The states given here when omitted.
    """
    # Both are cleaned before the subtraction: a NaN that is only masked afterwards still poisons the gradient.
    zero = torch.zeros_like(values)
    errors = torch.where(scored, values, zero) - torch.where(scored, targets, zero)
    return errors.square().sum() / (scored.sum() if num_items is None else num_items)
